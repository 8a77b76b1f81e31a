"""The autoscaler's outside world: threads, commands sent, health checks, ledger, ssh."""
