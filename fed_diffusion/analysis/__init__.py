"""The theory applied to a run and to a plan."""
