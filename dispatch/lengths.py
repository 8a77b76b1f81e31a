"""How many tokens a request is still going to be answered with, learned from those that have ended.

What counts is not the mean but the mean of those that have come this far,

    E[O - g | O > g] = sum over completions with O > g of (O - g) / how many they are

because long answers are what is left of the running ones: with the plain mean the first token came 1.9 times
later (dispatch-study.md). And it is the mean of requests *like this one*: the length of the prompt and how
many tokens were allowed are known, and programs send prompts of about one length for answers of about one
length. Quarter octaves of the prompt alone explain 73 % of the variance of Azure's conversation log and 64 %
of ServeGen's m-small, 2 % of Mooncake's and nothing of Azure's code log (2026-11, this file's own bins).

    kind (prompt, max_tokens) ◄─ PRIOR completions of ─ all with such max_tokens ◄─ PRIOR of ─ what was told

Completions are counted in bins that are 15 % wide; what was told is taken to have no memory. Lengths are in
tokens.
"""

import math

import numpy as np

from compiled import njit
from dispatch.forward import KIND, LEFT, MADE, MOST, Floats

PRIOR = 10.0
"""What is known of less particular requests counts like so many completions."""

MEMORY = 1000.0
"""Completions of about this number make up what is learned: minutes of traffic of a small fleet."""

KINDS = 1024
"""Kinds that are told apart; what comes after them counts as the first, of which nothing is known."""

OCTAVE = 4
"""Kinds of prompts to a doubling."""

BINS, STEPS = 96, 5.0
"""So many bins, so many to a doubling: up to 2**19 tokens, each 15 % longer than the one before."""

NEWS = 16
"""Completions after which a kind's table is made anew: it costs 20 µs."""


class Lengths:
    """What has been learned. told: the mean that is expected before anything has ended."""

    def __init__(self, told: float) -> None:
        """Nothing has ended yet."""
        self.told = told
        self.completions = 0
        self._kinds: dict[tuple[int, int], int] = {(-1, -1): 0}
        self._parents = [0]
        self._count = np.zeros((KINDS, BINS))
        self._sum = np.zeros((KINDS, BINS))
        self._n = [0.0] * KINDS
        self._total = [0.0] * KINDS
        self._news = [0] * KINDS
        self._scale = [1.0] * KINDS  # a completion of now counts so much in _count and _sum
        self._alive = np.ones((KINDS, BINS))  # share of its completions that come so far
        self.table = np.full((KINDS, BINS), told)
        """Tokens to come, by kind and bin of those made."""
        self._make(0)

    def tell(self, told: float) -> None:
        """Another mean is expected where nothing is known."""
        self.told = told
        for kind in range(len(self._parents)):
            self._make(kind)

    def kind(self, prompt_tokens: float, max_tokens: int | None) -> int:
        """The kind of such a request. prompt_tokens 0: not known."""
        bits = -1 if max_tokens is None else max_tokens.bit_length()
        size = -1 if prompt_tokens <= 0 else int(math.log2(prompt_tokens + 1.0) * OCTAVE)
        found = self._kinds.get((bits, size))
        if found is None:
            parent = 0 if size < 0 else self.kind(0, max_tokens)
            if len(self._parents) == KINDS:
                return parent
            found = self._kinds[(bits, size)] = len(self._parents)
            self._parents.append(parent)
            self._make(found)
        return found

    def ended(self, tokens: int, kind: int) -> None:
        """A request of that kind was answered with so many."""
        self.completions += 1
        keep = 1.0 - 1.0 / MEMORY
        place = _bin(float(tokens))
        while True:
            self._n[kind] = self._n[kind] * keep + 1.0
            self._total[kind] = self._total[kind] * keep + tokens
            # What is new counts more instead of all that is old less: that would be 2 * BINS multiplications.
            scale = self._scale[kind] / keep
            if scale > 1e9:
                self._count[kind] /= scale
                self._sum[kind] /= scale
                scale = 1.0
            self._scale[kind] = scale
            self._count[kind, place] += scale
            self._sum[kind, place] += scale * tokens
            self._news[kind] += 1
            if self._news[kind] >= NEWS or self._n[kind] < NEWS:
                self._make(kind)
            if kind == 0:
                break
            kind = self._parents[kind]

    def mean(self, kind: int, max_tokens: int | None = None) -> float:
        """Tokens that one of that kind is expected to be answered with, that may have so many."""
        most = math.inf if max_tokens is None else float(max_tokens)
        prior = min(most, self.told) if kind == 0 else self.mean(self._parents[kind], max_tokens)
        return min(most, (PRIOR * prior + self._total[kind]) / (PRIOR + self._n[kind]))

    def _make(self, kind: int) -> None:
        self._news[kind] = 0
        # Of those in longer bins all, of those in the same one the half that is longer.
        count, total = self._count[kind] / self._scale[kind], self._sum[kind] / self._scale[kind]
        later = count[::-1].cumsum()[::-1] - 0.5 * count
        tokens = total[::-1].cumsum()[::-1] - 0.5 * total
        if kind == 0:
            alive, left = np.exp(-_EDGES / self.told), np.full(BINS, self.told)
        else:
            alive, left = self._alive[self._parents[kind]], self.table[self._parents[kind]]
        more = np.maximum(tokens - _EDGES * later, 0.0) + PRIOR * alive * left
        self.table[kind] = np.maximum(1.0, more / np.maximum(later + PRIOR * alive, 1e-12))
        self._alive[kind] = (later + PRIOR * alive) / (self._n[kind] + PRIOR)


_EDGES = np.exp2(np.arange(BINS) / STEPS) - 1.0


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
