"""TODO: say what this is."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from engine.reference import Event, Kind, ModelServer

# -- in time ---------------------------------------------------------------------------------------------


class Timer(Protocol):
    """What call_at gives."""

    def cancel(self) -> None:
        """It will not be called."""


class Clock(Protocol):
    """What is needed of an event loop to keep time."""

    def time(self) -> float:
        """Seconds."""

    def call_at(self, when: float, callback: Callable[[], None], /) -> Timer:
        """Call it then."""


class Pacer:
    """A ModelServer in real time: whoever submits is told of its tokens when they are due.

    One timer, at the end of the step under way; none when idle. Belongs to the loop's thread.
    """

    def __init__(self, server: ModelServer, clock: Clock) -> None:
        """Idle."""
        self.server = server
        self._clock = clock
        self._told: dict[str, Callable[[int], None]] = {}
        self._timer: Timer | None = None
        self._due: float | None = None

    def submit(self, id: str, prompt_tokens: int, output_tokens: int, told: Callable[[int], None]) -> None:
        """told(tokens) is called for all its tokens, in steps. Raises ValueError as ModelServer does."""
        events = self.server.submit(id, prompt_tokens, output_tokens, self._clock.time())
        self._told[id] = told
        self._deliver(events)

    def cancel(self, id: str) -> bool:
        """It is told nothing more, and its work is freed now. Whether there was any left."""
        there = self._told.pop(id, None) is not None
        if there:
            self._deliver(self.server.cancel(id, self._clock.time()))
        return there

    def _wake(self) -> None:
        due, self._timer, self._due = self._due, None, None
        # uvloop rounds to milliseconds, so a timer can come a little before its time.
        self._deliver(self.server.advance(max(self._clock.time(), due or 0.0)))

    def _deliver(self, events: list[Event]) -> None:
        due = self.server.next_event()
        if due != self._due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None if due is None else self._clock.call_at(due, self._wake)
            self._due = due
        for event in events:
            if event.kind is Kind.FINISHED:
                told = self._told.pop(event.id, None)
            elif event.kind is Kind.TOKENS:
                told = self._told.get(event.id)
            else:
                continue
            if told is not None:
                told(event.tokens)


class _News:
    """Tokens of one request's answers that have come and were not sent yet; one reader.

    patient: the reader wants to be woken by the last token only.
    """

    def __init__(self, lengths: Sequence[tuple[int, str]], *, patient: bool) -> None:
        self.lengths = lengths
        self.left = sum(tokens for tokens, _ in lengths)
        self.gone = False
        self._patient = patient
        self._came: list[tuple[int, int]] = []
        self._waiter: asyncio.Future[None] | None = None

    def tell(self, index: int, tokens: int) -> None:
        self._came.append((index, tokens))
        self.left -= tokens
        if not self._patient or not self.left:
            self._wake()

    def leave(self) -> None:
        """The client has gone."""
        self.gone = True
        self._wake()

    async def take(self) -> list[tuple[int, int]]:
        """(choice, tokens) that came since the last time; empty when the client has gone."""
        while not self.gone and ((self._patient and self.left) or not self._came):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        came, self._came = self._came, []
        return [] if self.gone else came

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
