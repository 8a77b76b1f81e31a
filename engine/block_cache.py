"""The prefix cache of engine/reference.py's model server: which blocks of tokens lie in KV memory."""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence

from engine.server_job import ServerJob


class BlockCache:
    """The prefix cache of one model server: blocks of tokens in KV memory.

    A block is pinned while a running request uses it; the others are kept in order of last use, so that the
    least recently used is dropped first.
    """

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._pins: Counter[Hashable] = Counter()
        self._loose: OrderedDict[Hashable, None] = OrderedDict()

    def prefix(self, blocks: Sequence[Hashable]) -> int:
        """Return how many of these blocks are cached, counted up to the first that is not."""
        for n, block in enumerate(blocks):
            if block not in self._loose and block not in self._pins:
                return n
        return len(blocks)

    def admit(self, job: ServerJob) -> int:
        """Pin the cached blocks with which the prompt of a newly admitted request begins.

        Return how many of its tokens the model need not read. The last token must always be read.
        """
        there = min(self.prefix(job.blocks), job.to_read // self.block_tokens)
        self._pin(job, there)
        return min(there * self.block_tokens, job.to_read - 1)

    def keep(self, job: ServerJob) -> None:
        """Cache and pin all blocks of a request that the model has processed.

        Only its last token has been made but not processed, so a block that needs this token is left out.
        """
        self._pin(job, (job.held - 1) // self.block_tokens)

    def _pin(self, job: ServerJob, upto: int) -> None:
        for block in job.pin(upto):
            self._loose.pop(block, None)
            self._pins[block] += 1

    def unpin(self, job: ServerJob) -> None:
        """Unpin the blocks of a request that has stopped running; they stay cached until memory is needed.

        Its last block becomes the first to be dropped, because a block is useless without those before it.
        """
        for block in reversed(job.unpin()):
            self._pins[block] -= 1
            if not self._pins[block]:
                del self._pins[block]
                self._loose[block] = None

    def shrink(self, room_tokens: int) -> None:
        """Drop least recently used unpinned blocks until the unpinned ones fit in `room_tokens` tokens."""
        most = max(0, room_tokens) // self.block_tokens
        while len(self._loose) > most:
            self._loose.popitem(last=False)
