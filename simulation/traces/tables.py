"""Logs that are tables: a header, then a row a request.

    compact     arrival_s,prompt_tokens,output_tokens[,session or client]         seconds
    Azure       TIMESTAMP,ContextTokens,GeneratedTokens                           2023-11-16 18:15:46.6805900
    BurstGPT    Timestamp,[Session ID,Elapsed time,]Model,Request tokens,Response tokens,Total tokens,Log Type
    others      any names of simulation/traces/columns.py; also as pandas writes it: 472.0, an index first

BurstGPT notes a request that failed with 0 tokens: of 1.43 million rows of BurstGPT_1.csv 25,443 have no
answer, and 25,427 of these no prompt either. Nobody was served and nothing can be said of how long they would
have been, so such rows are left out and counted. In all other formats, where no publisher says what it
means, 0 tokens are a mistake, and so is less than 0 in any.
"""

import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple, NoReturn

from simulation.traces import columns
from simulation.traces.mistakes import (
    DISORDER_S,
    FARTHEST_S,
    MOST_SECONDS,
    MOST_TOKENS,
    check_time,
    check_tokens,
    wrong,
)
from simulation.traces.request import ReadNotes, Request
from simulation.traces.time_units import AUTO, NAMES, UNITS, recognise, seconds_of_date, unit_in

Blocks = Iterator[tuple[int, list[str]]]
"""Pieces of a file: the number of the first line of a piece, and its lines without their ends."""


class _Published(NamedTuple):
    """A published table. unit: of its times; date: it has dates; zero_failed: 0 tokens are a failure."""

    columns: tuple[str, str, str]
    unit: str | None = "s"
    date: bool = False
    zero_failed: bool = False


_PUBLISHED = (
    _Published(("arrival_s", "prompt_tokens", "output_tokens")),
    _Published(("TIMESTAMP", "ContextTokens", "GeneratedTokens"), date=True),
    _Published(("Timestamp", "Request tokens", "Response tokens"), zero_failed=True),
)
_OTHERS = _Published(("timestamp", "prompt_tokens", "output_tokens"), unit=None)


@dataclass(frozen=True)
class _Header:
    """Where the columns of a table are. names: of time, prompt and output; session: -1 if there is none."""

    known: _Published
    separator: str
    width: int
    places: tuple[int, int, int]
    names: tuple[str, str, str]
    session: int


def table(path: Path, blocks: Blocks, time_unit: str, notes: ReadNotes) -> Iterator[Request]:
    """Yield the requests of a table with the times of the log's own clock, in seconds."""
    number, lines = next(blocks)
    header = _header(path, lines[0].strip())
    begun = next(blocks, None) if len(lines) == 1 else (number + 1, lines[1:])
    if begun is None:
        wrong(path, number, "there are no requests in it")
    time_of, per_s, time_is = _clock(header, begun[1], time_unit, notes)
    return _rows(path, chain((begun,), blocks), header, time_of, per_s, time_is, notes)


def _header(path: Path, first: str) -> _Header:
    separator = next((one for one in ("\t", ";") if one in first and "," not in first), ",")
    names = [name.strip() for name in _cells(first, separator)]
    published = max(_PUBLISHED, key=lambda f: len({*f.columns} & {*names}))
    hits = len({*published.columns} & {*names})
    known = published if hits > 1 else _OTHERS
    by_plain: dict[str, int] = {}
    for place, name in enumerate(names):
        by_plain.setdefault(columns.plain(name), place)
    found: list[int | None] = []
    for name, others in zip(known.columns, (columns.TIMES, columns.PROMPTS, columns.OUTPUTS), strict=True):
        other = columns.first_of(others, by_plain)
        found.append(names.index(name) if name in names else None if other is None else by_plain[other])
    if found == [None, None, None]:
        wanted = f"{','.join(_PUBLISHED[0].columns)} or that of Azure or BurstGPT, or Mooncake's JSON lines"
        wrong(path, 1, f"wanted the header {wanted}; got {first!r:.60}")
    places: list[int] = []
    for name, at in zip((published if hits else known).columns, found, strict=True):
        if at is None:
            wrong(path, 1, f"the column {name} is missing; there are {', '.join(names)[:100]}")
        places.append(at)
    session = columns.first_of(columns.SESSIONS, by_plain)
    a, p, o = places
    return _Header(
        known,
        separator,
        len(names),
        (a, p, o),
        (names[a], names[p], names[o]),
        -1 if session is None else by_plain[session],
    )


def _cells(line: str, separator: str) -> list[str]:
    """Return the cells of a log's line that has quotes; a quote must be closed in the same line."""
    try:
        return next(csv.reader([line], strict=True, delimiter=separator), [])
    except csv.Error:
        return []


def _clock(
    header: _Header, lines: list[str], time_unit: str, notes: ReadNotes
) -> tuple[Callable[[str], float], float, str]:
    """Return how a cell becomes a time, the seconds of its unit, and what a cell is wanted to be."""
    place, name = header.places[0], header.names[0]
    cells = (_cells(text, header.separator) for text in lines if text.strip())
    times = [row[place] for row in cells if len(row) > place]
    numbers = []
    for text in times:
        try:
            numbers.append(float(text))
        except ValueError:
            continue
    numbers = [n for n in numbers if math.isfinite(n)]
    known = header.known
    if known.date or (known.unit is None and times and not numbers):
        return seconds_of_date, 1.0, "a date and time"
    unit: str | None = time_unit
    why = "as --time-unit says"
    if unit == AUTO:
        unit, why = unit_in(name) or (known.unit if name == known.columns[0] else None), ""
    if unit is None:
        unit, why = recognise(numbers, default="s")
    if why:
        notes.say("unit", f"{name} is taken as {NAMES[unit]}: {why} (--time-unit)")
    return float, UNITS[unit], NAMES[unit]


def _rows(
    path: Path,
    blocks: Blocks,
    header: _Header,
    time_of: Callable[[str], float],
    per_s: float,
    time_is: str,
    notes: ReadNotes,
) -> Iterator[Request]:
    """Yield the requests of the rows below a log's header. One loop, as millions of rows pass through."""
    (a, p, o), s = header.places, header.session
    width, separator, session = header.width, header.separator, -1
    begun: float | None = None
    last, latest, line, before = -FARTHEST_S, FARTHEST_S, 1, notes.failed
    for number, lines in blocks:
        for line, text in enumerate(lines, number):
            cells = text.split(separator) if '"' not in text else _cells(text, separator)
            try:
                at, prompt, output = time_of(cells[a]) * per_s, _tokens(cells[p]), _tokens(cells[o])
            except (ValueError, IndexError):
                at, prompt, output = math.nan, 0, 0
            # Whatever is wrong, not-a-number included, makes this false.
            if not (
                last <= at + DISORDER_S
                and at <= latest
                and 0 < prompt <= MOST_TOKENS
                and 0 < output <= MOST_TOKENS
                and len(cells) == width
                and ("_" not in text or "_" not in cells[a] + cells[p] + cells[o])  # int("1_0") is 10
            ):
                if not text.strip():
                    continue
                failed = header.known.zero_failed and at == at and min(prompt, output) == 0
                if failed and len(cells) == width:
                    notes.count_failed()
                    continue
                _refuse(path, line, cells, header, time_of, per_s, time_is, last, begun)
            if begun is None:
                begun, latest = at, min(FARTHEST_S, at + MOST_SECONDS)
            last = max(last, at)
            if s >= 0:
                name = cells[s]
                session = int(name) if len(name) < 13 and name.isdecimal() else columns.named(name)
            yield Request(at, prompt, output, session)
    if begun is None:
        failed_rows = notes.failed - before
        failures = f": {failed_rows:,} failed where it was made" if failed_rows else ""
        wrong(path, line, f"there are no requests in it{failures}")


def _tokens(text: str) -> int:
    """Return a number of tokens, also of 472.0; raise ValueError."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if number != number // 1 or not math.isfinite(number):
            raise
        return int(number)


def _refuse(
    path: Path,
    line: int,
    cells: list[str],
    header: _Header,
    time_of: Callable[[str], float],
    per_s: float,
    time_is: str,
    last: float,
    begun: float | None,
) -> NoReturn:
    """Raise ConfigError that says what is wrong with a row of a log."""
    if len(cells) != header.width:
        got = len(cells) or "a quote that is not closed"
        wrong(path, line, f"wanted {header.width} columns, got {got}")
    at_text, *token_texts = (cells[column] for column in header.places)
    at_name, *token_names = header.names
    try:
        at = time_of(at_text) * per_s if "_" not in at_text else math.nan
    except ValueError:
        at = math.nan
    if not math.isfinite(at):
        wrong(path, line, f"{at_name}: wanted {time_is}, got {at_text!r:.40}")
    check_time(path, line, at_name, at, last, begun)
    for name, text in zip(token_names, token_texts, strict=True):
        try:
            check_tokens(path, line, name, _tokens(text) if "_" not in text else text)
        except ValueError:
            check_tokens(path, line, name, text)
    raise AssertionError("a row was refused and nothing is wrong with it")
