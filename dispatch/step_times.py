"""How long the steps of one instance take: the told constants, corrected by what its reports show.

Between two reports of an instance that was busy all the time,

    seconds = a * steps + b * tokens made + c * (context of each step) + (d - a)+ * steps that read
              + e * tokens read + f * (their squares)

where steps = tokens made / requests running. Each constant is the told one times a factor; the factors are
followed by a Kalman filter that starts at 1 with standard deviation SPREAD. What a mix of requests cannot
tell apart stays in the ratio that was told, and need not be told apart for that mix. An error of 30 % costs
14 % of first token, one set of constants for all machines half of the whole latency (dispatch-study 1).
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
from engine.step_time_constants import Timing

SPREAD = 0.3
"""Relative error of a told constant that is expected at first."""

NOISE_S, NOISE = 0.1, 0.06
"""Measurement noise of a window: fixed (s) and relative. Its ends are not the ends of steps, and running
requests are counted at its reports only."""

DRIFT = 0.001
"""Change of a factor from window to window: a neighbour on the machine, another version."""

RANGE = 3.0
"""Most ratio between a constant and what was told, either way: a wrong counter must not spoil everything."""

WINDOW_S = 4.0
"""Least seconds of a window: steps that read long prompts take up to half a second."""


class BusyWindow:
    """A time in which an instance was busy without a pause, from one load report to a later one."""

    def __init__(self, now: float, running: float, context: float, made: int, read: int) -> None:
        """Begin a window with a load report.

        running: requests that make tokens; context: their KV tokens; made, read: counters of tokens.
        """
        self.from_s = self.at = now
        self.made = made
        self.read = read
        self._running, self._context = running, context
        self._running_s = self._context_s = 0.0

    def goes_on(self, now: float, made: int, read: int) -> bool:
        """Return whether the next report continues the window: none is missing, no counter began anew."""
        return made >= self.made and read >= self.read and now - self.at <= WINDOW_S

    def extend(self, now: float, running: float, context: float) -> None:
        """Extend the window by the next report; figures are taken to change evenly between two reports."""
        half = 0.5 * (now - self.at)
        self._running_s += half * (running + self._running)
        self._context_s += half * (context + self._context)
        self.at, self._running, self._context = now, running, context

    def means(self) -> tuple[float, float]:
        """Return the window's averages over time: (requests that make tokens, their KV tokens)."""
        seconds = max(self.at - self.from_s, 1e-9)
        return self._running_s / seconds, self._context_s / seconds


class StepTimes:
    """How long the engine steps of one instance take: the told constants, corrected by its reports.

    constants: the instance's row of constants for engine/forward.py.
    """

    def __init__(self, told: Timing) -> None:
        """Start with the constants that the hot set told."""
        self.windows = 0  # that were learned from
        self._window: BusyWindow | None = None
        self.tell(told)

    def tell(self, told: Timing) -> None:
        """Replace the told constants, and forget what was learned."""
        self.told = told
        self.constants = constants(told)
        self._base = self.constants.copy()
        self._factors = np.ones(6)
        self._cov = np.eye(6) * SPREAD**2

    @property
    def factors(self) -> Floats:
        """A copy of the factors by which the told constants a to f are multiplied."""
        return self._factors.copy()

    def told_token_s(self, running: int) -> float:
        """Return the seconds from one token to the next with so many requests, by what was told."""
        return (self.told.a + self.told.b * running) * 1e-3

    def pause(self) -> None:
        """End the window that is being measured: the instance is not busy, or has paused."""
        self._window = None

    def report(
        self, now: float, running: float, context: float, made: int, read: int, prompt: float, squares: float
    ) -> bool:
        """Add a load report of a busy instance; return whether the constants may have changed.

        running: requests that make tokens; context: KV tokens in use; made, read: counters of tokens. prompt,
        squares: mean tokens of a prompt, and of their squares.
        """
        window = self._window
        if window is None or not window.goes_on(now, made, read):
            self._window = BusyWindow(now, running, context, made, read)
            return False
        window.extend(now, running, context)
        if now - window.from_s < WINDOW_S:
            return False
        self.learn(window, made, read, prompt, squares)
        self._window = BusyWindow(now, running, context, made, read)
        return True

    def learn(self, window: BusyWindow, made: int, read: int, prompt: float, squares: float) -> None:
        """Learn from a window that has ended. made, read: counters at its end; prompt, squares: see `report`.

        A window that is too short, or in which no token was made, says nothing.
        """
        tokens, reads = float(made - window.made), float(read - window.read)
        seconds = window.at - window.from_s
        if seconds < WINDOW_S or tokens <= 0.0:
            return
        base = self._base
        running, context = window.means()
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
        self.windows += 1
        self.constants[STEP_TIMES] = base[STEP_TIMES] * self._factors
