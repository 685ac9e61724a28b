"""A run directory: its files, its checkpoints and the process that owns it."""
