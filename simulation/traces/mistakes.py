"""What is wrong with a row of a log: one line with file, line and mistake."""

import math
from pathlib import Path
from typing import NoReturn

from process.errors import ConfigError

MOST_TOKENS = 10_000_000
"""Most tokens of a prompt or an answer that a log may name: ten times the longest context there is."""

MOST_SECONDS = 1e9
"""Longest log in seconds, thirty years: a longer one has a mistake in its times."""

FARTHEST_S = 1e12
"""Latest time in seconds; a larger number is in another unit: today is 1.8e9 s after 1970, and 1.8e12 ms."""

DISORDER_S = 0.5
"""Seconds by which a row may stand too late: logs of several processes are that much out of order."""


def wrong(path: Path, line: int, what: str) -> NoReturn:
    """Raise the mistake as ConfigError."""
    raise ConfigError(f"{path}: line {line}: {what}") from None


def check_time(path: Path, line: int, name: str, at: float, last: float, begun: float | None) -> None:
    """Raise ConfigError for a time that cannot be. last: the latest before it; begun: the first."""
    if not -FARTHEST_S <= at <= FARTHEST_S:
        wrong(path, line, f"{name}: wanted at most {FARTHEST_S:g} s, got {at:g}")
    if at < last - DISORDER_S:
        wrong(path, line, f"{name}: its time is {last - at:g} s before that of the row before it")
    if begun is not None and at > begun + MOST_SECONDS:
        wrong(path, line, f"{name}: its time is over {MOST_SECONDS:g} s after the first")


def check_tokens(path: Path, line: int, name: str, value: object) -> int:
    """Return a number of tokens; raise ConfigError for what cannot be one. 472.0 can, as pandas writes it."""
    whole = value
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        whole = int(value)
    if isinstance(whole, bool) or not isinstance(whole, int):
        wrong(path, line, f"{name}: wanted a whole number of tokens, got {value!r:.40}")
    if not 1 <= whole <= MOST_TOKENS:
        wrong(path, line, f"{name}: wanted 1 to {MOST_TOKENS:,} tokens, got {whole!r:.40}")
    return whole
