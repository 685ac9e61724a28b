"""The Flower ServerApp: the experiment's server side, whose messages Flower's grid carries."""
