"""Which instance has read which prefix lately, by hashes that reveal nothing of it.

A client sends salted hashes of its prompt's first blocks: the i-th stands for the first i + 1 blocks of
AFFINITY_BLOCK_TOKENS. An instance that has served a hash has the KV memory of that prefix until it needs the
room, so of a prompt whose first k hashes it has served

    TRUST * k * AFFINITY_BLOCK_TOKENS

need not be read there. What is trusted is less than all, because what an instance has thrown away is not
known here; a session key gets most of the gain (dispatch-study.md).

Bounded: the MOST hashes that were served last, HOLDERS instances each.
"""

from collections import OrderedDict
from collections.abc import Sequence

from dispatch.types import AFFINITY_BLOCK_TOKENS

MOST, HOLDERS = 200_000, 4
"""Hashes kept, about 300 bytes each, and instances for each: the last that served it."""

TRUST = 0.8
"""Of a prefix that an instance has served; a first study took 0.6 with one key for a whole session."""


class Prefixes:
    """Who has served what."""

    def __init__(self, most: int = MOST) -> None:
        """Nobody has served anything. most: hashes kept."""
        self._most = most
        self._holders: OrderedDict[str, tuple[int, ...]] = OrderedDict()

    def __len__(self) -> int:
        """Hashes kept."""
        return len(self._holders)

    def served(self, hashes: Sequence[str], instance_id: int) -> None:
        """The instance is given a request with these prefixes."""
        for key in hashes:
            before = self._holders.pop(key, ())
            self._holders[key] = (instance_id, *[i for i in before if i != instance_id][: HOLDERS - 1])
        while len(self._holders) > self._most:
            self._holders.popitem(last=False)

    def forget(self, instance_id: int) -> None:
        """The instance has rebooted or is gone: what it had served is lost."""
        for key, holders in list(self._holders.items()):
            if instance_id in holders:
                rest = tuple(i for i in holders if i != instance_id)
                if rest:
                    self._holders[key] = rest
                else:
                    del self._holders[key]

    def holders(self, hashes: Sequence[str]) -> tuple[int, ...]:
        """The instances that have served the longest of these prefixes, the last first."""
        for key in reversed(hashes):
            found = self._holders.get(key)
            if found:
                return found
        return ()

    def cached_tokens(self, hashes: Sequence[str], instance_id: int) -> float:
        """Tokens of the prompt that the instance need not read, as far as can be known."""
        for n in range(len(hashes), 0, -1):
            if instance_id in self._holders.get(hashes[n - 1], ()):
                return TRUST * n * AFFINITY_BLOCK_TOKENS
        return 0.0
