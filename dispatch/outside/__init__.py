"""The loadbalancer's outside world: parked requests, background tasks, what is read from others."""
