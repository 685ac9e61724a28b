"""A trained run as files that other tools read."""
