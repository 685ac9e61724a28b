"""What both halves of a round agree on, byte for byte."""
