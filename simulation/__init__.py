"""What sim.py is made of: users of a live fleet, the local stack, virtual time, traces, reports."""
