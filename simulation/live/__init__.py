"""Users of a running fleet, and the whole system on this machine."""
