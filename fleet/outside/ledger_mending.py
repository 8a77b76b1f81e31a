"""Repairs the intervals of a ledger whose clock was set forward and back while it was written.

An instance's intervals follow each other: where one ends before it begins, the clock was set back meanwhile.
If an earlier one of the same instance lasted as long as the step, or longer, the clock had been set forward
in it: that one, and all between, lie too late by the step. Otherwise only the one interval is known to be
wrong, and it lasts no time. What is not known to be wrong stays as it is; nothing writes such intervals any
more.
"""

from collections import defaultdict
from collections.abc import Iterable

Interval = tuple[float, float | None]


def in_order(rows: Iterable[tuple[int, str, float, float | None]]) -> dict[int, Interval]:
    """Return which intervals have to change so that they are in order, by rowid, as (from, to).

    rows: (rowid, label, from, to) of all intervals, in the order of writing.
    """
    by_label: defaultdict[str, list[tuple[int, Interval]]] = defaultdict(list)
    before: dict[int, Interval] = {}
    for rowid, label, from_s, to_s in rows:
        by_label[label].append((rowid, (from_s, to_s)))
        before[rowid] = from_s, to_s
    after: dict[int, Interval] = {}
    for chain in by_label.values():
        ordered = _chain([interval for _, interval in chain])
        after |= {rowid: interval for (rowid, _), interval in zip(chain, ordered, strict=True)}
    return {rowid: interval for rowid, interval in after.items() if interval != before[rowid]}


def _chain(intervals: list[Interval]) -> list[Interval]:
    found = list(intervals)
    for n, (from_s, to_s) in enumerate(found):
        if to_s is None or to_s >= from_s:
            continue
        step_s = from_s - to_s
        forth = next((m for m in reversed(range(n)) if _lasts(found[m]) >= step_s), None)
        if forth is None:
            found[n] = (from_s, from_s)
            continue
        found[forth] = (found[forth][0], (found[forth][1] or 0.0) - step_s)
        for m in range(forth + 1, n):
            begin, end = found[m]
            found[m] = (begin - step_s, None if end is None else end - step_s)
        found[n] = (to_s, to_s)
    return found


def _lasts(interval: Interval) -> float:
    from_s, to_s = interval
    return 0.0 if to_s is None else to_s - from_s
