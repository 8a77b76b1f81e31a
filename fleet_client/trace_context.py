"""The W3C trace context of a request: the id by which its lines in several logs are found together.

A program's header goes to the instance as it came, and to the loadbalancer with the request for a lease. None
is made up here. It holds ids and nothing of a prompt.
"""

import re
from collections.abc import Iterable

TRACEPARENT = "traceparent"
"""The header, by https://www.w3.org/TR/trace-context/ (version 00, and what later ones begin with)."""

_FORM = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def traceparent_in(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the value of a request's only traceparent header; None where it is missing, wrong or twofold."""
    values = [value.strip() for name, value in headers if name.lower() == b"traceparent"]
    return values[0].decode() if len(values) == 1 and _FORM.fullmatch(values[0]) else None


def trace_id(traceparent: bytes) -> str:
    """Return the id of the trace in the value of such a header, 32 hexadecimal digits; "" for a wrong one."""
    found = _FORM.fullmatch(traceparent)
    return found[1].decode() if found else ""
