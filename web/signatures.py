"""What instances say by themselves: who said it, and that it counts once. No I/O, no clock.

    Authorization: Fleet <name>:<HMAC-SHA256 of "path body", hex>

An instance signs with what it has of its master token, the SHA-256; its name is a hash of that, and tells
nothing. Each message has the id of its boot and a number that grows within it, so one that was heard before
is refused, whatever the clocks say. remote/speaker.py is the other end.
"""

import functools
import hashlib
import hmac
import re
from collections.abc import Mapping

_HEADER = re.compile(r"Fleet ([0-9a-f]{16}):([0-9a-f]{64})")

OLD_BOOTS = 64
"""Boots of an instance that are remembered to be over."""


def instance_key(master_token: str) -> str:
    """What an instance has of its master token (fleet/outside/start_script.py), hex."""
    return hashlib.sha256(master_token.encode()).hexdigest()


@functools.lru_cache(maxsize=16_384)
def name_and_key(master_token: str) -> tuple[str, str]:
    """What an instance with that master token calls itself, and what it signs with."""
    key = instance_key(master_token)
    return hashlib.sha256(key.encode()).hexdigest()[:16], key


def signer(authorization: str | None, path: str, raw: bytes, keys: Mapping[str, str]) -> str | None:
    """The name of who signed this body for this path, of those whose keys are given; None for nobody."""
    found = _HEADER.fullmatch(authorization or "")
    key = keys.get(found[1]) if found else None
    if found is None or key is None:
        return None
    wanted = hmac.new(key.encode(), path.encode() + b" " + raw, hashlib.sha256).hexdigest()
    return found[1] if hmac.compare_digest(wanted, found[2]) else None


class ReplayGuard:
    """What was heard of one instance: its boot, the number of its last message, and the boots before."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._boot_id: str | None = None
        self._number = -1
        self._old: dict[str, None] = {}

    def accept(self, boot_id: str, number: int) -> bool:
        """Whether the message was not heard before; it counts as heard from now on."""
        if boot_id in self._old or (boot_id == self._boot_id and number <= self._number):
            return False
        if boot_id != self._boot_id and self._boot_id is not None:
            self._old[self._boot_id] = None
            if len(self._old) > OLD_BOOTS:
                del self._old[next(iter(self._old))]
        self._boot_id, self._number = boot_id, number
        return True
