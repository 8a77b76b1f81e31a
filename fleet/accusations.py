"""What speaks against one instance, put together for fleet/evidence.py from what is known of the instance."""

from collections.abc import Iterable
from dataclasses import replace

from fleet.deadlines import Deadlines
from fleet.evidence import Accusation, Source
from fleet.instance import Instance
from fleet.slowness import CONFIRMED_S, Slowness
from fleet.states import CHECKED, State
from process.safe_text import safe_text

GIVEN_UP_LISTINGS = 2
"""Listings in a row with `intended_status` stopped of a machine that loads: one may be a slip."""

FAILED_STARTS = 3
"""Starts in a row without a GPU after which an instance may be given up: it is rented to somebody else."""


def final_accusation(i: Instance, d: Deadlines, now: float) -> Accusation | None:
    """Return what is wrong with an instance and does not pass by itself; None: nothing."""
    t = i.trouble
    unreached = {Source.CHECK} if t.silent_since is not None else set()
    clients = {Source.CLIENTS} if t.clients_since is not None else set()
    if t.fatal is not None:
        # Over ssh with its own host key it is the machine that says so, and we that have read it.
        against = {Source.CHECK} | (set() if unreached else {Source.WORD})
        why, lasts_s, deadline_s = t.fatal, now - i.since, d.recover_s
    elif t.word is not None:
        against = {Source.WORD} | ({Source.CHECK} if t.failing else set())
        why, lasts_s, deadline_s = f"it says: {t.word}", now - t.word_since, d.recover_s
    elif t.ended_since is not None:
        against = {Source.LISTING} | unreached
        why, lasts_s, deadline_s = "its container ended by itself", now - t.ended_since, d.broken_host_s
    else:
        return _slow(t.slow, now)
    return Accusation(why, frozenset(against | clients), lasts_s, deadline_s, final=True)


def others_well(i: Instance, instances: Iterable[Instance], d: Deadlines, now: float) -> bool:
    """Return whether another instance is well in what this one is accused of."""
    others = [o for o in instances if o is not i and o.state in CHECKED]
    if i.state is State.STARTING:
        return any(o.boot.up_at > (i.boot.no_gpu_since or now) for o in others)
    if i.trouble.silent_since is not None:
        return any(o.trouble.contrasts_with(i.trouble) for o in others)
    return any(o.trouble.shows_well_since(now - d.absent_s) for o in others)


def _slow(slow: Slowness, now: float) -> Accusation | None:
    if slow.clients is None or now - slow.since < CONFIRMED_S:
        return None
    also = {Source.CHECK: slow.check, Source.WORD: slow.word}
    against = frozenset((Source.CLIENTS, *(source for source, why in also.items() if why is not None)))
    # Clients alone may lie, and their loadbalancers with them: for that no machine is ever given up.
    return Accusation(f"slow: {slow.said}", against, now - slow.since, final=len(against) > 1)


def no_gpu(i: Instance, d: Deadlines, now: float) -> Accusation | None:
    """Accuse an instance of which several starts in a row found no GPU; return None before that."""
    since, starts = i.boot.no_gpu_since, i.boot.failed_starts
    if since is None or starts < FAILED_STARTS:
        return None
    # Where nothing else of ours starts, either, it may be the cloud: then it is waited for twice as long.
    most_s = 2 * FAILED_STARTS * (d.starting_s + d.no_gpu_rest_s)
    why = f"{starts} starts found no GPU"
    return Accusation(why, frozenset({Source.LISTING}), now - since, most_s, final=True)


def start_limit(i: Instance, d: Deadlines) -> tuple[float, str]:
    """Return for how many seconds an instance may be starting, and what is wrong after that."""
    if not i.loaded:
        return d.loading_s, f"its container was not up within {d.loading_s:.0f} s"  # may pull the image anew
    if i.holds_gpu:
        return d.container_s, f"it had its GPU, and its container was not up within {d.container_s:.0f} s"
    return d.starting_s, f"its GPU was not free within {d.starting_s:.0f} s"


def lost_host(i: Instance, d: Deadlines, now: float) -> Accusation | None:
    """Accuse an instance whose host is offline by the listing; return None while it is online."""
    if i.lost_since is None:
        return None
    # A stopped machine that is offline costs nothing and may come back with the model.
    most_s = d.lost_cold_s if i.state is State.COLD else d.lost_s
    against = {Source.LISTING, Source.CHECK} if i.trouble.silent_since is not None else {Source.LISTING}
    lost_s = now - i.lost_since
    return Accusation(f"host offline for {lost_s:.0f} s", frozenset(against), lost_s, most_s)


def overdue(i: Instance, d: Deadlines, now: float) -> Accusation | None:
    """Accuse an instance that has been in its state for longer than the deadline; None while it has time."""
    age = now - i.since
    listing = frozenset({Source.LISTING})
    if i.state is State.ORDERED and (not i.orders.out or i.orders.is_stuck(now)):
        waited_s = now - max(i.since, i.orders.answered_at)
        return _late("ordered, but never listed", listing, waited_s, d.ordered_s)
    if i.state is State.LOADING:
        if i.trouble.given_up >= GIVEN_UP_LISTINGS:
            why = "its host gave up loading it: meant to be stopped, says the listing, and we did not ask"
            return Accusation(why, listing, age, 0.0, final=True)
        broken_since = i.trouble.host_error_since
        if broken_since and now - broken_since >= d.broken_host_s:
            why = f"docker or host error in status_msg: {safe_text(i.trouble.host_error or '', 300)}"
            return Accusation(why, listing, now - broken_since, 0.0, final=True)
        return _late(f"its container was not up after {age:.0f} s", listing, age, d.loading_s)
    if i.state is State.RUNNING:
        limit_s = d.recover_s if i.boot.was_hot else d.reload_s if i.loaded else d.first_load_s
        silent_since = i.trouble.silent_since
        found = _late(f"not hot after {age:.0f} s: {i.why}", frozenset({Source.CHECK}), age, limit_s)
        if found is None or silent_since is None:
            return found
        return replace(found, why=f"not hot after {age:.0f} s", silent=True, silent_s=now - silent_since)
    if i.state is State.STOPPING and not i.orders.out:
        asked_s = now - max(i.since, i.orders.asked_at)
        return _late(f"would not stop in {asked_s:.0f} s", listing, asked_s, 3 * d.stopping_s)
    return None


def _late(why: str, against: frozenset[Source], lasts_s: float, deadline_s: float) -> Accusation | None:
    return Accusation(why, against, lasts_s, deadline_s) if lasts_s > deadline_s else None
