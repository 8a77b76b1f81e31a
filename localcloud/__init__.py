"""A Vast.ai on one machine."""
