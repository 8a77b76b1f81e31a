"""In which unit the times of a log are: told, in the name of their column, or recognised and said.

    a date                        is a date
    arrival_s, request_start_ns   say it
    1.7e9, 1.7e12, 1.7e18         seconds, milliseconds … since 1970
    0.35, 61.114                  seconds: nobody writes fractions of a millisecond
    chat_id, turn                 seconds (Qwen-Bailian)
    0, 3000, 3012                 by the mean gap of two requests: in JSON lines milliseconds (Mooncake), in
                                  tables seconds, unless the gap were under 20 ms or over 2 minutes

`--time-unit` says it where this is wrong, and the report says what was taken.
"""

import itertools
import re
from collections.abc import Sequence
from datetime import UTC, datetime

AUTO = "auto"
"""Instead of a unit: it is recognised."""

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
"""Seconds of each."""

NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}

LEAST_GAP_MS, MOST_GAP = 20.0, 120.0
"""Mean gap of two requests, in ms, under which whole numbers are no milliseconds: no published log has 50
requests a second; and the seconds over which they are a smaller unit than the one looked at."""

FRACTION_GAP = 3600.0
"""The same for numbers with fractions: an hour between two requests on average is no log of a service."""

SINCE_1970 = 1e9
"""Seconds, in 2001: a log that begins with a number above counts from 1970."""

_ENDING = re.compile(r"_(s|ms|us|ns|sec|secs|seconds|milliseconds|nanoseconds|microseconds)$")
_WORDS = {"sec": "s", "secs": "s", "seconds": "s", "milliseconds": "ms", "microseconds": "us"}


def unit_in(name: str) -> str | None:
    """Return the unit that a column's name says, as of arrival_s and request_start_ns."""
    found = _ENDING.search(name.lower())
    if found is None:
        return None
    return _WORDS.get(found[1], "ns" if found[1] == "nanoseconds" else found[1])


def seconds_of_date(text: str) -> float:
    """Return epoch seconds for a text like `2023-11-16 18:15:46.6805900`, with or without fraction or offset.

    The seventh digit, a tenth of a microsecond, is dropped by fromisoformat. Raises ValueError.
    """
    moment = datetime.fromisoformat(text.strip())
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def recognise(times: Sequence[float], *, default: str, chats: bool = False) -> tuple[str, str]:
    """Return the unit of these times, the first of a log, and why. default: of whole numbers, s or ms."""
    first = max((abs(t) for t in times[:1]), default=0.0)
    for unit in ("ns", "us", "ms", "s"):
        if first * UNITS[unit] >= SINCE_1970:
            return unit, "they count from 1970"
    gap = (max(times) - min(times)) / (len(times) - 1) if len(times) > 1 else 0.0
    if chats:
        return "s", "each row has a chat_id or a turn"
    if any(t != int(t) for t in times):
        return ("s", "they have fractions") if gap <= FRACTION_GAP else ("ms", "their gaps are long")
    if default == "ms" and 0.0 < gap < LEAST_GAP_MS:
        return "s", f"as milliseconds they would be {1e3 / gap:,.0f} requests a second"
    units = ["s", "ms", "us", "ns"]
    for unit, smaller in itertools.pairwise(units):
        if unit == "s" and default == "ms":
            continue
        if gap * UNITS[unit] <= MOST_GAP:
            return unit, "as whole numbers in such logs are"
        default = smaller
    return default, "their gaps are long"
