"""The command line: this package turns what is typed into calls of the rest."""
