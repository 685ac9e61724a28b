"""Randomness, devices, threads, and words for the user."""
