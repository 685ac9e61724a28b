"""The theory that goes with the method: exact oracles, bounds, advice."""
