"""One request in the model server of engine/reference.py: what it holds, has read and has made."""

from collections.abc import Hashable, Sequence


class ServerJob:
    """A request in a model server.

    held: KV tokens it has. unread: tokens to read, of its prompt, and of its own answer after a preemption.
    While it makes tokens, `since` is the count of steps at which it began, and made and held are what they
    were then. place: the number of its admission; an entry of the heap with another place is void. blocks:
    the ids of its blocks. pinned: how many of them are in the cache because it runs.
    """

    __slots__ = ("blocks", "held", "id", "made", "pinned", "place", "prompt", "since", "unread", "wanted")

    def __init__(self, id: str, prompt: int, wanted: int, blocks: Sequence[Hashable] = ()) -> None:
        self.id = id
        self.prompt = prompt
        self.wanted = wanted
        self.made = 0
        self.unread = 0
        self.held = 0
        self.since = -1
        self.place = -1
        self.blocks = blocks
        self.pinned = 0

    @property
    def to_read(self) -> int:
        """Tokens that the request must read when it is admitted: its prompt, and what it has made before."""
        return self.prompt + self.made

    def admit(self, place: int, cached: int) -> None:
        """Reserve KV memory for what it has and for the token that reading gives.

        Cached tokens are not read.
        """
        self.place = place
        self.held = self.to_read + 1
        self.unread = self.to_read - cached

    def squares(self, tokens: int) -> int:
        """Return t² - s² for the next `tokens` of the prompt that are read, from position s to t."""
        read = self.held - 1 - self.unread
        return (read + tokens) ** 2 - read**2

    def read(self, tokens: int) -> bool:
        """Read so many tokens; return whether the prompt is read whole, which gives a token."""
        self.unread -= tokens
        self.made += not self.unread
        return not self.unread

    def begin_tokens(self, count: int) -> int:
        """Begin to make tokens at that count of steps; return the count at which the last one is made."""
        self.since = count
        return count + self.wanted - self.made

    def leave(self, count: int) -> bool:
        """Stop to make tokens at that count of steps; return whether it was making any."""
        self.place = -1
        if self.since < 0:
            return False
        self.made += count - self.since
        self.held += count - self.since
        self.since = -1
        return True

    def put_back(self) -> None:
        """Give up the KV memory (preemption): everything must be read again."""
        self.held = self.unread = 0

    def pin(self, upto: int) -> Sequence[Hashable]:
        """Note that its first `upto` blocks are pinned in the cache; return those that were not before."""
        new = self.blocks[self.pinned : upto]
        self.pinned = max(self.pinned, upto)
        return new

    def unpin(self) -> Sequence[Hashable]:
        """Note that none of its blocks is pinned any more; return those that were."""
        had, self.pinned = self.blocks[: self.pinned], 0
        return had
