"""Logs of requests as their publishers distribute them, read one row at a time.

    compact     arrival_s,prompt_tokens,output_tokens[,session or client]         seconds
    Azure       TIMESTAMP,ContextTokens,GeneratedTokens                           2023-11-16 18:15:46.6805900
    BurstGPT    Timestamp,[Session ID,Elapsed time,]Model,Request tokens,Response tokens,Total tokens,Log Type
    Mooncake    JSON lines: timestamp (ms), input_length, output_length, hash_ids

The first line says which it is; gzip is known by its first bytes, not by the name. Times are made to start at
0. A Mooncake log's times come in ticks of 3 s, so each request is moved to a place in its tick that is drawn
from a fixed seed; requests that share the first block of their prompt share a session. BurstGPT notes a
request that failed with 0 response tokens: as nobody was served, such rows are left out.

Everything else that is wrong with a row is a ConfigError that names file, line and what is wrong. Whoever
reads gets what came before it: nothing is read ahead, and memory does not grow with the length of the log.
"""

import csv
import gzip
import heapq
import io
import json
import math
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn, TypeVar

from errors import ConfigError

MOST_TOKENS = 10_000_000
"""In a prompt or an answer: ten times the longest context there is."""

MOST_SECONDS = 1e9
"""Thirty years: a longer log has a mistake in its times."""

TICK_S = 3.0
"""Mooncake's log has its times rounded to these (FAST25 traces, reference/traces)."""

JITTER_S = 5.0
"""A repeated arrival is moved by up to so much, so that a burst stays a burst."""

HOUR_FACTORS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        # Of the hours of a day, mean 1; as ../shared/traces/README.md has them from the publications.
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


class Request(NamedTuple):
    """One arrival, seconds since the first. session: who belongs together; -1 where nothing says so."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    session: int


# -- what is done with arrivals --------------------------------------------------------------------------


def scaled(
    requests: Iterable[Request], factor: float, jitter_s: float, rng: random.Random
) -> Iterator[Request]:
    """Each arrival `factor` times on average, in order of time; below 1 some are left out.

    The first copy stays where it is, each other is moved by up to ±jitter_s, but not before 0. Copies of a
    session are sessions of their own.
    """
    whole, rest = int(factor), factor - int(factor)
    waiting: list[tuple[float, int, Request]] = []
    number = 0
    for request in requests:
        at = request.at_s
        while waiting and waiting[0][0] <= at - jitter_s:
            yield heapq.heappop(waiting)[2]
        copies = whole + (rest > 0.0 and rng.random() < rest)
        for copy in range(copies):
            moved = at if copy == 0 else max(0.0, at + rng.uniform(-jitter_s, jitter_s))
            session = request.session if copy == 0 or request.session < 0 else (copy << 40) + request.session
            heapq.heappush(waiting, (moved, number, request._replace(at_s=moved, session=session)))
            number += 1
    while waiting:
        yield heapq.heappop(waiting)[2]


def spread_ticks(requests: Iterable[Request], tick_s: float, rng: random.Random) -> Iterator[Request]:
    """Requests of one moment are moved to places of their own in the tick_s that follow: for a log whose
    times are rounded. Order and sessions stay."""
    return _spread(iter(requests), 0, tick_s, rng)


_T = TypeVar("_T", bound=tuple[Any, ...])


def _spread(rows: Iterator[_T], column: int, tick_s: float, rng: random.Random) -> Iterator[_T]:
    """The rows, with the time in that column moved."""
    tick: list[_T] = []

    def moved() -> Iterator[_T]:
        places = sorted(rng.random() * tick_s for _ in tick)
        for row, place in zip(tick, places, strict=True):
            values = list(row)
            values[column] += place
            yield row._make(values) if hasattr(row, "_make") else tuple(values)  # type: ignore[misc]

    for row in rows:
        if tick and row[column] != tick[0][column]:
            yield from moved()
            tick = []
        tick.append(row)
    yield from moved()


def tiled(
    again: Callable[[], Iterable[Request]],
    days: float,
    factors: Sequence[float],
    rng: random.Random,
    jitter_s: float = JITTER_S,
) -> Iterator[Request]:
    """The log over and over for so many days, thinned and repeated by the factor of the hour (24, mean 1).

    again: reads the log from its begin.
    """
    if len(factors) != 24:
        raise ValueError(f"factors: wanted 24, one an hour, got {len(factors)}")

    def one_after_another() -> Iterator[Request]:
        begun = last = 0.0
        while True:
            came = 0
            for request in again():
                last = begun + request.at_s
                came += 1
                if last >= days * 86_400.0:
                    return
                yield request._replace(at_s=last)
            if came < 2 or last <= begun:
                raise ConfigError("a log of less than two moments cannot be tiled")
            begun = last + (last - begun) / (came - 1)

    # Each hour by its own factor: the arrivals stay in order, because a copy is moved only a little.
    def by_hour() -> Iterator[Request]:
        waiting: list[tuple[float, int, Request]] = []
        number = 0
        for request in one_after_another():
            at = request.at_s
            while waiting and waiting[0][0] <= at - jitter_s:
                yield heapq.heappop(waiting)[2]
            factor = factors[int(at // 3600.0) % 24]
            copies = int(factor) + (rng.random() < factor - int(factor))
            for copy in range(copies):
                moved = at if copy == 0 else max(0.0, at + rng.uniform(-jitter_s, jitter_s))
                heapq.heappush(waiting, (moved, number, request._replace(at_s=moved)))
                number += 1
        while waiting:
            yield heapq.heappop(waiting)[2]

    return by_hour()


# --- outside world ---------------------------------------------------------------------------------


def read(path: Path) -> Iterator[Request]:
    """The requests of a log in order of time, one at a time; raises ConfigError, also while it is read."""
    begun: float | None = None
    last = 0.0
    line = 0
    try:
        with _opened(path) as text:
            line, rows = 1, _rows(path, text)
            for line, at, prompt, output, session in rows:
                if begun is None:
                    begun = last = at
                if at < last:
                    _wrong(path, line, f"its time is {last - at:g} s before that of the row before it")
                if at - begun > MOST_SECONDS:
                    _wrong(path, line, f"its time is over {MOST_SECONDS:g} s after the first")
                last = at
                yield Request(at - begun, prompt, output, session)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        _wrong(path, line + 1, f"the gzip is cut short or damaged: {e}")
    except UnicodeDecodeError:
        _wrong(path, line + 1, "wanted UTF-8 text")
    except csv.Error as e:
        _wrong(path, line + 1, str(e))
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror or e}") from None
    if begun is None:
        raise ConfigError(f"{path}: line 1: there are no requests in it")


_Row = tuple[int, float, int, int, int]
"""Line, seconds on the log's own clock, prompt and output tokens, session."""


@contextmanager
def _opened(path: Path) -> Iterator[io.TextIOBase]:
    with path.open("rb") as raw:
        packed = raw.peek(2)[:2] == b"\x1f\x8b"
        plain = gzip.GzipFile(fileobj=raw) if packed else raw
        with io.TextIOWrapper(plain, encoding="utf-8", newline="") as text:
            yield text


def _rows(path: Path, text: io.TextIOBase) -> Iterator[_Row]:
    first = text.readline()
    if not first.strip():
        raise ConfigError(f"{path}: line 1: there are no requests in it")
    if first.lstrip("\ufeff").startswith("{"):
        return _in_ticks(_mooncake(path, first, text))
    names = next(csv.reader([first.lstrip("\ufeff").rstrip("\r\n")]))
    names = [name.strip() for name in names]
    if "TIMESTAMP" in names:
        return _table(path, text, names, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _date)
    if "Timestamp" in names:
        return _table(
            path, text, names, ("Timestamp", "Request tokens", "Response tokens"), None, failures=True
        )
    return _table(path, text, names, ("arrival_s", "prompt_tokens", "output_tokens"), None)


def _table(
    path: Path,
    text: io.TextIOBase,
    names: list[str],
    wanted: tuple[str, str, str],
    time_of: Callable[[str], float] | None,
    *,
    failures: bool = False,
) -> Iterator[_Row]:
    """Rows of a CSV. failures: rows without an answer are of requests that failed, and left out."""
    missing = [name for name in wanted if name not in names]
    if missing:
        _wrong(path, 1, f"the column {missing[0]} is missing; there are {', '.join(names)[:100]}")
    at_column, prompt_column, output_column = (names.index(name) for name in wanted)
    session_column = next((names.index(n) for n in ("session", "client", "Session ID") if n in names), -1)
    sessions: dict[str, int] = {}
    rows = csv.reader(text)
    for row in rows:
        line = rows.line_num + 1
        if not row:
            continue
        if len(row) != len(names):
            _wrong(path, line, f"wanted {len(names)} columns, got {len(row)}")
        try:
            at = float(row[at_column]) if time_of is None else time_of(row[at_column])
            prompt, output = int(row[prompt_column]), int(row[output_column])
            if failures and output == 0:
                continue
            good = 0 < prompt <= MOST_TOKENS and 0 < output <= MOST_TOKENS and math.isfinite(at)
        except ValueError:
            good = False
        if not good:
            _check(path, line, wanted, (row[at_column], row[prompt_column], row[output_column]), time_of)
        session = -1
        if session_column >= 0 and row[session_column]:
            # A number of its own for each name, so that it does not matter what publishers call them.
            name = row[session_column]
            session = int(name) if name.isdecimal() and len(name) < 12 else sessions.setdefault(
                name, (1 << 39) + len(sessions)
            )  # fmt: skip
        yield line, at, prompt, output, session


def _check(
    path: Path,
    line: int,
    names: tuple[str, str, str],
    texts: tuple[str, str, str],
    time_of: Callable[[str], float] | None,
) -> NoReturn:
    """Say which of the three is wrong."""
    try:
        at = float(texts[0]) if time_of is None else time_of(texts[0])
    except ValueError:
        at = math.nan
    if not math.isfinite(at):
        wanted = "seconds" if time_of is None else "a date and time"
        _wrong(path, line, f"{names[0]}: wanted {wanted}, got {texts[0]!r:.40}")
    for name, text in zip(names[1:], texts[1:], strict=True):
        _tokens(path, line, name, text)
    raise AssertionError("a row was refused and nothing is wrong with it")


def _tokens(path: Path, line: int, name: str, value: object) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if isinstance(number, bool) or not isinstance(number, int):
        _wrong(path, line, f"{name}: wanted a whole number of tokens, got {value!r:.40}")
    if not 1 <= number <= MOST_TOKENS:
        _wrong(path, line, f"{name}: wanted 1 to {MOST_TOKENS:,} tokens, got {number}")
    return number


def _date(text: str) -> float:
    """Seconds of `2023-11-16 18:15:46.6805900`, with or without fraction and offset."""
    text = text.strip()
    date, point, rest = text.partition(".")
    if point:
        digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
        # fromisoformat takes six digits; Azure's 2023 log has seven.
        text = f"{date}.{digits[:6]:0<6}{rest[len(digits) :]}"
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        return (moment - datetime(1970, 1, 1)).total_seconds()  # noqa: DTZ001 only differences are used
    return moment.timestamp()


def _mooncake(path: Path, first: str, text: io.TextIOBase) -> Iterator[_Row]:
    sessions: dict[object, int] = {}
    line = 1
    raw: str = first
    while raw:
        if raw.strip():
            yield _mooncake_row(path, line, raw, sessions)
        raw = text.readline()
        line += 1


def _mooncake_row(path: Path, line: int, raw: str, sessions: dict[object, int]) -> _Row:
    try:
        said: Any = json.loads(raw)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        _wrong(path, line, f"wanted a JSON object, got {raw.strip()!r:.40}")
    for name in ("timestamp", "input_length", "output_length"):
        if name not in said:
            _wrong(path, line, f"{name} is missing")
    at_ms = said["timestamp"]
    if isinstance(at_ms, bool) or not isinstance(at_ms, int | float) or not math.isfinite(at_ms):
        _wrong(path, line, f"timestamp: wanted milliseconds, got {at_ms!r:.40}")
    prompt = _tokens(path, line, "input_length", said["input_length"])
    output = _tokens(path, line, "output_length", said["output_length"])
    blocks = said.get("hash_ids")
    shared = blocks[0] if isinstance(blocks, list) and blocks and isinstance(blocks[0], int) else None
    session = -1 if shared is None else sessions.setdefault(shared, len(sessions))
    return line, at_ms / 1e3, prompt, output, session


def _in_ticks(rows: Iterator[_Row]) -> Iterator[_Row]:
    """The same, each moved to a place of its own in the tick that its time was rounded to."""
    return _spread(rows, 1, TICK_S, random.Random(0))


def _wrong(path: Path, line: int, what: str) -> NoReturn:
    raise ConfigError(f"{path}: line {line}: {what}") from None
