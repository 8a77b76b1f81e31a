"""What a run in virtual time begins with: the fleet that the first quarter of an hour of its trace needs.

    first LOOK_S of the trace ─► work/s ─► what the policy keeps under that load ─► hot, pool
                                   │
                                   └─ of its busiest minutes: is what it begins with too small?

A fleet that begins with less spends the first half an hour on growing (a model loads for ten minutes and
more), and the figures of a short log would be those of its beginning. So this is the default: the fleet that
the policy keeps under such a load serves that quarter of an hour once before the trace begins, so that the
policy remembers it and the loadbalancer has measured what the instances can do. Of that, and of the time
that a start takes at most, nothing counts: the rest is what users meet in the second hour. Flags say
otherwise; with --hot nothing is played before.
"""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from fleet.deadlines import Deadlines
from fleet.market import Market
from policies import FleetSnapshot, Policy
from policies.types import BIN_S, Capacity
from process.progress import in_words
from simulation.traces.request import Request
from simulation.virtual.capacity import capacity_of
from simulation.virtual.cloud import SimulatedCloud, times_for
from simulation.virtual.setting import Setting
from vast.rows import Offer

LOOK_S = 900.0
"""Seconds of the trace that are looked at: a quarter of an hour has some bursts in it."""

LOOK_MOST = 200_000
"""Most requests that are looked at: they are kept in memory."""

BUSIEST_S = 300.0
"""Seconds of the busiest part: as long as the policy's fast mean, so that it would have followed."""

MOST_ROUNDS = 100
"""Most times that a policy is asked until its answer stays: busy needs two."""

LEAST_SCORED = 0.75
"""Share of a trace shorter than LOOK_S that counts at least, however long a start takes."""


@dataclass(frozen=True)
class Beginning:
    """What a run begins with, and what its trace's first quarter of an hour offers.

    hot, pool: instances; is_needed: no flag said them. offered, busiest: work that arrives in looked_s
    seconds and in the busiest part of them, in instances' worth. lead_in_s: seconds that are played once
    before; score_from_s: the second of the trace from which on it counts.
    """

    hot: int
    pool: int
    is_needed: bool
    offered: float
    busiest: float
    looked_s: float
    lead_in_s: float
    score_from_s: float

    @property
    def too_small(self) -> bool:
        """Whether more arrives from the beginning on than the hot instances can serve."""
        return self.hot < self.offered

    def report(self) -> dict[str, Any]:
        """Return it for the report, with the sentences for people."""
        return asdict(self) | {"too_small": self.too_small, "sentences": self._sentences()}

    def _sentences(self) -> list[str]:
        looked = f"its first {in_words(self.looked_s)} offer {self.offered:.1f} instances' worth"
        if self.busiest > self.offered:
            looked += f", {self.busiest:.1f} when busiest"
        why = "as the policy would keep" if self.is_needed else "as the flags say"
        said = [f"{self.hot} hot of {self.pool} loaded, {why}; {looked}"]
        if self.too_small:
            said.append("The fleet begins too small for what arrives: requests wait until it has grown")
        uncounted = [
            f"{seconds:.0f} s {what}"
            for seconds, what in ((self.lead_in_s, "played once before"), (self.score_from_s, "of the trace"))
            if seconds > 0.0
        ]
        if uncounted:
            said.append(f"not counted: the first {' and the first '.join(uncounted)}")
        return said


def begin(
    setting: Setting,
    policy: Policy,
    requests: Iterator[Request],
    *,
    hot: int | None,
    pool: int | None,
    lead_in_s: float | None,
    score_from_s: float | None,
) -> tuple[Setting, Beginning, Iterator[Request]]:
    """Return the setting with what the run begins with, what that is, and the requests as they were.

    hot, pool, lead_in_s, score_from_s: as the flags say; None: as the first quarter of an hour needs. Of the
    requests the first LOOK_S seconds are read, or as many as are played before.
    """
    seen, length_s, whole = _first(requests, max(LOOK_S, lead_in_s or 0.0))
    looked_s = max(1.0, length_s)
    offers = _offers(setting)
    offered = busiest = 0.0
    wanted_hot = wanted_pool = 0
    if seen and offers:
        best = offers[0]
        capacity = capacity_of(setting.profile, setting.timing_of(best), seen, setting.slo)
        work = _work(setting, seen, looked_s)
        mean, most = sum(work) / len(work), _busiest(work)
        offered, busiest = mean / capacity.work_s, most / capacity.work_s
        wanted_hot, _ = _kept(policy, mean, capacity)
        _, wanted_pool = _kept(policy, most, capacity)
        room = _room(setting, offers)
        wanted_hot, wanted_pool = min(wanted_hot, room), min(wanted_pool, room)
    begin_pool = max(hot or 0, wanted_hot, wanted_pool) if pool is None else pool
    begin_hot = min(wanted_hot, begin_pool) if hot is None else hot
    if lead_in_s is None:
        lead_in_s = LOOK_S if hot is None else 0.0
    lead_in_s = min(lead_in_s, length_s)
    if score_from_s is None:
        score_from_s = longest_start_s(setting)
        if whole:
            score_from_s = min(score_from_s, (1.0 - LEAST_SCORED) * length_s)
    found = Beginning(
        begin_hot,
        max(begin_pool, begin_hot),
        hot is None and pool is None,
        round(offered, 2),
        round(busiest, 2),
        round(looked_s, 3),
        round(lead_in_s, 3),
        round(score_from_s, 3),
    )
    told = replace(
        setting,
        hot=found.hot,
        pool=found.pool,
        lead_in_s=found.lead_in_s,
        score_from_s=found.score_from_s,
    )
    before = [r._replace(at_s=r.at_s - found.lead_in_s) for r in seen if r.at_s < found.lead_in_s]
    return told, found, chain(before, seen, requests)


def _first(requests: Iterator[Request], for_s: float) -> tuple[list[Request], float, bool]:
    """Return the first for_s seconds of a trace, how many seconds they are, and whether that is all of it."""
    seen: list[Request] = []
    for request in requests:
        seen.append(request)
        if request.at_s >= for_s or len(seen) == LOOK_MOST:
            return seen, min(for_s, request.at_s), False
    return seen, seen[-1].at_s if seen else 0.0, True


def longest_start_s(setting: Setting) -> float:
    """Return the most seconds from start to hot of an instance that has the model on its disk."""
    times = setting.times or times_for(setting.profile)
    return (times.restart_s + times.start_s * (1.0 + times.spread)) / setting.speedup


def _offers(setting: Setting) -> Sequence[Offer]:
    """Return what can be rented, in the order in which the autoscaler takes it."""
    market = Market(setting.profile, Deadlines.for_profile(setting.profile))
    cloud = SimulatedCloud(setting.machines, setting.profile, random.Random(0))
    market.end_search(cloud.offers(0.0), 0.0)
    return market.snapshot(0.0).offers


def _room(setting: Setting, offers: Iterable[Offer]) -> int:
    """Return how many instances the hard limits have room for when all of them run."""
    spent = 0.0
    room = 0
    for offer in offers:
        spent += offer.dph_total
        if spent > setting.limits.max_usd_h or room == setting.limits.max_instances:
            break
        room += 1
    return room


def _work(setting: Setting, requests: Iterable[Request], looked_s: float) -> list[float]:
    """Return the work per second that arrives in each BIN_S seconds."""
    profile = setting.profile
    bins = [0.0] * max(1, math.ceil(looked_s / BIN_S))
    for r in requests:
        at = min(len(bins) - 1, int(r.at_s / BIN_S))
        bins[at] += (profile.prefill_weight * r.prompt_tokens + r.output_tokens) / BIN_S
    return bins


def _busiest(work: Sequence[float]) -> float:
    """Return the largest mean over BUSIEST_S seconds."""
    width = min(len(work), round(BUSIEST_S / BIN_S))
    total = most = sum(work[:width])
    for at in range(width, len(work)):
        total += work[at] - work[at - width]
        most = max(most, total)
    return most / width


def _kept(policy: Policy, work_s: float, capacity: Capacity) -> tuple[int, int]:
    """Return how many hot instances, and how many in all, a policy settles at under a steady load."""
    demand = work_s / capacity.work_s
    bins = round(LOOK_S / BIN_S)
    hot = total = 0
    for _ in range(MOST_ROUNDS):
        seen = FleetSnapshot(
            now=LOOK_S,
            demand=[(BIN_S * n, demand) for n in range(bins + 1)],
            hot=hot,
            coming=0,
            loading=0,
            cold=total - hot,
            draining=0,
            start_time_s=0.0,
            load_time_s=0.0,
            capacity=capacity,
            arriving=[work_s] * bins,
        )
        wanted = policy.targets(seen)
        if (wanted.hot, wanted.total) == (hot, total):
            break
        hot, total = max(0, wanted.hot), max(wanted.hot, wanted.total)
    return hot, total
