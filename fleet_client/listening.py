"""Listen on an address: the socket, who may reach it, and how many files may be open."""

import resource
import socket

from fleet_client.errors import ConfigError
from fleet_client.loopback import is_loopback_host


def check_bind(host: str, port: int, *, keys_present: bool) -> None:
    """Raise ConfigError unless a server listens on loopback only or wants keys."""
    if not is_loopback_host(host) and not keys_present:
        raise ConfigError(f"listening on {host}:{port} needs keys: everybody could reach it without")


def bind_socket(host: str, port: int, *, listen: bool = True) -> socket.socket:
    """Return a socket bound to the address; raise ConfigError when the port is taken.

    listen: take connections at once, also before they are accepted; otherwise they are refused for now.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        if listen:
            sock.listen(4096)
    except (OSError, OverflowError) as e:
        sock.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {getattr(e, 'strerror', None) or e}") from e
    return sock


def allow_many_files() -> None:
    """Raise this process's limit on open files to what the system allows, up to 65,536.

    Each client and each instance is one file. The usual soft limit of 1,024 is for programs that use
    select().
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
