"""Live runs of sim.py: users of a running fleet, and the whole system on this machine."""
