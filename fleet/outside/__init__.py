"""The autoscaler's outside world: threads, commands that are sent, health checks, the ledger, ssh."""
