"""When a price began or ended that a look at the cloud shows: looks come late, and dollars wait for none.

    last look ──────────── the price changed ──────────── this look
                           start_date of the rental, uptime of its container, our order and its answer,
                           the last check that the machine passed and the first that met nobody;
                           between what these leave, the middle: too early as often as too late

Times are epoch seconds on the caller's clock, and always between the two looks, whatever the cloud says.
"""

from collections.abc import Iterator

from fleet.instance import UP, Instance
from fleet.states import State
from vast.rows import Row


def price_changes(i: Instance, row: Row, now: float) -> Iterator[tuple[float, float]]:
    """Yield (since, $/h) for what a row shows that its instance did not cost; the row is not read yet."""
    if not row.priced:
        return
    before, since = i.price_usd_h, _last_look(i, now)
    if i.state is State.ORDERED and not i.adopted and row.storage_usd_h != before:
        since = now if row.start_date is None else min(max(row.start_date, since), now)
        before = row.storage_usd_h
        yield since, before
    if row.price_now_usd_h > before:
        yield _dearer_since(i, row, since, now), row.price_now_usd_h
    elif row.price_now_usd_h < before:
        yield _down_since(i, since, now), row.price_now_usd_h


def ended_at(i: Instance, now: float) -> float:
    """Return when an instance ended that the cloud does not have any more."""
    return _down_since(i, _last_look(i, now), now if i.absence.since is None else i.absence.since)


def _dearer_since(i: Instance, row: Row, earliest: float, now: float) -> float:
    if row.actual_status in UP and row.up_s is not None:
        return min(max(now - row.up_s, earliest), now)
    if i.state is State.STARTING and i.boot.ordered_at is not None:
        earliest = max(earliest, i.boot.ordered_at)
    return (earliest + now) / 2.0


def _down_since(i: Instance, earliest: float, latest: float) -> float:
    """Return when a machine went down: by our order, or between its last pass and the first silence."""
    if i.state is State.STOPPING and earliest <= i.orders.done_at <= latest:
        return i.orders.done_at
    earliest = min(max(earliest, i.trouble.passed_at), latest)
    if i.trouble.silent_since is not None and i.trouble.silent_since > earliest:
        latest = min(latest, i.trouble.silent_since)
    if i.state in (State.STOPPING, State.DESTROYING) and i.orders.asked_at < latest:
        earliest = max(earliest, i.orders.asked_at)
    return (earliest + latest) / 2.0


def _last_look(i: Instance, now: float) -> float:
    """Return when the instance was looked at last: before that nothing can have changed."""
    if i.looked_at is not None:
        return min(i.looked_at, now)
    return now if i.adopted else min(i.since, now)
