"""How many tokens a request is still going to be answered with, learned from those that have ended.

What counts is not the mean of all answers but the mean of those that have come this far,

    E[O - g | O > g] = sum over completions with O > g of (O - g) / how many they are

because the requests that run are mostly those with long answers: with the plain mean the first token came
1.9 times later (dispatch-study 4). And it is the mean of requests *like this one*: the length of the prompt
and the tokens allowed are known, and programs send prompts of about one length for answers of about one
length. Quarter octaves of the prompt alone explain 73 % of the variance of Azure's conversation log and 64 %
of ServeGen's m-small, 2 % of Mooncake's and nothing of Azure's code log (2026-11, this file's own bins).

    kind (prompt, max_tokens) ◄─ PRIOR completions of ─ all with such max_tokens ◄─ PRIOR of ─ the told mean

What instances say comes here by way of dispatch/agreement.py: one that lies teaches nothing.

Completions are counted in bins that are 15 % wide; the told mean is taken to have no memory. Lengths are in
tokens.
"""

import math

import numpy as np

from engine.forward import KIND, LEFT, MADE, MOST, Floats
from process.compiled import njit

PRIOR = 10.0
"""Completions that the mean of the parent kind counts for."""

MEMORY = 1000.0
"""Completions that make up what is learned: minutes of traffic of a small fleet."""

KINDS = 1024
"""Kinds that are told apart; a new one beyond them counts as its parent."""

OCTAVE = 4
"""Kinds of prompts to a doubling of their length."""

BINS, STEPS = 96, 5.0
"""Bins, and bins to a doubling: up to 2**19 tokens, each 15 % longer than the one before."""

NEWS_MOST = 16
"""Completions after which a kind's table is made anew: it costs 2 µs."""

N, TOTAL, NEWS, SCALE, PARENT, FIGURES = 0, 1, 2, 3, 4, 5
"""Columns of a kind: completions and their tokens, both fading; completions since its table was made; what a
completion counts now in its bins; the number of its parent."""


class OutputLengths:
    """What has been learned of the lengths of answers, by kind of request.

    told: the mean length that is expected before any request has ended, in tokens.
    """

    def __init__(self, told: float) -> None:
        """Know only the mean length of an answer that was told, in tokens."""
        self.told = float(told)  # an int would be compiled for anew, while requests wait
        self.completions = 0
        self._kinds: dict[tuple[int, int], int] = {(-1, -1): 0}
        self._figures = np.zeros((KINDS, FIGURES))
        self._figures[:, SCALE] = 1.0
        self._count = np.zeros((KINDS, BINS))
        self._sum = np.zeros((KINDS, BINS))
        self._alive = np.ones((KINDS, BINS))  # share of its completions that come so far
        self.table = np.full((KINDS, BINS), told)
        """Tokens to come, by kind and bin of those made."""
        self._last: tuple[int, int | None, float] | None = None  # the last mean asked for
        self._make(0)

    def tell(self, told: float) -> None:
        """Change the told mean length of an answer, which is expected where nothing has been learned."""
        self.told = float(told)
        self._last = None
        for kind in range(len(self._kinds)):
            self._make(kind)

    def kind(self, prompt_tokens: float, max_tokens: int | None) -> int:
        """Return the number of the kind of requests with such lengths. prompt_tokens 0: not known."""
        bits = -1 if max_tokens is None else max_tokens.bit_length()
        size = -1 if prompt_tokens <= 0 else int(math.log2(prompt_tokens + 1.0) * OCTAVE)
        found = self._kinds.get((bits, size))
        if found is None:
            parent = 0 if size < 0 else self.kind(0, max_tokens)
            if len(self._kinds) == KINDS:
                return parent
            found = self._kinds[(bits, size)] = len(self._kinds)
            self._figures[found, PARENT] = parent
            self._make(found)
        return found

    def ended(self, tokens: int, kind: int) -> None:
        """Learn from a request of that kind whose answer had so many tokens."""
        self.completions += 1
        self._last = None
        _ended(self._figures, self._count, self._sum, self._alive, self.table, self.told, float(tokens), kind)

    def mean(self, kind: int, max_tokens: int | None = None) -> float:
        """Return the mean length expected of the answer to a request of that kind, in tokens.

        max_tokens: the most that the answer may have.
        """
        last = self._last
        if last is not None and last[0] == kind and last[1] == max_tokens:  # a request is asked about twice
            return last[2]
        found = _mean(self._figures, self.told, kind, math.inf if max_tokens is None else float(max_tokens))
        self._last = kind, max_tokens, found
        return found

    def _make(self, kind: int) -> None:
        _make(self._figures, self._count, self._sum, self._alive, self.table, self.told, kind)


@njit
def _mean(figures: Floats, told: float, kind: int, most: float) -> float:
    """Return the mean length learned of a kind: each mean has that of its parent kind as its prior."""
    mean = min(most, told)
    for i, one in enumerate((0, int(figures[kind, PARENT]), kind)):
        if i == 0 or one > 0:
            mean = min(most, (PRIOR * mean + figures[one, TOTAL]) / (PRIOR + figures[one, N]))
    return mean


@njit
def _ended(
    figures: Floats,
    count: Floats,
    total: Floats,
    alive: Floats,
    table: Floats,
    told: float,
    tokens: float,
    kind: int,
) -> None:
    place, keep = _bin(tokens), 1.0 - 1.0 / MEMORY
    while True:
        own = figures[kind]
        own[N] = own[N] * keep + 1.0
        own[TOTAL] = own[TOTAL] * keep + tokens
        # New completions count more instead of all old ones less: that would be 2 * BINS multiplications.
        own[SCALE] /= keep
        if own[SCALE] > 1e9:
            count[kind] /= own[SCALE]
            total[kind] /= own[SCALE]
            own[SCALE] = 1.0
        count[kind, place] += own[SCALE]
        total[kind, place] += own[SCALE] * tokens
        own[NEWS] += 1.0
        if own[NEWS] >= NEWS_MOST or own[N] < NEWS_MOST:
            _make(figures, count, total, alive, table, told, kind)
        if kind == 0:
            break
        kind = int(own[PARENT])


@njit
def _make(
    figures: Floats, count: Floats, total: Floats, alive: Floats, table: Floats, told: float, kind: int
) -> None:
    own = figures[kind]
    parent = int(own[PARENT])
    own[NEWS] = 0.0
    later = tokens = 0.0
    for i in range(BINS - 1, -1, -1):
        edge = 2.0 ** (i / STEPS) - 1.0
        above = np.exp(-edge / told) if kind == 0 else alive[parent, i]
        left = told if kind == 0 else table[parent, i]
        # All that are in longer bins, and of those in the same bin the half that is longer.
        here, here_tokens = count[kind, i] / own[SCALE], total[kind, i] / own[SCALE]
        some, some_tokens = later + 0.5 * here, tokens + 0.5 * here_tokens
        more = max(some_tokens - edge * some, 0.0) + PRIOR * above * left
        table[kind, i] = max(1.0, more / max(some + PRIOR * above, 1e-12))
        alive[kind, i] = (some + PRIOR * above) / (own[N] + PRIOR)
        later += here
        tokens += here_tokens


@njit
def _bin(tokens: float) -> int:
    place = int(np.log2(tokens + 1.0) * STEPS)
    return place if place < BINS else BINS - 1


@njit
def expect(rows: Floats, table: Floats) -> None:
    """Set LEFT in each row, in place: the tokens still to come, as others made that had come as far.

    table: OutputLengths.table, the tokens to come by kind and bin of those made.
    """
    for i in range(len(rows)):
        made = rows[i, MADE]
        left = table[int(rows[i, KIND]), _bin(made)]
        if made + left > rows[i, MOST]:
            left = rows[i, MOST] - made
        rows[i, LEFT] = left if left > 1.0 else 1.0
