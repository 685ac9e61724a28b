"""For every test: how hypothesis runs."""

from hypothesis import settings

settings.register_profile("busy", deadline=None)  # the machine may be busy with something else
settings.load_profile("busy")
