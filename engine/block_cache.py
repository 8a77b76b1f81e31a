"""The prefix cache of engine/reference.py's model server: which blocks of tokens lie in KV memory."""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence

from engine.server_job import ServerJob


class BlockCache:
    """Blocks in KV memory: pinned by running requests, and the others, least recently used first."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._pins: Counter[Hashable] = Counter()
        self._loose: OrderedDict[Hashable, None] = OrderedDict()

    def prefix(self, blocks: Sequence[Hashable]) -> int:
        """Return how many of these blocks are cached, counted from the first up to the first that is not."""
        for n, block in enumerate(blocks):
            if block not in self._loose and block not in self._pins:
                return n
        return len(blocks)

    def admit(self, job: ServerJob) -> int:
        """Pin the cached blocks of a request.

        Return the tokens that need not be read (its last one always must).
        """
        there = min(self.prefix(job.blocks), job.to_read // self.block_tokens)
        self._pin(job, there)
        return min(there * self.block_tokens, job.to_read - 1)

    def keep(self, job: ServerJob) -> None:
        """Pin the blocks of a request that went through the model: all that it holds but its last token."""
        self._pin(job, (job.held - 1) // self.block_tokens)

    def _pin(self, job: ServerJob, upto: int) -> None:
        for block in job.pin(upto):
            self._loose.pop(block, None)
            self._pins[block] += 1

    def unpin(self, job: ServerJob) -> None:
        """Note that a request does not run any more.

        Its last block is dropped first, being useless without those before.
        """
        for block in reversed(job.unpin()):
            self._pins[block] -= 1
            if not self._pins[block]:
                del self._pins[block]
                self._loose[block] = None

    def shrink(self, room_tokens: int) -> None:
        """Drop the least recently used blocks that no request has pinned, until the rest fits that room."""
        most = max(0, room_tokens) // self.block_tokens
        while len(self._loose) > most:
            self._loose.popitem(last=False)
