"""The level of the policy, found every half hour by replaying the fleet's own last day in another process.

    ledger: arrivals of the last 24 h ─► request ─► simulation.virtual.replay ─► reply ─► policy, level.json
                                                     (one at a time, dies with us)

The operator says the goal: the share of requests that shall be in time. Replay answers with the level that
would have kept it yesterday at the least cost, and with the curve of what the other levels would have cost.
A replay that fails, hangs or answers nonsense costs nothing: it is logged, and the level stays as it is.

- A level is set only on the policy it was found for: what an operator has set meanwhile stands.
- A level that an operator gave by hand (k) is left alone; he still gets the curve.
- The last result is in the state directory, so that a restarted autoscaler goes on with it.
- Requests hold times and counts of what arrived; of what was asked nothing is known here.
"""

import json
import logging
import math
import os
import signal
import sqlite3
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.slo import Slo
from fleet.demand import Arrived
from fleet.outside.turns import Autoscaler
from policies import Capacity, Policy
from policies.objective import Objective
from policies.tuning import KeptPool, Margin, worth_keeping_s
from process.children import dying_with_parent

log = logging.getLogger("autoscaler")

Point = dict[str, float]
"""Of the curve: `met`, `usd_day`, `k` of the shape that is cheapest there, `reached` (0 or 1)."""

LEVEL = ("k", "fast_s", "slow_s", "slow_share", "hold_s", "drain_s", "pool", "pool_headroom")
"""What of the policy a replay may set; the rest is the operator's."""

WINDOW_S = 86_400
"""Replayed: a day, because load has the rhythm of a day."""

LEAST_S = 1200
"""With less than twenty minutes of arrivals there is nothing to learn from, and the defaults stand."""

MOST_REPLY = 4 * 2**20
"""Bytes of a reply: a curve of a thousand levels is 200 kB."""

SEED = 1
"""Of the start times in every replay, so that two levels, and two days, are compared on the same luck."""

ROOT = Path(__file__).parents[2]

SAFE_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR")
"""What the replay gets of our environment: no key is among it."""


class NoCurve(Exception):
    """There is no curve yet; the message says why."""


class BadReply(Exception):
    """A replay answered what is not a level; the message says what."""


@dataclass(frozen=True)
class Tuned:
    """One result. level: fields of the policy; the rest is for people (`GET /policy/curve`).

    at: when, epoch seconds. hours, requests: of the day that was replayed. chosen: the point of the curve.
    """

    at: float
    goal: float
    level: Mapping[str, float]
    hours: float
    requests: float
    curve: Sequence[Point]
    chosen: Point


@dataclass(frozen=True)
class Day:
    """What is replayed, and on what. until: the second after the last, which may have been quiet."""

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
    margin: float = 0.8
    loaded: int = 0

    @property
    def seconds(self) -> int:
        """From the first arrival to the end."""
        return self.until - self.arrived[0].second

    @property
    def requests(self) -> float:
        """How many arrived."""
        return sum(a.requests for a in self.arrived)


def request_of(day: Day) -> dict[str, Any]:
    """What the replay is asked: the arrays of simulation/virtual/replay.py, a value a second, and the fleet.

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
    """Level, curve and chosen point; raises BadReply when the policy could not have that level."""
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


def tuned_from(raw: bytes, now: float) -> Tuned:
    """The result as an earlier process has written it down; raises BadReply, ValueError and such."""
    said = json.loads(raw)
    if not isinstance(said, dict) or not all(_is_number(said.get(n)) for n in ("at", "hours", "requests")):
        raise BadReply("wanted an object with at, hours and requests")
    level, curve = _level_and_curve(said, Objective(goal=said.get("goal", 0.0)))
    chosen = _point(said.get("chosen"), "chosen")
    at = min(said["at"], now)  # the machine's clock may have been set back since
    return Tuned(at, said["goal"], level, said["hours"], said["requests"], curve, chosen)


# --- outside world ---------------------------------------------------------------------------------


class Tuner:
    """Sets the policy's level. `run` is a thread of its own; the rest may be called from others."""

    def __init__(
        self,
        scaler: Autoscaler,
        state_dir: Path,
        command: Sequence[str],
        every_s: float = 1800.0,
        timeout_s: float = 600.0,
    ) -> None:
        """Take over the last result, if there is one for the policy's goal.

        command: what reads a request from its input and prints a reply. every_s: from one replay to the next;
        0: none is made. timeout_s: a replay takes seconds; ten minutes are a fault.
        """
        self._scaler = scaler
        self._file = state_dir / "level.json"
        self._every_s = every_s
        self._timeout_s = timeout_s
        self._command = command
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._news = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._tried: tuple[float, float] | None = None  # (when, goal) of the last attempt
        self._trouble: str | None = None
        self._given: Policy | None = None  # the policy with the level that we have set
        self._pool: KeptPool | None = None
        self._margin: Margin | None = None
        self._counted = (0.0, 0)  # requests and late ones so far, at the last replay
        self._last = self._remembered()
        if self._last is not None:
            with scaler.lock:
                self._apply(scaler.policy, self._last)

    # -- what others ask ----------------------------------------------------------------------------

    def curve(self) -> dict[str, Any]:
        """What each level would have cost yesterday, for `GET /policy/curve`; raises NoCurve."""
        with self._scaler.lock:
            policy = self._scaler.policy
        last = self._last
        if last is not None:
            shown = asdict(policy) if isinstance(policy, Objective) else {}
            shown.pop("settled_at", None)  # a matter between replay and policy
            return {
                "at": last.at,
                "goal": last.goal,
                "policy": shown,
                "hours": round(last.hours, 3),
                "requests": round(last.requests),
                "curve": [dict(p) for p in last.curve],
                "chosen": dict(last.chosen),
            }
        if not isinstance(policy, Objective):
            raise NoCurve(f"the policy is {type(policy).__name__.lower()}, which has no goal")
        if self._every_s <= 0.0:
            raise NoCurve("replays are turned off (--replay-every-s 0)")
        if self._trouble is not None:
            raise NoCurve(f"the last replay failed: {self._trouble}")
        raise NoCurve(f"there are not yet {LEAST_S // 60} minutes of arrivals to replay")

    def policy_was_set(self) -> None:
        """An operator has set a policy: it gets the level that is known for its goal, or is tuned at once."""
        with self._scaler.lock:
            if self._last is not None:
                self._apply(self._scaler.policy, self._last)
        self._news.set()

    # -- the loop -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Replay whenever it is due, until `stop`."""
        while not self._stopping.is_set():
            if self.due():
                try:
                    self.tune()
                except Exception:  # nothing that happens here may end the loop
                    log.exception("a replay failed for a fault of ours; the level stays as it is")
            self._news.wait(min(30.0, max(1.0, self._every_s / 10.0)))
            self._news.clear()

    def stop(self) -> None:
        """End `run`, and the replay that is under way."""
        self._stopping.set()
        self._news.set()
        with self._lock:
            child = self._child
        if child is not None:
            _kill(child)

    def due(self) -> bool:
        """Whether a replay is to be made now: the last one is old, or was for another goal."""
        policy = self._scaler.policy
        if self._every_s <= 0.0 or not isinstance(policy, Objective):
            return False
        now, last = self._scaler.clock(), self._last
        if self._tried is not None and self._tried[1] == policy.goal:
            return now - self._tried[0] >= self._every_s
        return last is None or last.goal != policy.goal or now - last.at >= self._every_s

    def tune(self) -> bool:
        """Make one replay now and set the level it finds; whether there is a new result.

        False when there is too little to replay, or when the replay fails: then it is logged why.
        """
        policy = self._scaler.policy
        if not isinstance(policy, Objective):
            return False
        day = self._day(policy)
        if day is None:
            return False
        now = self._scaler.clock()
        self._tried = (now, policy.goal)
        try:
            raw = self._replay(json.dumps(request_of(day)).encode())
            level, curve, chosen = parse_reply(raw, policy)
            level = self._with_kept_pool(level, day, now)
        except (BadReply, OSError, subprocess.TimeoutExpired) as e:
            if not self._stopping.is_set():
                self._trouble = _words(e)
                log.warning("replay failed, the level stays as it is: %s", self._trouble)
            return False
        self._trouble = None
        tuned = Tuned(now, policy.goal, level, day.seconds / 3600.0, day.requests, curve, chosen)
        self._last = tuned
        with self._scaler.lock:
            applied = self._apply(policy, tuned, settled_at=self._scaler.clock())
        log.info(
            "replayed %.1f h: %s gives %.4f in time for %.2f $/day%s%s",
            tuned.hours,
            ", ".join(f"{name} {value:g}" for name, value in level.items()),
            chosen["met"],
            chosen["usd_day"],
            "" if chosen["reached"] else ", and nothing that was tried keeps the goal",
            "" if applied else "; not used, the policy was set by hand",
        )
        self._keep(tuned)
        return True

    # -- inside -------------------------------------------------------------------------------------

    def _apply(self, found_for: Policy, tuned: Tuned, settled_at: float | None = None) -> bool:
        """Give the policy that level, if it is still the one and its level is not the operator's; locked."""
        policy = self._scaler.policy
        if policy is not found_for or not isinstance(policy, Objective) or policy.goal != tuned.goal:
            return False
        if policy.k > 0.0 and policy is not self._given:
            return False
        made = replace(policy, **tuned.level)  # type: ignore[arg-type]
        if settled_at is not None and "pool" in tuned.level:
            made = replace(made, settled_at=settled_at)
        self._given = made
        self._scaler.set_policy(made)
        return True

    def _with_kept_pool(self, level: dict[str, float], day: Day, now: float) -> dict[str, float]:
        """The level with the largest pool of the last replays, for as long as storage is cheaper than a load.

        What is there at the first replay counts as found then.
        """
        keep_s = worth_keeping_s(day.load_s, day.running_usd_h, day.stopped_usd_h)
        if self._pool is None:
            self._pool = KeptPool()
            self._pool.note(now, day.loaded, keep_s)
        return (
            level | {"pool": self._pool.note(now, int(level["pool"]), keep_s)} if "pool" in level else level
        )

    def _day(self, policy: Objective) -> Day | None:
        """The last day as it is to be replayed; None while there is too little of it."""
        scaler = self._scaler
        try:
            scaler.write_counts()
            now = scaler.clock()
            arrived = scaler.ledger.arrived(now - WINDOW_S, now)
        except sqlite3.Error as e:
            self._trouble = f"the ledger cannot be read: {e}"
            log.warning("no replay: %s", self._trouble)
            return None
        if not arrived or now - arrived[0].second < LEAST_S:
            return None
        with scaler.lock:
            fleet = scaler.instances
            seen = fleet.snapshot(scaler.demand, now, 0.0)
            start_s, load_s = fleet.durations.start_range_s, fleet.durations.load_s
            slo, late_lane = scaler.demand.slo, scaler.demand.late_bound_s is not None
            late = scaler.demand.turned_late
            loaded = sum(i.loaded for i in fleet)
        if seen.capacity is None or seen.running_usd_h <= 0.0:
            return None  # nothing was ever rented: there is no price to weigh
        if self._margin is None or self._margin.goal != policy.goal:
            self._margin = Margin(policy.goal)
        else:
            requests, missed = self._counted
            self._margin.note(max(0.0, seen.traffic.requests_total - requests), max(0, late - missed))
        self._counted = (seen.traffic.requests_total, late)
        return Day(
            policy.goal,
            arrived,
            max(int(now), arrived[-1].second + 1),
            slo,
            fleet.profile.prefill_weight,
            seen.capacity,
            start_s,
            load_s,
            seen.running_usd_h,
            seen.stopped_usd_h,
            late_lane,
            fleet.limits.max_instances,
            self._margin.share,
            loaded,
        )

    def _replay(self, request: bytes) -> bytes:
        """The reply of the process; raises OSError, TimeoutExpired or BadReply. It is ended when we stop."""
        environment = {name: os.environ[name] for name in SAFE_ENVIRONMENT if name in os.environ}
        with self._lock:
            if self._stopping.is_set():
                raise BadReply("the autoscaler ends")
            child = self._child = subprocess.Popen(
                dying_with_parent(self._command),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        with child:
            try:
                out, err = child.communicate(request, timeout=self._timeout_s)
            finally:
                _kill(child)
                with self._lock:
                    self._child = None
        if child.returncode != 0:
            last = err.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise BadReply(f"exit {child.returncode}: {last[0][:200]}")
        if len(out) > MOST_REPLY:
            raise BadReply(f"{len(out)} bytes; {MOST_REPLY} at most")
        return out

    def _keep(self, tuned: Tuned) -> None:
        """Write the result down in one step, 0600; a failure is logged."""
        made = None
        try:
            fd, made = tempfile.mkstemp(dir=self._file.parent, prefix=f".{self._file.name}.")
            with os.fdopen(fd, "w") as f:
                json.dump(asdict(tuned), f)
                f.flush()
                os.fsync(f.fileno())
            Path(made).replace(self._file)
        except OSError as e:
            log.warning("%s cannot be written, a restart will begin with the defaults: %s", self._file, e)
            if made is not None:
                Path(made).unlink(missing_ok=True)

    def _remembered(self) -> Tuned | None:
        """The result of the last process; None when there is none that can be used."""
        try:
            raw = self._file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as e:
            log.warning("%s cannot be read: %s", self._file, e)
            return None
        try:
            return tuned_from(raw, self._scaler.clock())
        except (BadReply, ValueError) as e:
            log.warning("%s is not a result of ours, the level begins with the defaults: %s", self._file, e)
            return None


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End it and what it has started; it is reaped."""
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _words(e: Exception) -> str:
    """In one line, without the command."""
    if isinstance(e, subprocess.TimeoutExpired):
        return f"no answer within {e.timeout:g} s"
    return f"{type(e).__name__}: {e}" if isinstance(e, OSError) else str(e)
