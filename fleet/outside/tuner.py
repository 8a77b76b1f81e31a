"""The level of the policy, found every half hour by replaying the fleet's own last day.

    ledger: arrivals of the last 24 h ─► request ─► simulation.virtual.replay ─► reply ─► policy, level.json
                                                     (one at a time, dies with us)

The operator says the goal: the share of requests that shall be in time. Replay answers with the level that
would have kept it yesterday at the least cost, and with the curve of what the other levels would have cost.
A replay that fails, hangs or answers nonsense costs nothing: it is logged, and the level stays as it is.

- A level is set only on the policy it was found for: what an operator has set meanwhile stands.
- A level that an operator gave by hand (k) is left alone; there is a curve all the same.
- The last result is in the state directory, so that a restarted autoscaler goes on with it.
"""

import json
import logging
import os
import sqlite3
import subprocess
import tempfile
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from fleet.outside.turns import Autoscaler
from fleet.replay import (
    LEAST_S,
    WINDOW_S,
    BadReply,
    ReplayDay,
    TuningResult,
    parse_reply,
    parse_result,
    request_of,
)
from policies import Objective, Policy
from policies.tuning import KeptPool, Margin, worth_keeping_s

log = logging.getLogger("autoscaler")


class NoCurve(Exception):
    """There is no curve of levels and their costs yet; the message says why."""


class Replay(Protocol):
    """The protocol of what replays a day: outside virtual time fleet.outside.replay_process.ReplayProcess."""

    def run(self, request: bytes) -> bytes:
        """Return the reply of a replay; raise OSError, subprocess.TimeoutExpired or BadReply."""
        ...

    def stop(self) -> None:
        """End the replay that is under way, if there is one."""
        ...


# --- outside world ---------------------------------------------------------------------------------


class Tuner:
    """Sets the level of the policy. `run` is for a thread of its own; the rest may be called from others."""

    def __init__(self, scaler: Autoscaler, state_dir: Path, replay: Replay, every_s: float = 1800.0) -> None:
        """Tune the policy of an autoscaler; begin with the last result, if that was for the policy's goal.

        every_s: seconds from one replay to the next; 0: none is made.
        """
        self._scaler = scaler
        self._replay = replay
        self._file = LevelFile(state_dir / "level.json")
        self._every_s = every_s
        self._stopping = threading.Event()
        self._news = threading.Event()
        self._tried: tuple[float, float] | None = None  # (when, goal) of the last attempt
        self._trouble: str | None = None
        self._given: Policy | None = None  # the policy with the level that was set here
        self._pool: KeptPool | None = None
        self._margin: Margin | None = None
        self._counted = (0.0, 0)  # requests and late ones so far, at the last replay
        self._last = self._file.read(scaler.clock())
        if self._last is not None:
            with scaler.lock:
                self._apply(scaler.policy, self._last)

    # -- what others ask ----------------------------------------------------------------------------

    def curve(self) -> dict[str, Any]:
        """Return what each level of the policy would have cost yesterday, for `GET /policy/curve`.

        Raises NoCurve, which says why there is none.
        """
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
        """Give a policy that an operator has just set the level known for its goal, or have it tuned now."""
        with self._scaler.lock:
            if self._last is not None:
                self._apply(self._scaler.policy, self._last)
        self._news.set()

    # -- the loop -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Make a replay whenever one is due, until `stop` is called."""
        while not self._stopping.is_set():
            if self.due():
                try:
                    self.tune()
                except Exception:  # nothing that happens here may end the loop
                    log.exception("a replay failed for a fault of ours; the level stays as it is")
            self._news.wait(min(30.0, max(1.0, self._every_s / 10.0)))
            self._news.clear()

    def stop(self) -> None:
        """End the loop of `run`, and the replay that is under way."""
        self._stopping.set()
        self._news.set()
        self._replay.stop()

    def due(self) -> bool:
        """Return whether a replay is to be made now: the last one is old, or was for another goal."""
        policy = self._scaler.policy
        if self._every_s <= 0.0 or not isinstance(policy, Objective):
            return False
        now, last = self._scaler.clock(), self._last
        if self._tried is not None and self._tried[1] == policy.goal:
            return now - self._tried[0] >= self._every_s
        return last is None or last.goal != policy.goal or now - last.at >= self._every_s

    def tune(self) -> bool:
        """Make one replay now and set the level that it finds; return whether there is a new result.

        There is none when there is too little to replay, or when the replay fails: then it is logged why.
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
            raw = self._replay.run(json.dumps(request_of(day)).encode())
            level, curve, chosen = parse_reply(raw, policy)
            level = self._with_kept_pool(level, day, now)
        except (BadReply, OSError, subprocess.TimeoutExpired) as e:
            if not self._stopping.is_set():
                self._trouble = _in_one_line(e)
                log.warning("replay failed, the level stays as it is: %s", self._trouble)
            return False
        self._trouble = None
        result = TuningResult(now, policy.goal, level, day.seconds / 3600.0, day.requests, curve, chosen)
        self._last = result
        with self._scaler.lock:
            applied = self._apply(policy, result, settled_at=self._scaler.clock())
        log.info(
            "replayed %.1f h: %s gives %.4f in time for %.2f $/day%s%s",
            result.hours,
            ", ".join(f"{name} {value:g}" for name, value in level.items()),
            chosen["met"],
            chosen["usd_day"],
            "" if chosen["reached"] else ", and nothing that was tried keeps the goal",
            "" if applied else "; not used, the policy was set by hand",
        )
        self._file.write(result)
        return True

    # -- inside -------------------------------------------------------------------------------------

    def _apply(self, found_for: Policy, result: TuningResult, settled_at: float | None = None) -> bool:
        """Give the policy the level of that result; the caller holds the lock of the autoscaler.

        Return whether it was given: not to another policy than it was found for, nor over a level set by
        hand.
        """
        policy = self._scaler.policy
        if policy is not found_for or not isinstance(policy, Objective) or policy.goal != result.goal:
            return False
        if policy.k > 0.0 and policy is not self._given:
            return False
        made = replace(policy, **result.level)  # type: ignore[arg-type]
        if settled_at is not None and "pool" in result.level:
            made = replace(made, settled_at=settled_at)
        self._given = made
        self._scaler.set_policy(made)
        return True

    def _with_kept_pool(self, level: dict[str, float], day: ReplayDay, now: float) -> dict[str, float]:
        """Return the level with the largest pool that is worth keeping; at first this is what is loaded."""
        keep_s = worth_keeping_s(day.load_s, day.running_usd_h, day.stopped_usd_h)
        if self._pool is None:
            self._pool = KeptPool()
            self._pool.note(now, day.loaded, keep_s)
        return (
            level | {"pool": self._pool.note(now, int(level["pool"]), keep_s)} if "pool" in level else level
        )

    def _day(self, policy: Objective) -> ReplayDay | None:
        """Return the last day's arrivals as they are to be replayed; None while there are too few."""
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
        return ReplayDay(
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
            self._note_misses(policy.goal, seen.traffic.requests_total, late),
            loaded,
        )

    def _note_misses(self, goal: float, requests: float, late: int) -> float:
        """Note how many requests came and were late since the last replay; return the margin of the next."""
        if self._margin is None or self._margin.goal != goal:
            self._margin = Margin(goal)
        else:
            self._margin.note(max(0.0, requests - self._counted[0]), max(0, late - self._counted[1]))
        self._counted = (requests, late)
        return self._margin.share


class LevelFile:
    """A file with the last tuned level of the policy, so that a restarted autoscaler goes on with it."""

    def __init__(self, path: Path) -> None:
        """Use the file at that path, which need not exist."""
        self._path = path

    def read(self, now: float) -> TuningResult | None:
        """Return the tuning result of the last process; None when there is none that can be used."""
        try:
            return parse_result(self._path.read_bytes(), now)
        except FileNotFoundError:
            return None
        except OSError as e:
            log.warning("%s cannot be read: %s", self._path, e)
        except (BadReply, ValueError) as e:
            log.warning("%s is not a result of ours, the level begins with the defaults: %s", self._path, e)
        return None

    def write(self, result: TuningResult) -> None:
        """Write a tuning result atomically, mode 0600; a failure is logged."""
        made = None
        try:
            fd, made = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
            with os.fdopen(fd, "w") as f:
                json.dump(asdict(result), f)
                f.flush()
                os.fsync(f.fileno())
            Path(made).replace(self._path)
        except OSError as e:
            log.warning("%s cannot be written, a restart will begin with the defaults: %s", self._path, e)
            if made is not None:
                Path(made).unlink(missing_ok=True)


def _in_one_line(e: Exception) -> str:
    """Return in one line what went wrong with a replay, without the command."""
    if isinstance(e, subprocess.TimeoutExpired):
        return f"no answer within {e.timeout:g} s"
    return f"{type(e).__name__}: {e}" if isinstance(e, OSError) else str(e)
