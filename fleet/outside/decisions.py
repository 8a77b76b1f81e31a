"""The answer of GET /decisions: the last decisions of the autoscaler."""

from dataclasses import asdict
from typing import Any

from fleet.commands import Command, Create, Destroy, LookForOffers
from fleet.outside.turns import Autoscaler


def decisions_answer(scaler: Autoscaler) -> dict[str, Any]:
    """Return what was seen, wanted and ordered, newest first; failed commands; machines not to be rented."""
    with scaler.lock:
        found, failures = list(scaler.decisions), list(scaler.failures)
        market, now = scaler.instances.market, scaler.clock()
        bans = [
            {"machine": m, "until": until, "evidence": market.bad_reasons.get(m, "before the last restart")}
            for m, until in market.bad_machines.items()
            if until > now
        ]
    return {
        "holds": [hold.shown() for hold in scaler.instances.holds],
        "bans": bans,
        "failures": [
            {"at": f.at, **_shown(f.command), "reply": f.reply, "why": f.why} for f in failures[::-1]
        ],
        "decisions": [
            {
                "at": d.at,
                "seen": d.seen
                and {k: v for k, v in asdict(d.seen).items() if k not in ("demand", "arriving")}
                | {"demand": d.seen.demand[-1][1] if d.seen.demand else 0.0},
                "targets": d.targets and asdict(d.targets),
                "commands": [_shown(c) | {"why": c.why} for c in d.commands],
                "notes": d.notes,
            }
            for d in found[::-1]
        ],
    }


def _shown(command: Command) -> dict[str, str]:
    """Return a command as JSON for people to read."""
    shown = {"do": type(command).__name__.lower()}
    if isinstance(command, Create | Destroy):
        shown["evidence"] = command.evidence
    return shown if isinstance(command, LookForOffers) else shown | {"label": command.label}
