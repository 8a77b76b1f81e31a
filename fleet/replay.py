"""Request and reply of a replay, which finds the level of the objective policy for the fleet's last day.

The request holds times and counts of what arrived; nothing of what was asked is known here. The other end is
simulation/virtual/replay.py, in a process of its own.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from engine.slo import Slo
from fleet.arrivals import Arrived
from policies import Capacity
from policies.objective import Objective
from policies.tuning import MARGIN

Point = dict[str, float]
"""A point of the curve: `met`, `usd_day`, `k` of the shape that is cheapest there, `reached` (0 or 1)."""

LEVEL = ("k", "fast_s", "slow_s", "slow_share", "hold_s", "drain_s", "pool", "pool_headroom")
"""Fields of the policy that a replay may set; the others are the operator's."""

WINDOW_S = 86_400
"""Seconds that are replayed: a day, because load has the rhythm of a day."""

LEAST_S = 1200
"""Seconds of arrivals below which there is nothing to learn from, and the defaults stand."""

SEED = 1
"""Seed of the start times in every replay, so that two levels, or two days, are compared on equal luck."""


class BadReply(Exception):
    """A replay's answer holds no valid level; the message says what is wrong."""


@dataclass(frozen=True)
class ReplayDay:
    """What is replayed: the arrivals of a day, and the fleet that is to serve them.

    goal: share of requests to be in time. until: the second after the last, which may have been quiet.
    start_s: shortest and longest seconds from start to hot. load_s: seconds from order to hot.
    """

    goal: float
    arrived: Sequence[Arrived]
    until: int
    slo: Slo
    prefill_weight: float
    capacity: Capacity
    start_s: tuple[float, float]
    load_s: float
    running_usd_h: float
    stopped_usd_h: float
    late_lane: bool
    max_instances: int
    margin: float = MARGIN
    loaded: int = 0

    @property
    def seconds(self) -> int:
        """How many seconds are replayed, from the first arrival to the end."""
        return self.until - self.arrived[0].second

    @property
    def requests(self) -> float:
        """How many requests arrived in the time that is replayed."""
        return sum(a.requests for a in self.arrived)


@dataclass(frozen=True)
class TuningResult:
    """The result of one replay.

    level: fields of the policy; the rest is for people (`GET /policy/curve`). at: when, epoch seconds. hours,
    requests: of the day that was replayed. chosen: the point of the curve.
    """

    at: float
    goal: float
    level: Mapping[str, float]
    hours: float
    requests: float
    curve: Sequence[Point]
    chosen: Point


def request_of(day: ReplayDay) -> dict[str, Any]:
    """Return the message to the replay process: arrays with a value a second, and the fleet.

    limit_s: how long requests of that second may wait: the limit of the first token less what reading the
    prompt takes, as the loadbalancer reckons it. Of a second without requests it says nothing.
    """
    seconds = day.seconds
    work, requests = [0.0] * seconds, [0.0] * seconds
    limit_s = [day.slo.first_token_s] * seconds
    for a in day.arrived:
        at = a.second - day.arrived[0].second
        work[at], requests[at] = round(a.work, 3), round(a.requests, 3)
        if a.requests > 0.0:
            prompt = a.prompt_tokens / a.requests
            read_s = prompt * day.prefill_weight / day.capacity.work_s
            limit_s[at] = round(max(0.0, day.slo.first_token_limit_s(prompt) - read_s), 3)
    return {
        "bins": {"work": work, "requests": requests, "limit_s": limit_s},
        "goal": day.goal,
        "capacity": asdict(day.capacity),
        "start_s": list(day.start_s),
        "load_s": day.load_s,
        "running_usd_h": day.running_usd_h,
        "stopped_usd_h": day.stopped_usd_h,
        "late_lane": day.late_lane,
        "max_instances": day.max_instances,
        "seed": SEED,
        "margin": day.margin,
    }


def parse_reply(raw: bytes, policy: Objective) -> tuple[dict[str, float], list[Point], Point]:
    """Return (level, curve, chosen point) of a replay's reply; raise BadReply when it is not valid."""
    try:
        said = json.loads(raw)
    except ValueError as e:
        raise BadReply(f"no JSON: {e}") from None
    level, curve = _level_and_curve(said, policy)
    misses, usd_day = said.get("misses"), said.get("usd_day")
    if not _is_number(misses) or not _is_number(usd_day) or not isinstance(said.get("reached"), bool):
        raise BadReply("misses, usd_day and reached: wanted two numbers and a boolean")
    chosen = {"met": 1.0 - misses, "usd_day": usd_day, "k": level["k"], "reached": float(said["reached"])}
    return level, curve, chosen


def _level_and_curve(said: object, policy: Objective) -> tuple[dict[str, float], list[Point]]:
    if not isinstance(said, dict) or not isinstance(said.get("level"), dict):
        raise BadReply(f"wanted an object with level and curve, got {said!r:.80}")
    level: dict[str, float] = {}
    for name, value in said["level"].items():
        if name not in LEVEL or not _is_number(value):
            raise BadReply(f"level.{str(name)[:40]} {value!r:.40}: wanted numbers, of {', '.join(LEVEL)}")
        level[name] = int(value) if name == "pool" and value == int(value) else value
    if not level.get("k", 0.0) > 0.0:
        raise BadReply("level.k: is missing")
    try:
        replace(policy, **level)  # type: ignore[arg-type]
    except ValueError as e:
        raise BadReply(f"level: {e}") from None
    curve = said.get("curve")
    if not isinstance(curve, list) or not curve:
        raise BadReply("curve: wanted a list of points")
    return level, [_point(p, f"curve[{n}]") for n, p in enumerate(curve)]


def _point(said: object, name: str) -> Point:
    if not isinstance(said, dict) or not {"met", "usd_day", "k"} <= said.keys():
        raise BadReply(f"{name}: wanted met, usd_day and k")
    if not all(_is_number(value) for value in said.values()):
        raise BadReply(f"{name}: wanted numbers")
    return dict(said)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def parse_result(raw: bytes, now: float) -> TuningResult:
    """Return the tuning result that an earlier process wrote down; raise BadReply or ValueError."""
    said = json.loads(raw)
    if not isinstance(said, dict) or not all(_is_number(said.get(n)) for n in ("at", "hours", "requests")):
        raise BadReply("wanted an object with at, hours and requests")
    level, curve = _level_and_curve(said, Objective(goal=said.get("goal", 0.0)))
    chosen = _point(said.get("chosen"), "chosen")
    at = min(said["at"], now)  # the machine's clock may have been set back since
    return TuningResult(at, said["goal"], level, said["hours"], said["requests"], curve, chosen)
