"""What the cloud itself knows while the campaign runs: machines, dollars, limits, tokens, and whom we hurt.

The audit believes this and the users, and nothing that the autoscaler says of itself, but for its orders and
their evidence, which are what is judged.
"""

import mmap
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.chaos.stack import Stack
from remote.events import RECORDS, STARTED
from remote.shared_file import HEADER

SAMPLE_S = 0.5
"""Seconds between two looks at the cloud."""

DOLLARS_EVERY = 5
"""Samples to one look at GET /costs."""

ODD_RATIO, ODD_USD = (0.6, 1.6), 0.005
"""What GET /costs may say at any moment, to the cloud's dollars, and dollars beside it: looks are late while
listings hang. A clock that was set makes it a hundred times as much."""

HURT_LASTS_S = 120.0
"""Seconds for which a machine that was hurt may be given up: the deadlines of a fast cloud are 45 s and less,
and are followed by checks, listings and orders, on a machine that is busy."""

NOT_WELL = frozenset({"outbid", "crashed", "offline", "rebooting", "recycling", "scheduling"})
"""States of the cloud in which no machine serves, through no order of the autoscaler."""

_RECORD = struct.Struct("<8sB3xI")
_EPSILON = 1e-6


@dataclass
class Machine:
    """One rental as the cloud saw it. hurts: (until, why), the time on the monotonic clock."""

    id: int
    label: str
    machine_id: int
    state: str = ""
    usd: float = 0.0
    hurts: list[tuple[float, str]] = field(default_factory=list)
    gone_at: float | None = None
    ended_by_us: bool = False

    def look(self, state: str, message: str, usd: float, now: float) -> None:
        """Take over what the cloud says of it now, and what it has cost so far."""
        self.state, self.usd = state, usd
        if state in NOT_WELL or "rror" in message:
            self.hurt(now, f"the cloud has it as {state}")

    def hurt(self, until: float, why: str) -> None:
        """Note that it is not well, until then."""
        self.hurts.append((until, why))

    def miss(self, now: float) -> None:
        """Note that the cloud has it no more."""
        self.gone_at = now if self.gone_at is None else self.gone_at

    def end_by_us(self) -> None:
        """Note that it is destroyed behind the autoscaler's back."""
        self.ended_by_us = True

    def hurt_at(self, at: float) -> str | None:
        """Return why it may have been given up then; None when it was well."""
        return next((why for until, why in reversed(self.hurts) if at <= until + HURT_LASTS_S), None)


class Truth:
    """Samples in a thread of its own, from `start` until `stop`."""

    def __init__(self, stack: Stack) -> None:
        """Know nothing yet."""
        self.stack = stack
        self.lock = threading.Lock()
        self.machines: dict[int, Machine] = {}
        self.rows: list[dict[str, Any]] = []
        self.over_instances_s = self.over_usd_s = 0.0
        self.most_instances, self.most_usd_h = 0, 0.0
        self.over: list[str] = []
        self.spent: list[tuple[float, float]] = []  # seconds as the autoscaler counts them, dollars
        self.orders: dict[tuple[str, float], dict[str, Any]] = {}
        self.bans: dict[tuple[int, float], dict[str, Any]] = {}
        self.odd_dollars: list[str] = []
        self.reasons: Counter[str] = Counter()  # of /health, by looks
        self.starts: dict[tuple[int, str], Counter[bytes]] = {}
        self._read_to: dict[tuple[int, str], int] = {}
        self._liars: set[tuple[int, str]] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="truth", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    # -- what faults tell ------------------------------------------------------------------------------

    def hurt(self, instance_id: int, why: str, for_s: float = 0.0) -> None:
        """Note that we hurt that machine, and for how long."""
        with self.lock:
            if machine := self.machines.get(instance_id):
                machine.hurt(time.monotonic() + for_s, why)

    def hurt_all(self, why: str, for_s: float = 0.0) -> None:
        """Note that all machines that there are were hurt."""
        for instance_id in list(self.machines):
            self.hurt(instance_id, why, for_s)

    def end_by_us(self, instance_id: int) -> None:
        """Note that the machine is destroyed behind the autoscaler's back."""
        with self.lock:
            if machine := self.machines.get(instance_id):
                machine.end_by_us()

    def boots_lie(self, instance_id: int) -> None:
        """Do not believe the log of that machine's present boot."""
        self._liars.add((instance_id, _boot(self.home(instance_id))))

    def home(self, instance_id: int) -> Path:
        """Return the disk of that machine."""
        return self.stack.root / "cloud" / "instances" / str(instance_id) / "home"

    # -- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        last, number = time.monotonic(), 0
        while not self._end.wait(SAMPLE_S):
            status, now = self.stack.status(), time.monotonic()
            self._note_spent(status)
            if status is not None:
                self._look(status, now, now - last)
            last = now
            number += 1
            if number % 2 == 0:
                self._read_orders()
                self._read_rings()
            if number % DOLLARS_EVERY == 0:
                self._read_dollars()

    def _look(self, status: dict[str, Any], now: float, since_s: float) -> None:
        limits = self.stack.settings
        with self.lock:
            self.rows = rows = status["instances"]
            for row in rows:
                machine = self.machines.setdefault(
                    row["id"], Machine(row["id"], row["label"] or "", row["machine_id"])
                )
                machine.look(row["state"], row["status_msg"] or "", row["usd"]["total"], now)
            for fault in status["faults"]:
                for struck in fault.get("struck", ()):
                    if struck in self.machines:
                        self.machines[struck].hurt(now, fault["name"])
            there = {row["id"] for row in rows}
            for machine in self.machines.values():
                if machine.id not in there:
                    machine.miss(now)
        self.most_instances = max(self.most_instances, len(rows))
        self.most_usd_h = max(self.most_usd_h, status["burn_usd_h"])
        if len(rows) > limits.max_instances:
            self.over_instances_s += since_s
            self.over.append(f"{now:.1f}: {len(rows)} instances: {[(r['id'], r['state']) for r in rows]}")
        if status["burn_usd_h"] > limits.max_usd_h + _EPSILON:
            self.over_usd_s += since_s
            self.over.append(f"{now:.1f}: {status['burn_usd_h']:.3f} $/h")

    def _read_orders(self) -> None:
        said, now = self.stack.ask_autoscaler("/decisions"), time.monotonic()
        if isinstance(said, dict) and "decisions" in said:
            for decision in said["decisions"]:
                for order in decision["commands"]:
                    if order["do"] == "destroy":
                        key = (order["label"], decision["at"])
                        self.orders.setdefault(key, {**order, "seen_at": now})
            for ban in said["bans"]:
                self.bans.setdefault((ban["machine"], ban["until"]), {**ban, "seen_at": now})
        health = self.stack.ask_autoscaler("/health")
        for reason in (health or {}).get("reasons", ()) if isinstance(health, dict) else ():
            self.reasons[reason["reason"]] += 1

    def _note_spent(self, status: Any) -> None:
        if status is not None:
            with self.lock:
                self.spent.append((self.stack.counted_s(), status["spent_usd"]["total"]))

    def _read_dollars(self) -> None:
        """Compare what GET /costs says now with the cloud's dollars, also while faults are on."""
        costs, now = self.costs()
        if not isinstance(costs, dict) or "unwatched" not in costs:
            return
        ledger_usd, cloud_usd = self.both_dollars(costs, now)
        low, high = ODD_RATIO
        if not low * cloud_usd - ODD_USD < ledger_usd < high * cloud_usd + ODD_USD:
            self.odd_dollars.append(f"{ledger_usd:.4f} $, and the cloud charged {cloud_usd:.4f}")

    def _read_rings(self) -> None:
        """Copy which requests each machine says to have begun, from its own record."""
        with self.lock:
            ids = [row["id"] for row in self.rows]
        for instance_id in ids:
            home = self.home(instance_id)
            boot = _boot(home)
            key = (instance_id, boot)
            if not boot or key in self._liars:
                continue
            try:
                newest, records = _ring(home / "fleet" / "boot" / "events", self._read_to.get(key, 0))
            except (OSError, ValueError, struct.error):
                continue
            if _boot(home) != boot:
                continue
            self._read_to[key] = newest
            counts = self.starts.setdefault(key, Counter())
            counts.update(name for name, kind, _ in records if kind == STARTED)

    # -- what is asked afterwards ----------------------------------------------------------------------

    def served_twice(self) -> tuple[int, int]:
        """Return how many tokens were taken, and how many of them more than once."""
        uses = sum(counts.total() for counts in self.starts.values())
        return uses, sum(1 for counts in self.starts.values() for n in counts.values() if n > 1)

    def costs(self) -> tuple[Any, float]:
        """Return an answer of GET /costs, and when it came, by `counted_s`; the cloud is looked at then, too.

        The last sample may be older than that by all that the autoscaler took for its answers.
        """
        said, now = self.stack.ask_autoscaler("/costs"), self.stack.counted_s()
        self._note_spent(self.stack.status())
        return said, now

    def both_dollars(self, costs: Mapping[str, Any], now: float) -> tuple[float, float]:
        """Return the dollars of an answer of GET /costs, and the cloud's in the times that it knows.

        now: by `counted_s`, when it was answered.
        """
        known = known_times(costs)
        ahead_s = costs["to"] - now
        cloud_usd = sum(self.spent_between(a - ahead_s, b - ahead_s) for a, b in known)
        return dollars_within(costs, known), cloud_usd

    def spent_between(self, from_s: float, to_s: float) -> float:
        """Return the dollars that the cloud charged between two times of `counted_s`."""
        return self._spent_at(to_s) - self._spent_at(from_s)

    def _spent_at(self, at: float) -> float:
        before = (0.0, 0.0)
        for sample in self.spent:
            if sample[0] >= at:
                share = (at - before[0]) / max(_EPSILON, sample[0] - before[0])
                return before[1] + (sample[1] - before[1]) * max(0.0, share)
            before = sample
        return before[1]

    def wronged(self) -> list[str]:
        """Return machines that were destroyed or banned as broken, and were well."""
        found = []
        by_label = {m.label: m for m in self.machines.values()}
        for (label, _), order in self.orders.items():
            machine = by_label.get(label)
            if machine is None or not order.get("evidence", "").startswith("broken"):
                continue
            if not machine.ended_by_us and machine.hurt_at(order["seen_at"]) is None:
                found.append(f"destroyed {machine.id} {label}: {order['why']}: {order['evidence']}")
        for (machine_id, _), ban in self.bans.items():
            here = [m for m in self.machines.values() if m.machine_id == machine_id]
            if here and all(m.hurt_at(ban["seen_at"]) is None and not m.ended_by_us for m in here):
                found.append(f"banned machine {machine_id}: {ban['evidence']}")
        return found


def known_times(costs: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return the times for which that answer of GET /costs knows the dollars."""
    at, found = costs["known_from"] or costs["to"], []
    for since, until in costs["unwatched"]:
        if since > at:
            found.append((at, since))
        at = max(at, until)
    return [*found, (at, costs["to"])]


def dollars_within(costs: Mapping[str, Any], times: Sequence[tuple[float, float]]) -> float:
    """Return the dollars of that answer that were spent in those times."""
    usd = 0.0
    for interval in costs["intervals"]:
        until = costs["to"] if interval["to"] is None else interval["to"]
        seconds = sum(max(0.0, min(until, b) - max(interval["from"], a)) for a, b in times)
        usd += interval["usd_h"] * seconds / 3600.0
    return usd


def _boot(home: Path) -> str:
    """Return the name of that machine's present boot; empty when there is none."""
    try:
        return (home / "fleet" / "boot" / "boot_id").read_text().strip()
    except OSError:
        return ""


def _ring(path: Path, after: int) -> tuple[int, list[tuple[bytes, int, int]]]:
    """Return the number of the newest record, and those with greater numbers, without the lock.

    The lock may be held by a process that was stopped.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        newest = int.from_bytes(data[:8], "little")
        begin = max(after, newest - RECORDS)
        places = (HEADER + n % RECORDS * _RECORD.size for n in range(begin, newest))
        return newest, [_RECORD.unpack_from(data, at) for at in places]
