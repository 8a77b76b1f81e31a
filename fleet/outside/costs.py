"""What the fleet costs, as the answer of GET /costs."""

from dataclasses import asdict
from typing import Any

from fleet.budget import day_of
from fleet.outside.turns import Autoscaler


def cost_answer(scaler: Autoscaler, from_s: float, to_s: float) -> dict[str, Any]:
    """Return the answer to GET /costs: what a window of time cost, its intervals, what is being spent now."""
    unwritten = not scaler.try_write_counts()
    costs = scaler.ledger.costs(from_s, to_s)
    took = scaler.ledger.durations(from_s, to_s)
    money = scaler.instances.money
    with scaler.lock:
        burn = sum(i.price_usd_h for i in scaler.instances)
        committed = scaler.instances.committed().usd_h
        limit = scaler.instances.limits.max_usd_h

    def count(kind: str) -> int:
        return sum(k == kind for k, _, _ in took)

    return {
        "from": from_s,
        "known_from": scaler.ledger.begins_at(),
        "unwritten": unwritten,
        "unwatched": scaler.ledger.unwatched(from_s, to_s),
        "to": to_s,
        "usd": {
            "total": costs.total,
            "hot_working": costs.hot_working,
            "hot_idle": costs.hot_idle,
            "loading": costs.loading,
            "stopped": costs.stopped,
            "lost": costs.lost,
            "traffic": costs.traffic,
        },
        "usd_if_all_hot": costs.usd_if_all_hot,
        "utilisation": costs.utilisation,
        "burn_usd_h": burn,
        "committed_usd_h": committed,
        "budget_left_usd_h": limit - committed,
        "budgets": {s.period.name: s.shown() for s in money.budgets.standings},
        "credit": credit_shown(scaler),
        "forecast_today_usd": _forecast(scaler, burn),
        **contract_money(scaler),
        "starts": count("start"),
        "stops": count("stop"),
        "creates": count("create"),
        "destroys": count("destroyed"),
        "order_to_hot_s": [round(s, 3) for kind, _, s in took if kind in ("boot", "load")],
        "traffic": [asdict(t) for t in costs.bytes_billed],
        "intervals": [
            {
                "instance": s.instance,
                "label": s.label,
                "machine": s.machine,
                "state": s.state,
                "from": s.from_s,
                "to": s.to_s,
                "usd_h": s.usd_h,
                "usd": s.usd_h * s.seconds_within(from_s, to_s) / 3600.0,
                "why": s.why,
            }
            for s in costs.intervals
        ],
    }


def _forecast(scaler: Autoscaler, usd_h: float) -> float:
    """Return what today (UTC) will have cost if the fleet goes on at that rate."""
    now = scaler.clock()
    begin, end = day_of(now)
    return scaler.ledger.spent(begin, now) + usd_h * (end - now) / 3600.0


def contract_money(scaler: Autoscaler) -> dict[str, Any]:
    """Return what hosts ask for going on, and the days that were held against the account's charges."""
    money = scaler.instances.money
    asked = [
        {
            "instance": one.increase.instance,
            "old_usd_h": round(one.increase.old_usd_h, 6),
            "new_usd_h": round(one.increase.new_usd_h, 6),
            "end": one.increase.end_at,
            "verdict": str(one.verdict),
            "why": one.why,
        }
        for one in money.increases
    ]
    return {"price_increases": asked, "reconciled": [day.shown() for day in money.reconciled]}


def credit_shown(scaler: Autoscaler) -> dict[str, float | None]:
    """Return the account's credit, and for how many hours it lasts at the present rate; None: not known."""
    with scaler.lock:
        credit = scaler.instances.money.credit
        hours = credit.hours_left(sum(i.price_usd_h for i in scaler.instances))
    return {"usd": credit.usd, "hours_left": None if hours is None else round(hours, 2)}


def account_health(scaler: Autoscaler) -> dict[str, Any]:
    """Return what GET /health says of money: the credit, where it is known, and budgets near their ends."""
    credit, warnings = credit_shown(scaler), scaler.instances.money.warnings()
    said: dict[str, Any] = {} if credit["usd"] is None else {"credit": credit}
    if warnings:
        said["warnings"] = list(warnings.values())
    return said
