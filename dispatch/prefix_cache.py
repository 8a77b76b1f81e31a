"""Which instance has read which prefix lately, by hashes that reveal nothing of it.

A client sends salted hashes of its prompt's first blocks: the i-th stands for the first i + 1 blocks of
AFFINITY_BLOCK_TOKENS. An instance that has served a hash has the KV memory of that prefix until it needs the
room, so of a prompt whose first k hashes it has served

    TRUST * k * AFFINITY_BLOCK_TOKENS

need not be read there. What is trusted is less than all, because what an instance has thrown away is not
known here; a session key gets most of the gain (dispatch-study.md).

An instance is known here by the number of its memory, which is another after a reboot: what it had served is
lost then, and nothing need be looked for. Bounded: the MOST hashes served last, HOLDERS memories each.
"""

from collections import OrderedDict
from collections.abc import Sequence

from dispatch.types import AFFINITY_BLOCK_TOKENS

MOST, HOLDERS = 200_000, 4
"""Hashes kept, about 300 bytes each, and memories for each: the last that served it."""

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

    def served(self, hashes: Sequence[str], memory: int) -> None:
        """The instance with that memory is given a request with these prefixes."""
        for key in hashes:
            before = self._holders.pop(key, ())
            self._holders[key] = (memory, *[i for i in before if i != memory][: HOLDERS - 1])
        while len(self._holders) > self._most:
            self._holders.popitem(last=False)

    def holders(self, hashes: Sequence[str]) -> tuple[int, ...]:
        """The memories that have served the longest of these prefixes, the last first."""
        for key in reversed(hashes):
            found = self._holders.get(key)
            if found:
                return found
        return ()

    def cached_tokens(self, hashes: Sequence[str], memory: int) -> float:
        """Tokens of the prompt that the instance need not read, as far as can be known."""
        for n in range(len(hashes), 0, -1):
            if memory in self._holders.get(hashes[n - 1], ()):
                return TRUST * n * AFFINITY_BLOCK_TOKENS
        return 0.0
