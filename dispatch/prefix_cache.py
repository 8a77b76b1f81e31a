"""Which instance has read which prompt prefix lately, by hashes that reveal nothing of the prompt.

A client sends salted hashes of its prompt's first blocks: the i-th stands for the first i + 1 blocks of
AFFINITY_BLOCK_TOKENS. An instance that has served a hash has the KV memory of that prefix until it needs the
room, so of a prompt whose first k hashes it has served

    TRUST * k * AFFINITY_BLOCK_TOKENS

need not be read there. What is trusted is less than all, because what an instance has thrown away is not
known here; a session key gets most of the gain (dispatch-study 9).

The holder of a prefix is the memory of an instance, which is another one after a reboot: the prefixes are
lost then, and nothing need be searched. Bounded: the MOST hashes served last, HOLDERS memories each.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, TypeVar

AFFINITY_BLOCK_TOKENS = 256
"""Prompt tokens behind one hash of a prefix: the cost of reading fewer is not worth a hash."""

MOST, HOLDERS = 200_000, 4
"""Hashes kept, about 300 bytes each, and memories kept for each hash: the last that served it."""

TRUST = 0.8
"""Share of a served prefix that is taken to be in memory still; a first study took 0.6 with one key for a
whole session."""

Memory = TypeVar("Memory")


class PrefixCache(Generic[Memory]):
    """Which KV memories of instances have served which prefixes, by hash of the prefix."""

    def __init__(self, most: int = MOST) -> None:
        """Start empty. most: how many hashes are kept, those served last."""
        self._most = most
        self._holders: OrderedDict[str, tuple[Memory, ...]] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of hashes kept."""
        return len(self._holders)

    def served(self, hashes: Sequence[str], memory: Memory) -> None:
        """Note that a request with these prefixes goes to the instance with that KV memory.

        hashes: of the shortest prefix first.
        """
        for key in hashes:
            before = self._holders.pop(key, ())
            self._holders[key] = (memory, *[i for i in before if i != memory][: HOLDERS - 1])
        while len(self._holders) > self._most:
            self._holders.popitem(last=False)

    def holders(self, hashes: Sequence[str]) -> tuple[Memory, ...]:
        """Return the memories that have served the longest known of these prefixes, the most recent first."""
        for key in reversed(hashes):
            found = self._holders.get(key)
            if found:
                return found
        return ()

    def cached_tokens(self, hashes: Sequence[str], memory: Memory) -> float:
        """Return how many prompt tokens an instance with that memory probably need not read again.

        hashes: of the prompt's prefixes, the shortest first.
        """
        for n in range(len(hashes), 0, -1):
            if memory in self._holders.get(hashes[n - 1], ()):
                return TRUST * n * AFFINITY_BLOCK_TOKENS
        return 0.0
