"""A simulated model server in real time: one timer for all requests, and an inbox of tokens for each."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from engine.reference import EventKind, ServerEvent, SteppedModelServer


class Timer(Protocol):
    """A scheduled call, as an event loop's call_at returns it."""

    def cancel(self) -> None:
        """Cancel the scheduled call: its callback is not called any more."""


class Clock(Protocol):
    """The part of an event loop that keeps time."""

    def time(self) -> float:
        """Return the clock's time in seconds."""

    def call_at(self, when: float, callback: Callable[[], None], /) -> Timer:
        """Call the callback when the clock shows `when` seconds; return a timer that can cancel that."""


class Pacer:
    """Runs a SteppedModelServer in real time: each request's callback is called when its tokens are due.

    There is one timer, at the end of the step under way; none when idle. Belongs to the loop's thread.
    """

    def __init__(self, server: SteppedModelServer, clock: Clock) -> None:
        """Make a pacer that runs this simulated server, without requests yet, by that clock."""
        self.server = server
        self._clock = clock
        self._callbacks: dict[str, Callable[[int], None]] = {}
        self._timer: Timer | None = None
        self._due: float | None = None

    def submit(
        self, id: str, prompt_tokens: int, output_tokens: int, callback: Callable[[int], None]
    ) -> None:
        """Submit a request to the simulated server; callback(tokens) is called as its tokens are made.

        Raises ValueError as SteppedModelServer does.
        """
        events = self.server.submit(id, prompt_tokens, output_tokens, self._clock.time())
        self._callbacks[id] = callback
        self._deliver(events)

    def cancel(self, id: str) -> bool:
        """Remove a request from the simulated server; return whether it was still under way."""
        there = self._callbacks.pop(id, None) is not None
        if there:
            self._deliver(self.server.cancel(id, self._clock.time()))
        return there

    def _wake(self) -> None:
        due, self._timer, self._due = self._due, None, None
        # uvloop rounds to milliseconds, so a timer can come a little before its time.
        self._deliver(self.server.advance(max(self._clock.time(), due or 0.0)))

    def _deliver(self, events: list[ServerEvent]) -> None:
        due = self.server.next_event()
        if due != self._due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None if due is None else self._clock.call_at(due, self._wake)
            self._due = due
        for event in events:
            if event.kind is EventKind.FINISHED:
                callback = self._callbacks.pop(event.id, None)
            elif event.kind is EventKind.TOKENS:
                callback = self._callbacks.get(event.id)
            else:
                continue
            if callback is not None:
                callback(event.tokens)


class TokenInbox:
    """Tokens of one request's answers that are due and not sent yet; one task reads them.

    patient: wake the reader with the last token only.
    """

    def __init__(self, tokens: int, *, patient: bool) -> None:
        """Make an empty inbox. tokens: how many are to come, for all answers of the request together."""
        self._left = tokens
        self._gone = False
        self._patient = patient
        self._came: list[tuple[int, int]] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, tokens: int) -> None:
        """Add tokens of the answer number `index`."""
        self._came.append((index, tokens))
        self._left -= tokens
        if not self._patient or not self._left:
            self._wake()

    def leave(self) -> None:
        """Note that the client has gone, so that the reader stops waiting for tokens."""
        self._gone = True
        self._wake()

    async def take(self) -> list[tuple[int, int]]:
        """Wait for new tokens and return them as (answer number, tokens); empty when the client has gone."""
        while not self._gone and ((self._patient and self._left) or not self._came):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        came, self._came = self._came, []
        return [] if self._gone else came

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
