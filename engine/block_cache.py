"""The prefix cache of the model server of engine/reference.py: which blocks of tokens are in KV memory."""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence

from engine.server_job import ServerJob


class BlockCache:
    """Blocks whose KV memory is there: those that running requests pin, and the others, the oldest first."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._pins: Counter[Hashable] = Counter()
        self._loose: OrderedDict[Hashable, None] = OrderedDict()

    def prefix(self, blocks: Sequence[Hashable]) -> int:
        """Return how many of them, from the first on, are there."""
        for n, block in enumerate(blocks):
            if block not in self._loose and block not in self._pins:
                return n
        return len(blocks)

    def admit(self, job: ServerJob) -> int:
        """Pin what is there of a request; return its tokens that need not be read: never its last one."""
        there = min(self.prefix(job.blocks), job.to_read // self.block_tokens)
        self._pin(job, there)
        return min(there * self.block_tokens, job.to_read - 1)

    def keep(self, job: ServerJob) -> None:
        """Pin what has gone through the model: all that it holds but its last token."""
        self._pin(job, (job.held - 1) // self.block_tokens)

    def _pin(self, job: ServerJob, upto: int) -> None:
        for block in job.pin(upto):
            self._loose.pop(block, None)
            self._pins[block] += 1

    def unpin(self, job: ServerJob) -> None:
        """Forget that it runs; the end of a prefix is of no use without its begin, so it is dropped first."""
        for block in reversed(job.unpin()):
            self._pins[block] -= 1
            if not self._pins[block]:
                del self._pins[block]
                self._loose[block] = None

    def shrink(self, room_tokens: int) -> None:
        """Drop the oldest blocks that no request has, until they fit that room."""
        most = max(0, room_tokens) // self.block_tokens
        while len(self._loose) > most:
            self._loose.popitem(last=False)
