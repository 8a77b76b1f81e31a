"""How long the steps of one instance take: what was told, corrected by what its reports show.

Between two reports of an instance that was busy all the time,

    seconds = a * steps + b * tokens made + c * (context of each step) + (d - a)+ * steps that read
              + e * tokens read + f * (their squares)

where steps = tokens made / requests running. Each constant is what was told times a factor; the factors are
followed by a Kalman filter from (1, sd SPREAD) on: what a mix of requests cannot tell apart stays in the
ratio that was told, and need not be told apart for that mix. An error of 30 % costs 14 % of first token, one
set of constants for all machines half of the whole latency (dispatch-study.md).
"""

import numpy as np

from engine.forward import (
    COL_BASE_S,
    COL_CONTEXT_S,
    COL_PREFILL_S,
    COL_PROMPT_S,
    COL_REQUEST_S,
    COL_SQUARE_S,
    COL_STEP_TOKENS,
    STEP_TIMES,
    Floats,
    constants,
)
from engine.timing import Timing

SPREAD = 0.3
"""A told constant is believed to be within so much of the true one."""

NOISE_S, NOISE = 0.1, 0.06
"""Of a span: its ends are not the ends of steps; the requests that run are counted at its ends only."""

DRIFT = 0.001
"""A factor may change by so much from span to span: a neighbour on the machine, another version."""

RANGE = 3.0
"""A factor stays within this ratio of what was told: a wrong counter must not spoil everything."""

SPAN_S = 4.0
"""A span is at least so long: steps that read long prompts take up to half a second."""


class Pace:
    """The constants of one instance. `constants` is the server's table for engine/forward.py."""

    def __init__(self, told: Timing) -> None:
        """As told."""
        self.told = told
        self.constants = constants(told)
        self.spans = 0
        self._base = self.constants.copy()
        self._factors = np.ones(6)
        self._cov = np.eye(6) * SPREAD**2

    @property
    def factors(self) -> Floats:
        """Of a to f, to what was told."""
        return self._factors.copy()

    def observe(self, span: "Span", made: int, read: int, prompt: float, squares: float) -> None:
        """A span has ended with these totals. prompt, squares: a usual prompt's tokens and mean square.

        Too short a span, or one in which no token was made, says nothing.
        """
        tokens, reads = float(made - span.made), float(read - span.read)
        seconds = span.at - span.from_s
        if seconds < SPAN_S or tokens <= 0.0:
            return
        base = self._base
        running, context = span.means()
        steps = tokens / running
        x = np.empty(6)
        x[0] = base[COL_BASE_S] * steps
        x[1] = base[COL_REQUEST_S] * tokens
        x[2] = base[COL_CONTEXT_S] * context * steps
        x[3] = max(0.0, base[COL_PREFILL_S] - base[COL_BASE_S]) * max(
            reads / max(prompt, 1.0), reads / base[COL_STEP_TOKENS]
        )
        x[4] = base[COL_PROMPT_S] * reads
        x[5] = base[COL_SQUARE_S] * squares * reads / max(prompt, 1.0)
        self._cov += np.eye(6) * DRIFT**2
        off = seconds - x @ self._factors
        gain = self._cov @ x
        gain /= x @ gain + NOISE_S**2 + (NOISE * seconds) ** 2
        self._factors = np.clip(self._factors + gain * off, 1.0 / RANGE, RANGE)
        self._cov -= np.outer(gain, x @ self._cov)
        self.spans += 1
        self.constants[STEP_TIMES] = base[STEP_TIMES] * self._factors


class Span:
    """A time in which an instance was busy, from report to report."""

    def __init__(self, now: float, running: float, context: float, made: int, read: int) -> None:
        """It begins with a report of so many requests that make tokens, their KV tokens, and these totals."""
        self.from_s = self.at = now
        self.made = made
        self.read = read
        self._running, self._context = running, context
        self._sums = 0.0, 0.0

    def goes_on(self, now: float, made: int, read: int) -> bool:
        """Whether the next report is of the same time: none is missing, the engine has not begun anew."""
        return made >= self.made and read >= self.read and now - self.at <= SPAN_S

    def take(self, now: float, running: float, context: float) -> None:
        """The next report; between two what it says is taken to have changed evenly."""
        half = 0.5 * (now - self.at)
        self._sums = (
            self._sums[0] + half * (running + self._running),
            self._sums[1] + half * (context + self._context),
        )
        self.at, self._running, self._context = now, running, context

    def means(self) -> tuple[float, float]:
        """(requests that make tokens, their KV tokens), on average over time."""
        seconds = max(self.at - self.from_s, 1e-9)
        return self._sums[0] / seconds, self._sums[1] / seconds
