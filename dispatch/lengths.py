"""How many tokens a request is still going to be answered with, learned from those that have ended.

What counts is not the mean but the mean of those that have come this far,

    E[O - g | O > g] = sum over completions with O > g of (O - g) / how many they are

because long answers are what is left of the running ones: with the plain mean the first token came 1.9 times
later (dispatch-study.md). Completions are counted in bins, g in geometric ones; what was told is a prior of
PRIOR completions with lengths that have no memory. Requests that were allowed about as many tokens are a kind
of their own.

Lengths are in tokens.
"""

import math

import numpy as np

from compiled import njit
from dispatch.forward import KIND, LEFT, MADE, MOST, Floats

PRIOR = 20.0
"""What was told counts like so many completions."""

MEMORY = 1000.0
"""Completions of about this number make up what is learned: minutes of traffic of a small fleet."""

KINDS = 25
"""Of max_tokens, by its bits; 0 where it was not said."""

BINS, STEPS = 96, 5.0
"""So many bins, so many to a doubling: up to 2**19 tokens, each 15 % longer than the one before."""

NEWS = 16
"""Completions after which the table is made anew: it costs 20 µs."""


def kind_of(max_tokens: int | None) -> int:
    """The kind of a request that may have so many."""
    return 0 if max_tokens is None else min(KINDS - 1, max_tokens.bit_length())


class Lengths:
    """What has been learned. told: the mean that is expected before anything has ended."""

    def __init__(self, told: float) -> None:
        """Nothing has ended yet."""
        self.told = told
        self._count = np.zeros((KINDS, BINS))
        self._sum = np.zeros((KINDS, BINS))
        self._means: dict[int, tuple[float, float]] = {}
        self._news = [0] * KINDS
        self.table = np.full((KINDS, BINS), told)
        """Tokens to come, by kind and bin of those made."""

    def tell(self, told: float) -> None:
        """Another mean is expected where nothing is known."""
        self.told = told
        for kind in range(KINDS):
            self._make(kind)

    def ended(self, tokens: int, max_tokens: int | None) -> None:
        """A request was answered with so many."""
        kind, keep = kind_of(max_tokens), 1.0 - 1.0 / MEMORY
        n, total = self._means.get(kind, (0.0, 0.0))
        self._means[kind] = (n * keep + 1.0, total * keep + tokens)
        place = _bin(float(tokens))
        self._count[kind] *= keep
        self._sum[kind] *= keep
        self._count[kind, place] += 1.0
        self._sum[kind, place] += tokens
        self._news[kind] += 1
        if self._news[kind] >= NEWS or n < NEWS:
            self._make(kind)

    def mean(self, max_tokens: int | None) -> float:
        """Tokens that one is expected to be answered with that may have so many."""
        most = math.inf if max_tokens is None else float(max_tokens)
        n, total = self._means.get(kind_of(max_tokens), (0.0, 0.0))
        prior = min(most, self.told)
        return min(most, (PRIOR * prior + total) / (PRIOR + n))

    @property
    def overall(self) -> float:
        """Tokens that one is expected to be answered with of which nothing is known."""
        n = sum(n for n, _ in self._means.values())
        return (PRIOR * self.told + sum(total for _, total in self._means.values())) / (PRIOR + n)

    @property
    def known(self) -> bool:
        """Whether anything has ended."""
        return bool(self._means)

    def _make(self, kind: int) -> None:
        self._news[kind] = 0
        edges = np.exp2(np.arange(BINS) / STEPS) - 1.0
        # Of those in longer bins all, of those in the same one the half that is longer.
        later = self._count[kind, ::-1].cumsum()[::-1] - 0.5 * self._count[kind]
        tokens = self._sum[kind, ::-1].cumsum()[::-1] - 0.5 * self._sum[kind]
        alive = PRIOR * np.exp(-edges / self.told)
        more = np.maximum(tokens - edges * later, 0.0) + alive * self.told
        self.table[kind] = np.maximum(1.0, more / np.maximum(later + alive, 1e-12))


@njit
def _bin(tokens: float) -> int:
    place = int(np.log2(tokens + 1.0) * STEPS)
    return place if place < BINS else BINS - 1


@njit
def expect(rows: Floats, count: int, table: Floats) -> None:
    """The first `count` rows are expected to make as many more as others did that had come as far."""
    for i in range(count):
        made = rows[i, MADE]
        left = table[int(rows[i, KIND]), _bin(made)]
        if made + left > rows[i, MOST]:
            left = rows[i, MOST] - made
        rows[i, LEFT] = left if left > 1.0 else 1.0
