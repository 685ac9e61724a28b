"""Masks as recipes: which coordinates each worker keeps, and why."""
