"""Listen on an address: the socket, who may reach it, and how many files may be open."""

import os
import resource
import socket

from fleet_client.errors import ConfigError
from fleet_client.loopback import is_loopback_host


def check_bind(host: str, port: int, *, keys_present: bool) -> None:
    """Raise ConfigError unless a server listens on loopback only or wants keys."""
    if not is_loopback_host(host) and not keys_present:
        raise ConfigError(f"listening on {host}:{port} needs keys: everybody could reach it without")


FIRST_HANDED = 3
"""The file number of the first socket that a service manager hands over: sd_listen_fds(3)."""


def handed_over(host: str, port: int) -> socket.socket | None:
    """Return the socket that a service manager (systemd) listens on for us, or None where there is none.

    It stays open while we are started again, so that a client waits a moment and is not refused. Raises
    ConfigError when it is not one of that address: what may reach us has been judged by that.
    """
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    if pid != str(os.getpid()) or not count:
        return None
    if count != "1":
        raise ConfigError(f"the service manager hands over {count} sockets: wanted one")
    sock = socket.socket(fileno=FIRST_HANDED)
    os.set_inheritable(FIRST_HANDED, False)
    name = sock.getsockname()
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or name[1] != port or name[0] != _address(host):
        raise ConfigError(f"the service manager listens on {name}, and --host and --port say {host}:{port}")
    return sock


def _address(host: str) -> str:
    return "127.0.0.1" if host == "localhost" else host


def bind_socket(host: str, port: int, *, listen: bool = True) -> socket.socket:
    """Return a socket bound to the address, or the one handed over; raise ConfigError if it is taken.

    listen: take connections at once, also before they are accepted; otherwise they are refused for now.
    """
    if (handed := handed_over(host, port)) is not None:
        return handed
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
