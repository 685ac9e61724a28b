"""The client's half of a round."""
