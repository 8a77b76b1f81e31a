"""A log of requests as its publisher distributes it, read one row at a time.

    file ─► a table (tables.py) or JSON (json_rows.py) ─► times in seconds (time_units.py) ─► in order, from 0

The first line says which it is; gzip is known by its first bytes, not by the name. Times are made to start at
0, and rows that stand up to DISORDER_S too late are put in order. What was assumed is in `ReadNotes`.
Mooncake's arrivals come in ticks of about 3 s: requests of one moment are moved to places of their own in
the time up to the next moment, at most TICK_S, drawn from a fixed seed, so that a log with times to the
millisecond (its synthetic_trace) stays as it is.

Any mistake in a row is a ConfigError that names file, line and mistake, after all rows before it were given.
Memory does not grow with the length of a log: only a block of the file, the requests of one moment and those
of DISORDER_S are kept, and of Qwen-Bailian which chat goes on from which. A log in no order of time
(conversations, delays, reports of AIPerf and guidellm) is read as a whole.
"""

import gzip
import io
import json
import logging
import math
import random
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from process.errors import ConfigError
from simulation.traces.json_rows import JsonRows, LogRow, of_guidellm
from simulation.traces.mistakes import DISORDER_S, FARTHEST_S, check_time, wrong
from simulation.traces.request import ReadNotes, Request
from simulation.traces.tables import Blocks, table
from simulation.traces.ticks import spread
from simulation.traces.time_units import AUTO, NAMES, UNITS, recognise

log = logging.getLogger("autoscaler")

TICK_S = 3.0
"""Seconds to which Mooncake's times are rounded (2.999 to 3.052 s in conversation and older trace)."""

LONGEST_LINE = 1 << 20
"""Most bytes of a line. The longest of the published logs, with a thousand hash_ids, is a hundredth of it."""

LARGEST_DOCUMENT = 1 << 30
"""Most bytes of a log that is one JSON document: it is read as a whole."""

SAMPLE = 2000
"""Rows by which the unit of times is recognised."""


def read(path: Path, notes: ReadNotes | None = None, time_unit: str = AUTO) -> Iterator[Request]:
    """Yield the requests of a log in order of time; raise ConfigError, also while it is read.

    notes: what is assumed and left out; it is logged at the end, too. time_unit: one of UNITS, of times that
    are numbers, or AUTO: recognised.
    """
    notes = ReadNotes() if notes is None else notes
    notes.begin()
    try:
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            notes.follow(_share_of(raw, path.stat().st_size))
            source = gzip.GzipFile(fileobj=raw) if packed else raw
            yield from _from_zero(_requests(path, source, time_unit, notes))
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror or e}") from None
    for line in notes.lines:
        log.info("%s: %s", path, line)


def _share_of(raw: io.BufferedReader, size: int) -> Callable[[], float] | None:
    """Return what tells how much of a file was read; None for a pipe, which has no size."""
    return (lambda: 1.0 if raw.closed else raw.tell() / size) if size and raw.seekable() else None


def _from_zero(requests: Iterator[Request]) -> Iterator[Request]:
    begun: float | None = None
    for at, prompt, output, session in requests:
        begun = at if begun is None else begun
        yield Request(at - begun, prompt, output, session)


# -- lines ---------------------------------------------------------------------------------------------


def _blocks(path: Path, source: io.BufferedReader | gzip.GzipFile) -> Blocks:
    """Yield all lines of a log; raise ConfigError at one that cannot be decoded, after those before it."""
    line, begun = 1, b""
    while True:
        try:
            # read1 gives what there is: all that was packed before a cut, and of a pipe what has come.
            more = source.read1(1 << 16)
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            wrong(path, line, f"the gzip is cut short or damaged: {e}")
        whole, ended, rest = (begun + more).rpartition(b"\n") if more else (begun, b"", b"")
        if ended or whole:
            lines, bad = _decoded(whole)
            if lines:
                yield line, lines
            line += len(lines)
            if bad is not None:
                wrong(path, line, f"wanted UTF-8 text, got the byte 0x{bad:02x}")
        if not more:
            return
        begun = rest
        if len(begun) > LONGEST_LINE:
            wrong(path, line, f"wanted a line of at most {LONGEST_LINE:,} bytes, it is longer")


def _decoded(data: bytes) -> tuple[list[str], int | None]:
    """Return a log's lines before the first that is not UTF-8, and the wrong byte (None if all are UTF-8)."""
    try:
        lines, bad = data.decode().split("\n"), None
    except UnicodeDecodeError as e:
        bad = data[e.start]
        lines = data[: data.rfind(b"\n", 0, e.start) + 1].decode().split("\n")[:-1]
    return ([line.removesuffix("\r") for line in lines] if b"\r" in data else lines), bad


# -- formats -------------------------------------------------------------------------------------------


def _requests(
    path: Path, source: io.BufferedReader | gzip.GzipFile, time_unit: str, notes: ReadNotes
) -> Iterator[Request]:
    """Yield the requests of a file in whatever format it has, in order, with the log's own times."""
    begin = _peek(source).removeprefix(b"\xef\xbb\xbf").lstrip()
    if begin.startswith(b"[") or _is_report(begin):
        notes.follow(None)
        reader = JsonRows(path, notes, all_at_once=True)
        rows = _document(path, source, reader, notes)
    elif begin.startswith(b"{"):
        reader = JsonRows(path, notes)
        rows = _json_lines(_filled(path, _blocks(path, source)), reader)
    else:
        yield from _in_order(table(path, _filled(path, _blocks(path, source)), time_unit, notes), notes)
        return
    found = _timed(path, reader, rows, time_unit, notes)
    yield from spread(found, TICK_S, random.Random(0), alone=False)


def _peek(source: io.BufferedReader | gzip.GzipFile) -> bytes:
    """Return the beginning; nothing of what cannot be unpacked, which reading it will say."""
    try:
        return source.peek(8192)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return b""


def _is_report(begin: bytes) -> bool:
    """Return whether a file that begins so is one JSON object: written over several lines, or guidellm's."""
    return begin.startswith(b"{") and (begin.split(b"\n", 1)[0].strip() == b"{" or b'"benchmarks"' in begin)


def _filled(path: Path, blocks: Blocks) -> Blocks:
    """Yield the same blocks without a mark of UTF-8; raise ConfigError when there are none."""
    number, lines = next(blocks, (1, []))
    if not lines:
        wrong(path, 1, "there are no requests in it, it is empty")
    yield number, [lines[0].removeprefix("\ufeff"), *lines[1:]]
    yield from blocks


def _json_lines(blocks: Blocks, reader: JsonRows) -> Iterator[LogRow]:
    for number, lines in blocks:
        for line, text in enumerate(lines, number):
            if text.strip():
                yield from reader.rows(line, _parsed(text))


def _parsed(text: str) -> Any:
    """Return the JSON object, or the text itself where it is none, which is no row either."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    return said if isinstance(said, dict) else text.strip()


def _document(
    path: Path, source: io.BufferedReader | gzip.GzipFile, reader: JsonRows, notes: ReadNotes
) -> Iterator[LogRow]:
    """Yield the rows of a file that is one JSON document: a list of rows, or a report of guidellm."""
    try:
        data = source.read(LARGEST_DOCUMENT + 1)
        text = data.decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        wrong(path, 1, f"the gzip is cut short or damaged: {e}")
    except UnicodeDecodeError as e:
        wrong(
            path,
            1 + e.object.count(b"\n", 0, e.start),
            f"wanted UTF-8 text, got the byte 0x{e.object[e.start]:02x}",
        )
    if len(data) > LARGEST_DOCUMENT:
        wrong(path, 1, f"one JSON document of over {LARGEST_DOCUMENT:,} bytes: wanted a row a line")
    if text.lstrip().startswith("["):
        yield from _listed(path, text, reader)
        return
    said = _parsed(text)
    if not isinstance(said, dict):
        wrong(path, 1, f"wanted a JSON object, got {text.strip()!r:.40}")
    for where, row in of_guidellm(said, path, notes):
        yield from reader.rows(1, row, where)


def _listed(path: Path, text: str, reader: JsonRows) -> Iterator[LogRow]:
    """Yield the rows of a log that is one JSON array, each with the line of the file on which it begins."""
    decoder, at, line = json.JSONDecoder(), text.index("[") + 1, 1
    seen = 0
    while True:
        while text[at : at + 1] in (" ", "\t", "\r", "\n", ","):
            at += 1
        line, seen = line + text.count("\n", seen, at), at
        if text[at : at + 1] == "]":
            return
        try:
            said, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            wrong(path, line, f"wanted a JSON object, got {text[at : at + 40]!r:.40}")
        yield from reader.rows(line, said)


# -- times ---------------------------------------------------------------------------------------------


def _timed(
    path: Path, reader: JsonRows, rows: Iterator[LogRow], time_unit: str, notes: ReadNotes
) -> Iterator[Request]:
    """Yield the requests of JSON rows in order, with times in seconds."""
    sample, failed = [], None
    try:
        for row in islice(rows, SAMPLE):
            sample.append(row)  # noqa: PERF402 those before a mistake are kept
    except ConfigError as e:
        failed = e
    numbers = [row.at for row in sample if row.unit is None and not math.isnan(row.at)]
    unit, why = time_unit, "as --time-unit says"
    if numbers:
        if time_unit == AUTO:
            unit, why = recognise(numbers, default="ms", chats=reader.chats)
        name = next(row.name for row in sample if row.unit is None)
        notes.say("unit", f"{name} is taken as {NAMES[unit]}: {why} (--time-unit)")
    found = _in_seconds(path, reader, sample, rows, failed, unit)
    if reader.all_at_once:
        notes.follow(None)
        yield from sorted(found, key=lambda request: request.at_s)
    else:
        yield from _in_order(found, notes)


def _in_seconds(
    path: Path,
    reader: JsonRows,
    sample: list[LogRow],
    rest: Iterator[LogRow],
    failed: ConfigError | None,
    unit: str,
) -> Iterator[Request]:
    last, begun, line = -FARTHEST_S, None, 1
    latest: dict[int, float] = {}  # of each session, where delays count from it
    for row in chain(sample, () if failed else rest):
        line = row.line
        if row.delay_s is None:
            at = row.at * UNITS.get(row.unit or unit, 1.0)
        elif row.session in latest:
            at = latest[row.session] + row.delay_s
        else:
            wrong(path, line, "timestamp is missing: the first row of a session says when it begins")
        check_time(path, line, row.name, at, -FARTHEST_S if reader.all_at_once else last, begun)
        last = max(last, at)
        begun = at if begun is None else begun
        if reader.all_at_once:
            latest[row.session] = at
        yield Request(at, row.prompt_tokens, row.output_tokens, row.session)
    if failed is not None:
        raise failed
    if begun is None:
        wrong(path, line, "there are no requests in it")


def _in_order(requests: Iterable[Request], notes: ReadNotes) -> Iterator[Request]:
    """Yield the requests in order of time, of which none stands over DISORDER_S too late."""
    waiting: deque[Request] = deque()
    try:
        for request in requests:
            place = len(waiting)
            while place and waiting[place - 1].at_s > request.at_s:
                place -= 1
            if place < len(waiting):
                notes.count_moved()
                waiting.insert(place, request)
            else:
                waiting.append(request)
            sure = waiting[-1].at_s - DISORDER_S
            while waiting[0].at_s < sure:
                yield waiting.popleft()
    except ConfigError:
        yield from waiting
        raise
    yield from waiting
