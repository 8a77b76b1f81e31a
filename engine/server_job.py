"""One request in a simulated model server (engine/reference.py): what it holds, has read and has made."""

from collections.abc import Hashable, Sequence


class ServerJob:
    """One request in a simulated model server.

    held: tokens of KV memory it has. unread: tokens it still has to read, of its prompt, and after a
    preemption of its own answer too. While it makes tokens, `since` is the server's count of steps at which
    it began, and made and held are what they were then. place: the number of its admission; an entry of the
    server's heap of ends with another place is void. blocks: ids of its blocks of tokens, for the prefix
    cache. pinned: how many of these stay in the cache because the request runs.
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
        """Let the request run: reserve KV memory for its tokens and for the one that reading them gives.

        cached: how many of its tokens the prefix cache has; these are not read. place: the number of its
        admission.
        """
        self.place = place
        self.held = self.to_read + 1
        self.unread = self.to_read - cached

    def squares(self, tokens: int) -> int:
        """Return t² - s² for the prompt's next `tokens` tokens, from position s to t.

        The time to read them depends on it.
        """
        read = self.held - 1 - self.unread
        return (read + tokens) ** 2 - read**2

    def read(self, tokens: int) -> bool:
        """Read the request's next `tokens` tokens; return whether all are read, which makes a token."""
        self.unread -= tokens
        self.made += not self.unread
        return not self.unread

    def begin_tokens(self, count: int) -> int:
        """Begin to make tokens at the server's step `count`; return the step that makes the last one."""
        self.since = count
        return count + self.wanted - self.made

    def leave(self, count: int) -> bool:
        """Stop making tokens at the server's step `count`; return whether the request made any."""
        self.place = -1
        if self.since < 0:
            return False
        self.made += count - self.since
        self.held += count - self.since
        self.since = -1
        return True

    def put_back(self) -> None:
        """Give up the request's KV memory (preemption): all its tokens must be read again."""
        self.held = self.unread = 0

    def pin(self, upto: int) -> Sequence[Hashable]:
        """Note that the prefix cache keeps the request's first `upto` blocks; return the new ones."""
        new = self.blocks[self.pinned : upto]
        self.pinned = max(self.pinned, upto)
        return new

    def unpin(self) -> Sequence[Hashable]:
        """Note that the prefix cache keeps no block for this request any more; return those it kept."""
        had, self.pinned = self.blocks[: self.pinned], 0
        return had
