"""Vast.ai through its command line, as typed calls."""
