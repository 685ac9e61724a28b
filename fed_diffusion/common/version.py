"""The version of fed-diffusion, which files that a run writes carry."""

__version__ = "0.1.0"
