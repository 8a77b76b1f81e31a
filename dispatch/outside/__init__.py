"""The loadbalancer's outside world: parked requests, background tasks, messages read and written."""
