"""Both sides of a round, and what travels between them. No Flower here."""
