"""Grids of runs, their tables and figures, beside the paper's numbers."""
