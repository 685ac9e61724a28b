"""For every test: how hypothesis runs, and that Ctrl-C works."""

import os
import signal

from hypothesis import settings

from tests.tiny import digits, tiny

__all__ = ["digits", "tiny"]  # fixtures

settings.register_profile("busy", deadline=None)  # the machine may be busy with something else
settings.load_profile("busy")

# what tests expect is a CPU's, but for tests/gpu; CUDA_VISIBLE_DEVICES=0 lets them see a GPU
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# tests leave no images in the user's cache; those of the cache have one of their own
os.environ["FED_DIFFUSION_IMAGE_CACHE_GB"] = "0"

# what a shell starts in the background ignores SIGINT, and so would every command under test
signal.signal(signal.SIGINT, signal.default_int_handler)
