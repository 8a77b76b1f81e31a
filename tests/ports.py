"""Ports for the programs that a test starts."""

import random
import socket

_RANGE = (10_000, 20_000)
"""Below those that the local stack takes, and below Linux's for outgoing connections (32768 and up): another
test that runs at the same time, with thousands of connections, could have one of those by the time that the
program listens."""


def free_port() -> int:
    """Return a port of loopback on which nothing listens."""
    chance = random.SystemRandom()
    while True:
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", chance.randrange(*_RANGE)))
            except OSError:
                continue
            port: int = sock.getsockname()[1]
            return port
