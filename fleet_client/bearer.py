"""Compare bearer keys in constant time."""

import hmac
from collections.abc import Collection


def bearer_is(header: str | None, keys: Collection[str]) -> bool:
    """Return whether an Authorization header carries one of the keys; each is compared in constant time."""
    if header is None or header[:7].lower() != "bearer ":
        return False
    given = header[7:].encode()
    good = False
    for key in keys:
        good |= hmac.compare_digest(given, key.encode())
    return good
