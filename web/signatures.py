"""How instances sign the messages that they send unasked. No I/O, no clock.

    Authorization: Fleet <name>:<HMAC-SHA256 of "path body", hex>

An instance signs with what it has of its master token, the SHA-256; its name is a hash of that, and tells
nothing. Each message has the id of its boot and a number that grows within it, so one that was heard before
is refused (web/replay_guard.py), whatever the clocks say. remote/speaker.py is the other end.
"""

import functools
import hashlib
import hmac
import re
from collections.abc import Mapping

_HEADER = re.compile(r"Fleet ([0-9a-f]{16}):([0-9a-f]{64})")


def instance_key(master_token: str) -> str:
    """Return the key that an instance signs with: the SHA-256 of its master token, hex.

    The instance has this instead of the token (fleet/outside/start_script.py).
    """
    return hashlib.sha256(master_token.encode()).hexdigest()


@functools.lru_cache(maxsize=16_384)
def name_and_key(master_token: str) -> tuple[str, str]:
    """Return the name that an instance with that master token calls itself, and the key it signs with."""
    key = instance_key(master_token)
    return hashlib.sha256(key.encode()).hexdigest()[:16], key


def claimed_name(authorization: str | None) -> str | None:
    """Return the instance name that this Authorization header claims, or None; only `signer` proves it."""
    found = _HEADER.fullmatch(authorization or "")
    return found[1] if found else None


def signer(authorization: str | None, path: str, raw: bytes, keys: Mapping[str, str]) -> str | None:
    """Return the name of the instance that signed this body for this path, or None if none of `keys` did.

    keys: the instances' signing keys by name.
    """
    found = _HEADER.fullmatch(authorization or "")
    key = keys.get(found[1]) if found else None
    if found is None or key is None:
        return None
    wanted = hmac.new(key.encode(), path.encode() + b" " + raw, hashlib.sha256).hexdigest()
    return found[1] if hmac.compare_digest(wanted, found[2]) else None
