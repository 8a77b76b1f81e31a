"""What the operator's page shows: how things stand (GET /overview), and how it came about (GET /history)."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fleet import contract_ends
from fleet.alarms import AlarmFacts, wrong_now
from fleet.commands import Command, Create, Destroy, LookForOffers
from fleet.costs import SPENT_ON, CostBreakdown
from fleet.history import columns
from fleet.instance import Instance
from fleet.journal import Decision
from fleet.outside.audit import AuditTrail
from fleet.outside.costs import contract_money, credit_shown
from fleet.outside.ledger_reading import DAY_S
from fleet.outside.tuner import NoCurve, Tuner
from fleet.outside.turns import Autoscaler
from fleet.outside.what_if_runs import WhatIfRuns
from policies import Objective

IN_TIME_OVER_S = 600.0
"""Seconds of requests whose share in time is shown."""

DECISIONS_SHOWN = 60
"""The newest ones; `GET /decisions` has all that are remembered."""

MONEY_EVERY_S = 15.0
"""Seconds for which sums over the ledger hold: to add up a large fleet's day takes tens of milliseconds."""

LEAST_KNOWN_S = 3600.0
"""Seconds of dollars that are known, from which on a month is told from them."""

DAYS_A_MONTH = 30.0


@dataclass(frozen=True)
class FleetPlace:
    """What the operator's page says of this autoscaler process.

    cloud: where the instances are. local: it is a local cloud.
    """

    label: str
    cloud: str
    local: bool
    speedup: float


class Overview:
    """Makes the answers of GET /overview and GET /history; any thread may call."""

    def __init__(
        self,
        scaler: Autoscaler,
        place: FleetPlace,
        tuner: Tuner | None = None,
        audit: AuditTrail | None = None,
        what_if: WhatIfRuns | None = None,
    ) -> None:
        """Describe an autoscaler.

        place: what is said of its process. tuner: knows what other goals cost. audit: what was done by hand.
        what_if: runs in virtual time that were asked for.
        """
        self._scaler = scaler
        self._place = place
        self._tuner = tuner
        self._audit = audit
        self._what_if = what_if
        self.clock = scaler.clock
        self._money: tuple[float, dict[str, Any]] | None = None

    def now(self, health: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer of GET /overview: how things stand. health: the answer of GET /health."""
        scaler = self._scaler
        now = scaler.clock()
        money = self._sums(now)
        with scaler.lock:
            instances, policy = scaler.instances, scaler.policy
            there, gone = instances.describe(now)
            use = scaler.demand.use_of_instances()
            rows = [row | _load(i, use) for row, i in zip(there, sorted(instances, key=_order), strict=True)]
            found = list(scaler.decisions)[-DECISIONS_SHOWN:]
            bans = {m: u for m, u in instances.market.bad_machines.items() if u > now}
            reasons = dict(instances.market.bad_reasons)
            in_time = scaler.history.share_in_time(IN_TIME_OVER_S, now)
            latest, manage, limits = scaler.history.latest, instances.manage, instances.limits
            committed = instances.committed()
            budgets = {s.period.name: s.shown() for s in instances.money.budgets.standings}
            wrong = wrong_now(  # the share in time is in the strip
                AlarmFacts(
                    hot=instances.hot,
                    demand=scaler.demand.demand,
                    held=scaler.demand.held,
                    usd_h=sum(i.price_usd_h for i in instances),
                    limit_usd_h=limits.max_usd_h,
                    budgets_near=instances.money.warnings(),
                    contracts_end=contract_ends.ending(instances, instances.horizon, now).values(),
                    charges_off_usd=instances.money.charges_off_usd,
                )
            )
            start_s, load_s = instances.durations.start_s, instances.durations.load_s
            profile = instances.profile
        return {
            "now": now,
            "fleet": asdict(self._place) | {"model": profile.name, "hold_s": profile.hold_s},
            "health": health,
            "wrong": list(wrong.values()),
            "manage": manage,
            "policy": {"name": type(policy).__name__.lower(), "goal": _goal(policy)},
            "curve": self._curve(),
            "in_time": in_time,
            "latest": None if latest is None else asdict(latest),
            "start_s": start_s,
            "load_s": load_s,
            "limits": {
                "instances": limits.max_instances,
                "usd_h": limits.max_usd_h,
                "committed_usd_h": committed.usd_h,
            },
            "money": money | {"budgets": budgets, "credit": credit_shown(scaler)} | contract_money(scaler),
            "instances": rows,
            "gone": gone,
            "decisions": [told(d) for d in reversed(found)],
            "what_if": {"state": "none"} if self._what_if is None else self._what_if.state(),
            "acts": [] if self._audit is None else self._audit.newest(),
            "holds": [hold.shown() for hold in instances.holds],
            "bans": [
                {"machine": m, "until": until, "evidence": reasons.get(m, "before the last restart")}
                for m, until in bans.items()
            ],
        }

    def _curve(self) -> dict[str, Any]:
        try:
            return {"message": "no replays are made"} if self._tuner is None else self._tuner.curve()
        except NoCurve as e:
            return {"message": str(e)}

    def history(self, from_s: float, to_s: float, points: int) -> dict[str, Any]:
        """Return the answer of GET /history: the window's samples as columns of at most `points` values."""
        with self._scaler.lock:
            samples, begin = self._scaler.history.since(from_s), self._scaler.history.begins_at
        if from_s < begin:
            samples = self._scaler.ledger.samples(from_s, min(begin, to_s)) + samples
        return {"from": from_s, "to": to_s, **columns([s for s in samples if s.at_s < to_s], points)}

    def _sums(self, now: float) -> dict[str, Any]:
        if self._money is None or now - self._money[0] > MONEY_EVERY_S:
            self._scaler.try_write_counts()
            midnight = _midnight(now)
            ledger = self._scaler.ledger
            day = ledger.costs(now - DAY_S, now)
            begins_at = ledger.begins_at()
            known_s = min(DAY_S, now - (now if begins_at is None else begins_at))
            sums = {
                "today": _by_kind(ledger.costs(midnight, now)),
                "yesterday": _by_kind(ledger.costs(midnight - DAY_S, midnight)),
                "month_usd": day.total / known_s * DAY_S * DAYS_A_MONTH if known_s >= LEAST_KNOWN_S else None,
                "known_from": begins_at,
            }
            self._money = now, sums
        return self._money[1]


def told(d: Decision) -> dict[str, Any]:
    """Return a decision for people: a sentence, its orders, and the evidence of those that cost money."""
    said = []
    if d.seen is not None and d.targets is not None:
        demand = d.seen.demand[-1][1] if d.seen.demand else 0.0
        waits = f", {d.seen.traffic.held:g} requests waiting" if d.seen.traffic.held else ""
        said.append(
            f"The load is {demand:.2f} instances' worth{waits}; {d.seen.hot} hot of {d.seen.total}. "
            f"Wanted: {d.targets.hot} hot, {d.targets.total} in all ({d.targets.why})."
        )
    said += [f"{note[:1].upper()}{note[1:]}." for note in d.notes]
    return {
        "at": d.at,
        "sentence": " ".join(said),
        "orders": [_order_told(c) for c in d.commands],
    }


def _order_told(c: Command) -> dict[str, str]:
    shown = {"do": type(c).__name__.lower(), "why": c.why}
    if not isinstance(c, LookForOffers):
        shown["label"] = c.label
    if isinstance(c, Create | Destroy):
        shown["evidence"] = c.evidence
    return shown


def _order(i: Instance) -> tuple[float, str]:
    return i.ordered_at, i.label


def _load(i: Instance, use: Mapping[int, tuple[int, float, int]]) -> dict[str, Any]:
    """Return the load of an instance, by the loadbalancers, and its $ per million units of work."""
    requests, work, failures = use.get(i.id, (0, 0.0, 0)) if i.id is not None else (0, 0.0, 0)
    return {
        "requests": requests,
        "work": round(work, 1),
        "failures": failures,
        "usd_per_million_work": round(i.usd_per_work / 3600.0 * 1e6, 4),
        "taken_out": "replace" if i.taken_out.for_good else "drain" if i.taken_out else None,
    }


def _goal(policy: object) -> float | None:
    return policy.goal if isinstance(policy, Objective) else None


def _by_kind(costs: CostBreakdown) -> dict[str, float]:
    return {"total": costs.total} | {kind: getattr(costs, kind) for kind in SPENT_ON}


def _midnight(now: float) -> float:
    """Return when the present day began, by this computer's time zone."""
    local = time.localtime(now)
    return now - (local.tm_hour * 3600 + local.tm_min * 60 + local.tm_sec)
