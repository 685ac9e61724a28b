"""Equation (8) and its relatives, as exact sums."""
