"""Logs of requests and synthetic traffic."""
