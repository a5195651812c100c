"""Commands, run by path."""
