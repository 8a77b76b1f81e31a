"""What the autoscaler is made of. Pure; fleet.outside does the I/O."""
