"""Ports of instances on loopback: one outside port for each port inside the container."""

import random
import socket
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress

PORTS = (20_000, 30_000)
"""Range of outside ports: below Linux's for outgoing connections, so that none of those takes one."""

_chance = random.SystemRandom()


def listen_on(port: int) -> socket.socket:
    """Return a socket that listens on this port of loopback; raise OSError when that cannot be."""
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen(32)
    except OSError:
        sock.close()
        raise
    return sock


def listen_on_some(count: int) -> list[socket.socket]:
    """Return `count` sockets that listen on free ports of loopback."""
    found: list[socket.socket] = []
    while len(found) < count:
        with suppress(OSError):
            found.append(listen_on(_chance.randrange(*PORTS)))
    return found


def choose(
    inside: Iterable[str], wanted: Mapping[str, int], taken: Collection[int]
) -> tuple[socket.socket, dict[str, int]]:
    """Return a socket that listens for ssh, and the outside port for each port inside a container.

    inside: as "8000/tcp"; "22/tcp" must be among them. wanted: outside ports to try first. taken: outside
    ports that are not to be given.
    """
    given: dict[str, int] = {}
    ssh_sock: socket.socket | None = None
    for name in inside:
        port = wanted.get(name) or _chance.randrange(*PORTS)
        while name not in given:
            if port not in taken and port not in given.values():
                with suppress(OSError):
                    sock = listen_on(port)
                    given[name] = port
                    if name == "22/tcp":
                        ssh_sock = sock
                    else:
                        sock.close()
            port = _chance.randrange(*PORTS)
    assert ssh_sock is not None  # noqa: S101 port 22 is in every order
    return ssh_sock, given
