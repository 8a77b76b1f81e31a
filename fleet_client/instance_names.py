"""Keeps from a client's program where an instance is: the program speaks with the fleet.

A program that follows a Location to an instance, or has read its address in an error, sends its next prompt
there without a lease. So a redirect leads to the same path of the fleet, wherever it pointed, and takes a
lease of its own; a header that names the instance says the path alone, or is left out; errors say its number.

What an answer's body says is the instance's own, and passes as it is.
"""

import functools
import os
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from fleet_client.loopback import is_loopback_host

_URLS = (b"location", b"content-location")

_ORIGIN = re.compile(rb"\s*(?:https?:)?[/\\]{2}[^/?#\\]*", re.IGNORECASE)

_RELATIVE = re.compile(rb"(?![A-Za-z][A-Za-z0-9+.-]*:)(?![/\\]{2})[!-~]+")
"""Any other leads away; browsers leave out tabs, take \\ for /, and read //HOST as a host."""


@functools.lru_cache(maxsize=4096)
def _named_as(address: str) -> tuple[bytes, re.Pattern[bytes]]:
    """Return (how a header may name that address, a pattern of the origin that stands before a path)."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    # On loopback there are others, and pages of this machine are named in Access-Control-Allow-Origin.
    name = parts.netloc if is_loopback_host(host) else host
    text = name.lower().encode()
    shown = re.escape(f"[{name}]" if ":" in name and name == host else name).encode()
    return text, re.compile(rb"(?:https?:)?//" + shown + rb"(?::\d+)?(?![0-9A-Za-z.:@-])/?", re.IGNORECASE)


def without_address(headers: Sequence[tuple[bytes, bytes]], address: str) -> list[tuple[bytes, bytes]]:
    """Return the headers of an answer so that none leads to the instance at that address."""
    name, origin = _named_as(address)
    text = b"\n".join([part for header in headers for part in header]).lower()
    if name not in text and b"location" not in text:
        return list(headers)
    kept = []
    for header, value in headers:
        if header.lower() in _URLS:
            if (found := _ORIGIN.match(value)) is not None:
                path = value[found.end() :]
                value = path if path.startswith((b"/", b"\\")) else b"/" + path
            if not _RELATIVE.fullmatch(value):
                continue
        elif name in value.lower():
            value = origin.sub(b"/", value)
        if name not in header.lower() and name not in value.lower():
            kept.append((header, value))
    return kept


def error_without_address(text: str, error: BaseException, address: str) -> str:
    """Return an error's text, or only what kind of error it is where the text names the address."""
    host = urlsplit(address).hostname or ""
    if host.lower() not in text.lower():
        return text
    number = error.errno if isinstance(error, OSError) else None
    return type(error).__name__ + (f": {os.strerror(number)}" if number else "")
