"""A model server in real time: one timer for all requests, and an inbox of tokens for each."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from engine.reference import EventKind, ServerEvent, SteppedModelServer


class Timer(Protocol):
    """What an event loop's call_at returns."""

    def cancel(self) -> None:
        """Do not call the callback any more."""


class Clock(Protocol):
    """The part of an event loop that keeps time."""

    def time(self) -> float:
        """Return the time in seconds."""

    def call_at(self, when: float, callback: Callable[[], None], /) -> Timer:
        """Call the callback at that time."""


class Pacer:
    """Runs a SteppedModelServer in real time: each request's callback is called when its tokens are due.

    There is one timer, at the end of the step under way; none when idle. Belongs to the loop's thread.
    """

    def __init__(self, server: SteppedModelServer, clock: Clock) -> None:
        """Begin without requests."""
        self.server = server
        self._clock = clock
        self._callbacks: dict[str, Callable[[int], None]] = {}
        self._timer: Timer | None = None
        self._due: float | None = None

    def submit(
        self, id: str, prompt_tokens: int, output_tokens: int, callback: Callable[[int], None]
    ) -> None:
        """Submit a request; callback(tokens) is called for its tokens, step by step.

        Raises ValueError as SteppedModelServer does.
        """
        events = self.server.submit(id, prompt_tokens, output_tokens, self._clock.time())
        self._callbacks[id] = callback
        self._deliver(events)

    def cancel(self, id: str) -> bool:
        """Drop a request: free its work, call its callback no more; return whether any work was left."""
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
    """The tokens of one request's answers that are due and not sent yet; one task reads it.

    patient: wake the reader with the last token only.
    """

    def __init__(self, tokens: int, *, patient: bool) -> None:
        """Begin empty. tokens: of all choices together."""
        self._left = tokens
        self._gone = False
        self._patient = patient
        self._came: list[tuple[int, int]] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, tokens: int) -> None:
        """Add tokens of a choice."""
        self._came.append((index, tokens))
        self._left -= tokens
        if not self._patient or not self._left:
            self._wake()

    def leave(self) -> None:
        """Note that the client has gone."""
        self._gone = True
        self._wake()

    async def take(self) -> list[tuple[int, int]]:
        """Return the new tokens as (choice, tokens); nothing when the client has left."""
        while not self._gone and ((self._patient and self._left) or not self._came):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        came, self._came = self._came, []
        return [] if self._gone else came

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
