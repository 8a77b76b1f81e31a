"""Logs of requests as their publishers distribute them, read one row at a time, and what is made of them.

    compact     arrival_s,prompt_tokens,output_tokens[,session or client]         seconds
    Azure       TIMESTAMP,ContextTokens,GeneratedTokens                           2023-11-16 18:15:46.6805900
    BurstGPT    Timestamp,[Session ID,Elapsed time,]Model,Request tokens,Response tokens,Total tokens,Log Type
    Mooncake    JSON lines: timestamp (ms), input_length, output_length, hash_ids

    file ──read──► requests ──spread_ticks──► ──tiled / scaled──► one at a time, in order, from 0
                                                                └──binned──► the fluid model

The first line says which it is; gzip is known by its first bytes, not by the name. Times are made to start at
0. Two publishers need more than that:

- Mooncake's arrivals come in ticks of about 3 s. Requests of one moment are moved to places of their own in
  the time up to the next moment, at most TICK_S, drawn from a fixed seed. So a log of the same format with
  times to the millisecond (its synthetic_trace) stays as it is. Requests whose prompts begin with the same
  block are of one session; in the older trace of its report all do, and there that says nothing.
- BurstGPT notes a request that failed with 0 tokens: of 1.43 million rows of BurstGPT_1.csv 25,443 have no
  answer, and 25,427 of these no prompt either. Nobody was served and nothing can be said of how long they
  would have been, so such rows are left out and counted (`LeftOut`). In all other formats, where no publisher
  says what it means, 0 tokens are a mistake, and so is less than 0 in any.

Any other mistake in a row is a ConfigError that names file, line and mistake, after all rows before it were
given. Memory does not grow with the length of the log: only a block of the file, the requests of one moment
(Mooncake), and those of two jitters (repeats) are kept.
"""

import csv
import gzip
import heapq
import io
import json
import logging
import math
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import chain, count
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from process.errors import ConfigError

log = logging.getLogger("autoscaler")

MOST_TOKENS = 10_000_000
"""Most tokens of a prompt or an answer that a log may name: ten times the longest context there is."""

MOST_SECONDS = 1e9
"""Longest log in seconds, thirty years: a longer one has a mistake in its times."""

FARTHEST_S = 1e12
"""Latest time in seconds; a larger number is in another unit: today is 1.8e9 s after 1970, and 1.8e12 ms."""

TICK_S = 3.0
"""Seconds to which Mooncake's times are rounded (2.999 to 3.052 s in conversation and older trace)."""

JITTER_S = 5.0
"""Most seconds by which the copy of an arrival is moved, so that a burst stays a burst."""

LONGEST_LINE = 1 << 20
"""Most bytes of a line. The longest of the published logs, with a thousand hash_ids, is a hundredth of it."""

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


class Request(NamedTuple):
    """One arrival of a log, seconds since the first. session: the number of its session; -1: not known."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    session: int


@dataclass
class LeftOut:
    """The number of requests that `read` left out: they failed where the log was made (BurstGPT)."""

    failed: int = 0

    def count_failed(self) -> None:
        """Count one more request that is left out."""
        self.failed += 1


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
    return _spread(requests, tick_s, rng, alone=True)


def _spread(
    requests: Iterable[Request], tick_s: float, rng: random.Random, *, alone: bool
) -> Iterator[Request]:
    """Move requests as `spread_ticks` does. alone: also those whose time no other request has."""
    together: list[Request] = []
    for request in requests:
        if together and request.at_s != together[0].at_s:
            yield from _placed(together, min(tick_s, request.at_s - together[0].at_s), rng, alone)
            together = []
        together.append(request)
    yield from _placed(together, tick_s, rng, alone)


def _placed(together: list[Request], room_s: float, rng: random.Random, alone: bool) -> Iterator[Request]:
    if len(together) == 1 and not alone:
        yield from together
        return
    places = sorted(rng.random() * room_s for _ in together)
    for (at, prompt, output, session), place in zip(together, places, strict=True):
        yield Request(min(at + place, at + room_s), prompt, output, session)


# --- outside world ---------------------------------------------------------------------------------


def read(path: Path, left_out: LeftOut | None = None) -> Iterator[Request]:
    """Yield the requests of a log in order of time; raise ConfigError, also while it is read.

    left_out counts the requests that are left out; how many they were is logged at the end.
    """
    passed = LeftOut() if left_out is None else left_out
    before = passed.failed
    try:
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            blocks = _blocks(path, gzip.GzipFile(fileobj=raw) if packed else raw)
            yield from _requests(path, blocks, passed)
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror or e}") from None
    if passed.failed > before:
        log.info("%s: %s requests that failed there are left out", path, f"{passed.failed - before:,}")


_Blocks = Iterator[tuple[int, list[str]]]
"""Pieces of a file: the number of the first line of a piece, and its lines without their ends."""


def _blocks(path: Path, source: io.BufferedReader | gzip.GzipFile) -> _Blocks:
    """Yield all lines of a log; raise ConfigError at one that cannot be decoded, after those before it."""
    line, begun = 1, b""
    while True:
        try:
            # read1 gives what there is: all that was packed before a cut, and of a pipe what has come.
            more = source.read1(1 << 16)
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            _wrong(path, line, f"the gzip is cut short or damaged: {e}")
        whole, ended, rest = (begun + more).rpartition(b"\n") if more else (begun, b"", b"")
        if ended or whole:
            lines, bad = _decoded(whole)
            if lines:
                yield line, lines
            line += len(lines)
            if bad is not None:
                _wrong(path, line, f"wanted UTF-8 text, got the byte 0x{bad:02x}")
        if not more:
            return
        begun = rest
        if len(begun) > LONGEST_LINE:
            _wrong(path, line, f"wanted a line of at most {LONGEST_LINE:,} bytes, it is longer")


def _decoded(data: bytes) -> tuple[list[str], int | None]:
    """Return a log's lines before the first that is not UTF-8, and the wrong byte (None if all are UTF-8)."""
    try:
        lines, bad = data.decode().split("\n"), None
    except UnicodeDecodeError as e:
        bad = data[e.start]
        lines = data[: data.rfind(b"\n", 0, e.start) + 1].decode().split("\n")[:-1]
    return ([line.removesuffix("\r") for line in lines] if b"\r" in data else lines), bad


class _Format(NamedTuple):
    """A log format with a header. columns: of time, prompt, output. zero_failed: 0 tokens mean a failure."""

    columns: tuple[str, str, str]
    time_of: Callable[[str], float]
    time_is: str
    zero_failed: bool = False


def _date(text: str) -> float:
    """Return epoch seconds for a text like `2023-11-16 18:15:46.6805900`, with or without fraction or offset.

    The seventh digit, a tenth of a microsecond, is dropped by fromisoformat.
    """
    moment = datetime.fromisoformat(text.strip())
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


_FORMATS = (
    _Format(("arrival_s", "prompt_tokens", "output_tokens"), float, "seconds"),
    _Format(("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _date, "a date and time"),
    _Format(("Timestamp", "Request tokens", "Response tokens"), float, "seconds", zero_failed=True),
)
_SESSIONS = ("session", "client", "Session ID")


def _requests(path: Path, blocks: _Blocks, passed: LeftOut) -> Iterator[Request]:
    """Yield the requests of a log in whatever format its first line has; the first one comes at 0 s."""
    number, lines = next(blocks, (1, []))
    if not lines:
        _wrong(path, 1, "there are no requests in it, it is empty")
    lines[0] = lines[0].removeprefix("\ufeff")
    first = lines[0].strip()
    if first.startswith("{"):
        found = _mooncake(path, chain(((number, lines),), blocks))
        yield from _from_zero(_spread(found, TICK_S, random.Random(0), alone=False))
        return
    names = [name.strip() for name in _cells(first)]
    known = max(_FORMATS, key=lambda f: len({*f.columns} & {*names}))
    missing = [name for name in known.columns if name not in names]
    if len(missing) == 3:
        wanted = f"{','.join(known.columns)} or that of Azure or BurstGPT, or Mooncake's JSON lines"
        _wrong(path, 1, f"wanted the header {wanted}; got {first!r:.60}")
    if missing:
        _wrong(path, 1, f"the column {missing[0]} is missing; there are {', '.join(names)[:100]}")
    yield from _table(path, chain(((number + 1, lines[1:]),), blocks), names, known, passed)


def _from_zero(requests: Iterator[Request]) -> Iterator[Request]:
    begun: float | None = None
    for at, prompt, output, session in requests:
        begun = at if begun is None else begun
        yield Request(at - begun, prompt, output, session)


def _cells(line: str) -> list[str]:
    """Return the cells of a log's line that has quotes; a quote must be closed in the same line."""
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error:
        return []


def _table(
    path: Path, blocks: _Blocks, names: list[str], known: _Format, passed: LeftOut
) -> Iterator[Request]:
    """Yield the requests of the rows below a log's header. One loop, as millions of rows pass through."""
    a, p, o = (names.index(name) for name in known.columns)
    s = next((names.index(name) for name in _SESSIONS if name in names), -1)
    width, time_of, session = len(names), known.time_of, -1
    begun: float | None = None
    last, latest, line, before = -FARTHEST_S, FARTHEST_S, 1, passed.failed
    for number, lines in blocks:
        for line, text in enumerate(lines, number):
            cells = text.split(",") if '"' not in text else _cells(text)
            try:
                at, prompt, output = time_of(cells[a]), int(cells[p]), int(cells[o])
            except (ValueError, IndexError):
                at, prompt, output = math.nan, 0, 0
            # Whatever is wrong, not-a-number included, makes this false.
            if not (
                last <= at <= latest
                and 0 < prompt <= MOST_TOKENS
                and 0 < output <= MOST_TOKENS
                and len(cells) == width
                and ("_" not in text or "_" not in cells[a] + cells[p] + cells[o])  # int("1_0") is 10
            ):
                if not text.strip():
                    continue
                if known.zero_failed and at == at and len(cells) == width and min(prompt, output) == 0:
                    passed.count_failed()
                    continue
                _refuse(path, line, cells, width, (a, p, o), known, last, begun)
            if begun is None:
                begun, latest = at, min(FARTHEST_S, at + MOST_SECONDS)
            last = at
            if s >= 0:
                name = cells[s]
                session = int(name) if len(name) < 13 and name.isdecimal() else _named(name)
            yield Request(at - begun, prompt, output, session)
    if begun is None:
        failed = f": {passed.failed - before:,} failed where it was made" if passed.failed > before else ""
        _wrong(path, line, f"there are no requests in it{failed}")


def _named(name: str) -> int:
    """Return the number of a session that has a name: larger than any number that a log gives itself."""
    name = name.strip()
    if name in ("", "-1"):
        return -1
    return (1 << 60) + int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "big")


def _refuse(
    path: Path,
    line: int,
    cells: list[str],
    width: int,
    columns: tuple[int, int, int],
    known: _Format,
    last: float,
    begun: float | None,
) -> NoReturn:
    """Raise ConfigError that says what is wrong with a row of a log."""
    if len(cells) != width:
        _wrong(path, line, f"wanted {width} columns, got {len(cells) or 'a quote that is not closed'}")
    at_text, *token_texts = (cells[column] for column in columns)
    at_name, *token_names = known.columns
    try:
        at = known.time_of(at_text) if "_" not in at_text else math.nan
    except ValueError:
        at = math.nan
    if not math.isfinite(at):
        _wrong(path, line, f"{at_name}: wanted {known.time_is}, got {at_text!r:.40}")
    _check_time(path, line, at_name, at, last, begun)
    for name, text in zip(token_names, token_texts, strict=True):
        try:
            _check_tokens(path, line, name, int(text) if "_" not in text else text)
        except ValueError:
            _check_tokens(path, line, name, text)
    raise AssertionError("a row was refused and nothing is wrong with it")


def _check_time(path: Path, line: int, name: str, at: float, last: float, begun: float | None) -> None:
    if not -FARTHEST_S <= at <= FARTHEST_S:
        _wrong(path, line, f"{name}: wanted at most {FARTHEST_S:g} s, got {at:g}")
    if at < last:
        _wrong(path, line, f"{name}: its time is {last - at:g} s before that of the row before it")
    if begun is not None and at > begun + MOST_SECONDS:
        _wrong(path, line, f"{name}: its time is over {MOST_SECONDS:g} s after the first")


def _check_tokens(path: Path, line: int, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        _wrong(path, line, f"{name}: wanted a whole number of tokens, got {value!r:.40}")
    if not 1 <= value <= MOST_TOKENS:
        _wrong(path, line, f"{name}: wanted 1 to {MOST_TOKENS:,} tokens, got {value!r:.40}")
    return value


def _mooncake(path: Path, blocks: _Blocks) -> Iterator[Request]:
    """Yield the requests of Mooncake's JSON lines, with the times of the log's own clock."""
    begun: float | None = None
    last, line = -FARTHEST_S, 1
    for number, lines in blocks:
        for line, text in enumerate(lines, number):
            if not text.strip():
                continue
            try:
                said: Any = json.loads(text)
            except (ValueError, RecursionError):
                said = None
            if not isinstance(said, dict):
                _wrong(path, line, f"wanted a JSON object, got {text.strip()!r:.40}")
            for name in ("timestamp", "input_length", "output_length"):
                if name not in said:
                    _wrong(path, line, f"{name} is missing")
            at_ms = said["timestamp"]
            # First the bounds: an int of 400 digits is no float.
            if (
                isinstance(at_ms, bool)
                or not isinstance(at_ms, int | float)
                or not -FARTHEST_S * 1e3 <= at_ms <= FARTHEST_S * 1e3
            ):
                _wrong(path, line, f"timestamp: wanted milliseconds, got {at_ms!r:.40}")
            at = at_ms / 1e3
            _check_time(path, line, "timestamp", at, last, begun)
            last = at
            begun = at if begun is None else begun
            prompt = _check_tokens(path, line, "input_length", said["input_length"])
            output = _check_tokens(path, line, "output_length", said["output_length"])
            blocks_of = said.get("hash_ids")
            shared = blocks_of[0] if isinstance(blocks_of, list) and blocks_of else None
            yield Request(at, prompt, output, -1 if shared is None else _named_block(shared))


def _named_block(shared: object) -> int:
    """Return the session number of the requests whose prompts begin with this block of tokens."""
    return shared if type(shared) is int and 0 <= shared < 10**12 else _named(str(shared))


def _wrong(path: Path, line: int, what: str) -> NoReturn:
    raise ConfigError(f"{path}: line {line}: {what}") from None
