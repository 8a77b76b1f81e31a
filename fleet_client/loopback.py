"""Whether a host, URL or header leads to this machine only, where things may travel in the clear."""

import functools
import ipaddress
from urllib.parse import urlsplit


def is_loopback_host(host: str) -> bool:
    """Return whether a host's name or address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_loopback_url(url: str) -> bool:
    """Return whether a URL's host is this machine, by name or by number."""
    return is_loopback_host(urlsplit(url).hostname or "")


@functools.lru_cache(maxsize=256)
def names_loopback(host_header: bytes) -> bool:
    """Return whether a Host header, or what follows http:// in an Origin, is a name of this machine."""
    host = host_header.decode("latin-1")
    if host.startswith("["):
        return is_loopback_host(host[1:].split("]")[0])
    return is_loopback_host(host.split(":")[0])
