"""A stand-in for Vast.ai on one machine: its API, billing and faults, with real processes as instances."""
