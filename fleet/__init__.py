"""What the autoscaler is made of: pure parts, which decide; fleet.outside does the I/O."""
