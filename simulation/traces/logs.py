"""What is made of the requests of a log: repeated, thinned, tiled under a daily profile, spread from ticks.

    file ──read──► requests ──spread_ticks──► ──tiled / scaled──► one at a time, in order, from 0
                                                                └──binned──► the fluid model

simulation/traces/reading.py reads the file.
"""

import heapq
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import MappingProxyType

from process.errors import ConfigError
from simulation.traces.reading import read
from simulation.traces.request import Request
from simulation.traces.ticks import spread

JITTER_S = 5.0
"""Most seconds by which the copy of an arrival is moved, so that a burst stays a burst."""

HOUR_FACTORS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        # By hour of day, mean 1; from the publications (alibaba/ServeGen; HPMLL/BurstGPT second-hand).
        "servegen_m-small": (
            0.84, 0.71, 0.73, 0.68, 0.71, 0.66, 0.68, 0.85, 1.02, 1.05, 1.13, 1.09,
            1.06, 1.07, 1.06, 1.05, 1.09, 1.08, 1.01, 1.23, 1.46, 1.40, 1.27, 1.06,
        ),
        "burstgpt": (
            0.96, 0.91, 0.59, 0.53, 0.38, 0.35, 0.20, 0.16, 0.18, 0.43, 0.90, 1.32,
            1.79, 1.54, 1.84, 1.43, 1.51, 1.39, 1.21, 1.61, 1.39, 1.20, 1.16, 1.05,
        ),
    }
)  # fmt: skip


# -- what is done with arrivals --------------------------------------------------------------------------


def scaled(
    requests: Iterable[Request], factor: float, jitter_s: float, rng: random.Random
) -> Iterator[Request]:
    """Yield each arrival `factor` times on average, in order of time; below 1 some are left out.

    The first copy keeps its time, each other is moved by up to ±jitter_s (a time before 0 is mirrored at 0).
    Copies of a session are sessions of their own. So variance over mean of the counts grows with the factor:
    bursts stay bursts. Independent arrivals at the higher rate would have it nearer to 1. Raises ValueError
    for a factor or jitter that is negative or no number.
    """
    for name, value in (("factor", factor), ("jitter_s", jitter_s)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name}: wanted 0 or more, got {value}")
    return _repeated(requests, lambda _: factor, jitter_s, rng, math.inf)


def tiled(
    source: Path | Callable[[], Iterable[Request]],
    days: float,
    hour_factors: Sequence[float],
    rng: random.Random,
    jitter_s: float = JITTER_S,
) -> Iterator[Request]:
    """Yield a log over and over for so many days, thinned or repeated by hour_factors (24, mean 1).

    source: a file, or a function that begins the log anew each time it is called. All times are before the
    end of the last day. Sessions of a repeat are its own. Raises ValueError for factors that are no daily
    profile, and ConfigError, also while it is read, for a log that has nothing to be repeated.
    """
    if len(hour_factors) != 24:
        raise ValueError(f"hour_factors: wanted 24, one an hour, got {len(hour_factors)}")
    mean = sum(hour_factors) / 24.0
    if not (min(hour_factors) >= 0.0 and abs(mean - 1.0) <= 0.05):  # published ones are rounded
        raise ValueError(f"hour_factors: wanted a mean of 1 and none negative, got a mean of {mean:g}")
    if not 0.0 < days < math.inf:
        raise ValueError(f"days: wanted more than 0, got {days}")
    again = (lambda: read(source)) if isinstance(source, Path) else source
    end = days * 86_400.0
    long = _one_after_another(again, end, _salt(rng))
    return _repeated(long, lambda at: hour_factors[int(at // 3600.0) % 24], jitter_s, rng, end)


def _one_after_another(again: Callable[[], Iterable[Request]], end: float, salt: int) -> Iterator[Request]:
    """Yield the log again and again until `end`; two rounds are as far apart as two requests on average."""
    begun = at = 0.0
    for tile in count():
        came = 0
        for request in again():
            at = begun + request.at_s
            if at >= end:
                return
            came += 1
            yield request._replace(at_s=at, session=_another(request.session, tile, salt))
        if came < 2 or at <= begun:
            raise ConfigError("a log of less than two moments cannot be tiled")
        begun = at + (at - begun) / (came - 1)


def _repeated(
    requests: Iterable[Request],
    factor_at: Callable[[float], float],
    jitter_s: float,
    rng: random.Random,
    end: float,
) -> Iterator[Request]:
    """Yield factor_at(time) copies of each request, sorted by time, each moved by up to jitter_s seconds."""
    salt = _salt(rng)
    waiting: list[tuple[float, int, Request]] = []
    number = count()  # keeps those of one time in their order
    for request in requests:
        at, prompt, output, session = request
        ripe = at - jitter_s  # whatever is still to come is not before this
        while waiting and waiting[0][0] <= ripe:
            yield heapq.heappop(waiting)[2]
        factor = factor_at(at)
        copies = int(factor)
        rest = factor - copies
        if rest > 0.0 and rng.random() < rest:
            copies += 1
        if copies:
            heapq.heappush(waiting, (at, next(number), request))
        for copy in range(1, copies):
            moved = abs(at + rng.uniform(-jitter_s, jitter_s))
            if moved < end:
                repeat = Request(moved, prompt, output, _another(session, copy, salt))
                heapq.heappush(waiting, (moved, next(number), repeat))
    while waiting:
        yield heapq.heappop(waiting)[2]


def _salt(rng: random.Random) -> int:
    """Return a number that makes the sessions of one round of repeats (see `_another`) its own."""
    return rng.getrandbits(62) | 1


def _another(session: int, copy: int, salt: int) -> int:
    """Return a session number for copy number `copy` of a session; copy 0 keeps the session's own.

    Odd factors, so that for one copy no two sessions meet, and for one session no two copies do.
    """
    if session < 0 or copy == 0:
        return session
    return (session * 0x9E3779B97F4A7C15 + copy * salt) & ((1 << 62) - 1)


def spread_ticks(requests: Iterable[Request], tick_s: float, rng: random.Random) -> Iterator[Request]:
    """Move requests of one moment to times within tick_s of it, before the next: the log rounded them."""
    return spread(requests, tick_s, rng, alone=True)
