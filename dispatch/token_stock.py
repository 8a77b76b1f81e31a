"""The single-use tokens of one instance that wait to be leased; those of the oldest batch go first."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

TOKEN_SHARE = 0.8
"""A token is leased in this first part of its life only, so that the client has the rest."""

RENEW_SHARE = 0.7
"""After this part of the newest tokens' life new ones are fetched: an idle instance never runs dry."""


@dataclass(slots=True, eq=False)
class Batch:
    """Tokens that were fetched together. until: they are leased no longer."""

    tokens: list[str]
    until: float
    expires_at: float


class Stock:
    """The tokens of one instance."""

    def __init__(self) -> None:
        self._batches: deque[Batch] = deque()
        self.size = 0
        self.renew_at = math.inf
        self.old_at = math.inf  # from then on its oldest batch is not to be given

    def add(self, tokens: Sequence[str], expires_in_s: float, now: float) -> None:
        if tokens:
            until = now + TOKEN_SHARE * expires_in_s
            self._batches.append(Batch(list(tokens), until, now + expires_in_s))
            self.size += len(tokens)
            self.renew_at = now + RENEW_SHARE * expires_in_s
            self.old_at = self._batches[0].until

    def take(self, now: float) -> tuple[str, Batch] | None:
        self.drop_old(now)
        if not self._batches:
            return None
        batch = self._batches[0]
        self.size -= 1
        token = batch.tokens.pop()
        if not batch.tokens:
            self._drop()
        return token, batch

    def take_some(self, count: int, now: float) -> list[tuple[str, Batch]]:
        """So many, or as many as there are."""
        self.drop_old(now)
        out: list[tuple[str, Batch]] = []
        while self._batches and len(out) < count:
            batch = self._batches[0]
            few = count - len(out)
            out += [(token, batch) for token in reversed(batch.tokens[-few:])]
            del batch.tokens[-few:]
            if not batch.tokens:
                self._drop()
        self.size -= len(out)
        return out

    def give_back(self, token: str, batch: Batch) -> None:
        if not batch.tokens:
            self._batches.appendleft(batch)
            self.old_at = batch.until
        batch.tokens.append(token)
        self.size += 1

    def drop_old(self, now: float) -> None:
        while self.old_at <= now:
            self.size -= len(self._drop().tokens)

    def _drop(self) -> Batch:
        """The oldest batch goes."""
        gone = self._batches.popleft()
        self.old_at = self._batches[0].until if self._batches else math.inf
        return gone

    def clear(self) -> None:
        self._batches.clear()
        self.size, self.old_at = 0, math.inf

    def fresh(self, now: float) -> int:
        """How many there are; none when they are to be renewed, although they are still good."""
        return self.size if now < self.renew_at else 0
