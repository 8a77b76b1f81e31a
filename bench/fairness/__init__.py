"""What one client suffers from others that attack the loadbalancer."""
