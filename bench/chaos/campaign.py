"""One seed of the campaign: storms of faults, and calms in which the fleet must come back.

    begin   everything starts; users ask as soon as the fleet is full; memory and handles are noted
    storm   a new fault each PAUSE_S on average, several at once, the kinds that were struck least first
    calm    no fault is on: how long until the fleet is full again?
    end     users' last answers, dollars, memory, destroy-fleet, logs

The schedule follows from the seed; what it meets does not, since the processes are real.
"""

import json
import logging
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.chaos.kinds import GROUPS, Kind, NotNow, Scene, all_kinds, group_of
from bench.chaos.logs import LogFindings, look_through
from bench.chaos.stack import GATEWAYS, LOADBALANCERS, OURS, Stack, StackSettings, ask, handles
from bench.chaos.truth import Truth, known_times
from bench.chaos.users import FAILED, OK, Outcome, Users, UserSettings
from bench.children import memory_mb

log = logging.getLogger("chaos")

PAUSE_S = 1.5
"""Mean seconds between two faults of a storm."""

AT_ONCE = 8
"""Most faults that are on at the same time."""

STORM_S = 75.0
"""Seconds of a storm."""

FULL_S = 240.0
"""Seconds after a storm in which the fleet must be full; then the next storm comes anyway."""

FIRST_S = 120.0
"""Seconds for the first fleet: it is rented, loaded and checked."""

ASIDE = {"clock": 3, "ledger": 4, "trial": -1}
"""Kinds with that tag strike in each fifth seed only: the remainder of the seed by five; -1: in none."""

SEEDS_A_ROUND = range(5)
"""Seeds of which one has the kinds with a tag."""

TRIED = 0.3
"""What a kind counts that found nothing to strike, in strikes: others come first, and it comes again."""

DARK_S = 10.0
"""Seconds after a time in which no machine could serve, in which requests that waited through it may fail."""


@dataclass(frozen=True)
class CampaignSettings:
    """What to do. only: names of kinds, else all of the seed. most: faults of a storm. rest_s: of a calm
    beyond the full fleet. keep: the directory for all logs."""

    seed: int
    minutes: float
    only: tuple[str, ...] = ()
    rate_s: float = 3.0
    storm_s: float = STORM_S
    pause_s: float = PAUSE_S
    most: int | None = None
    rest_s: float = 8.0
    keep: Path | None = None
    stack: StackSettings | None = None


@dataclass
class Size:
    """What a process has."""

    pid: int
    mb: float
    handles: int


@dataclass
class Figures:
    """All that one seed has shown; audit.py judges it."""

    seed: int
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    in_the_dark: Counter[str] = field(
        default_factory=Counter
    )  # that failed while no machine could serve, by user
    dark_s: float = 0.0
    first_full_s: float = 0.0
    full_after_s: list[float] = field(default_factory=list)
    uses: int = 0
    served_twice: int = 0
    over_instances_s: float = 0.0
    over_usd_s: float = 0.0
    over: list[str] = field(default_factory=list)
    wronged: list[str] = field(default_factory=list)
    ledger_usd: float = 0.0
    cloud_usd: float = 0.0
    odd_dollars: list[str] = field(default_factory=list)
    unknown_s: float = 0.0
    begin: dict[str, Size] = field(default_factory=dict)
    end: dict[str, Size] = field(default_factory=dict)
    holds_s: dict[str, float] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    logs: LogFindings = field(default_factory=LogFindings)
    left_behind: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class Campaign:
    """One seed."""

    def __init__(self, settings: CampaignSettings, stack: Stack) -> None:
        """Strike nothing yet. stack: runs."""
        self.settings = settings
        self.stack = stack
        self.truth = Truth(stack)
        self.users = Users(
            UserSettings(
                tuple(stack.url(name) for name in GATEWAYS),
                tuple(stack.url(name) for name in LOADBALANCERS),
                stack.client_keys["direct"],
                settings.rate_s,
                settings.seed,
            )
        )
        self.faults: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.errors: list[str] = []
        self._rng = random.Random(settings.seed)
        self._kinds = chosen_kinds(settings)
        self._on: dict[str, Kind] = {}
        self._dark: list[tuple[float, float]] = []  # monotonic times in which no machine could serve
        self._seen: dict[str, list[Size]] = {}  # in calms, by process
        self._lock = threading.Lock()
        self._calm = threading.Event()
        self._begun = time.monotonic()
        self._faults = (stack.root / "faults.jsonl").open("a")

    def run(self) -> Figures:
        """Return what was found; everything of the fleet is gone then."""
        full_after_s = []
        self.truth.start()
        try:
            self._until_full(FIRST_S)
            first_full_s = time.monotonic() - self.stack.begun_at
            self.users.start()
            time.sleep(self.settings.rest_s)
            end = time.monotonic() + 60.0 * self.settings.minutes
            while time.monotonic() < end:
                self._storm(min(end, time.monotonic() + self.settings.storm_s))
                full_after_s.append(self._until_full(FULL_S))
                log.info("seed %d: full after %.1f s", self.settings.seed, full_after_s[-1])
                time.sleep(self.settings.rest_s)
                self._note_sizes()
            self.users.stop()
            dollars = self._dollars()
            self._note_sizes()
        finally:
            self.truth.stop()
            self._faults.close()
        seconds, restarts = time.monotonic() - self._begun, self.stack.restarts
        left_behind = self.stack.destroy_fleet()
        self.users.write(self.stack.root / "failures.jsonl")
        truth = self.truth
        uses, served_twice = truth.served_twice()
        return Figures(
            self.settings.seed,
            seconds,
            self.faults,
            self.left_out,
            self.users.counts(),
            [f"{o.at_s:.0f} s {o.user}: {o.what}: {o.failure}" for o in self.users.outcomes if o.what != OK],
            Counter(o.user for o in self.users.outcomes if o.what == FAILED and self._was_dark(o)),
            sum(until - since for since, until in self._dark),
            first_full_s,
            full_after_s,
            uses,
            served_twice,
            truth.over_instances_s,
            truth.over_usd_s,
            truth.over,
            truth.wronged(),
            *dollars[:2],
            truth.odd_dollars,
            dollars[2],
            *self._first_and_last(),
            {name: longest_hold(self.stack.logs / f"{name}.holds") for name in OURS},
            restarts,
            truth.reasons,
            look_through(self.stack, self.users.canary, [m.label for m in truth.machines.values()]),
            left_behind,
            self.errors + self.users.errors,
        )

    # -- a storm ---------------------------------------------------------------------------------------

    def _storm(self, until: float) -> None:
        """Strike until then; return when everything is off again."""
        self._calm.clear()
        threads: list[threading.Thread] = []
        while time.monotonic() < until:
            enough = self.settings.most is not None and len(threads) >= self.settings.most
            kind = None if enough else self._next_kind()
            if kind is not None:
                for_s = min(kind.draw_s(self._rng), max(0.5, until - time.monotonic()))
                scene = Scene(self.stack, self.truth, random.Random(self._rng.getrandbits(64)), for_s, [])
                thread = threading.Thread(
                    target=self._strike, args=(kind, scene), name=kind.name, daemon=True
                )
                thread.start()
                threads.append(thread)
            time.sleep(
                min(self._rng.expovariate(1.0 / self.settings.pause_s), max(0.0, until - time.monotonic()))
            )
        self._calm.set()
        for thread in threads:
            thread.join()
        for name in ("list-hangs", "api-hangs"):  # what hangs is let go
            self.stack.ask_cloud(f"/localcloud/faults/{name}", method="DELETE")

    def _next_kind(self) -> Kind | None:
        """Return a kind that may strike now, one that was struck least; note that it is on."""
        with self._lock:
            if len(self._on) >= AT_ONCE:
                return None
            words = {kind.alone for kind in self._on.values()}
            free = [
                k for k in self._kinds if k.name not in self._on and (not k.alone or k.alone not in words)
            ]
            if not free:
                return None
            kind = min(free, key=self._struck)
            self._on[kind.name] = kind
            return kind

    def _struck(self, kind: Kind) -> tuple[float, float]:
        """Return how often the kind was struck, by which the next is chosen, and how often that variant.

        What strikes in one of five seeds only has to come as often in it as others in five.
        """
        names = GROUPS.get(group_of(kind.name), (kind.name,))
        often = sum(self.faults[n] + TRIED * self.left_out[n] for n in names)
        seeds = 1 if kind.tags else len(SEEDS_A_ROUND)
        mine = self.faults[kind.name] + TRIED * self.left_out[kind.name]
        return int(often * seeds) + self._rng.random() * seeds, mine

    def _strike(self, kind: Kind, scene: Scene) -> None:
        begun = time.monotonic()
        at_s = begun - self._begun
        try:
            with kind.effect(scene):
                self.faults[kind.name] += 1
                self._calm.wait(scene.for_s)
        except NotNow:
            self.left_out[kind.name] += 1
        except Exception as e:
            log.exception("fault %s", kind.name)
            self.errors.append(f"{kind.name}: {type(e).__name__}: {e}")
        finally:
            with self._lock:
                if kind.dark:
                    self._dark.append((begun, time.monotonic()))
                del self._on[kind.name]
                said = {
                    "at_s": round(at_s, 2),
                    "kind": kind.name,
                    "for_s": round(scene.for_s, 2),
                    "what": scene.words,
                }
                self._faults.write(json.dumps(said) + "\n")
                self._faults.flush()

    def _was_dark(self, outcome: Outcome) -> bool:
        """Say whether a request failed while no machine could serve, or just after."""
        at = self.users.begun + outcome.at_s + outcome.took_s
        return any(since <= at <= until + DARK_S for since, until in self._dark)

    # -- a calm ----------------------------------------------------------------------------------------

    def _until_full(self, most_s: float) -> float:
        """Return after how many seconds the fleet is full; most_s when it never is."""
        begun = time.monotonic()
        while (passed_s := time.monotonic() - begun) < most_s:
            if self._is_full():
                return passed_s
            time.sleep(0.25)
        self.errors.append(f"the fleet is not full after {most_s:g} s")
        return most_s

    def _is_full(self) -> bool:
        """Say whether all three see the fleet as it shall be: the cloud, and each loadbalancer."""
        with self.truth.lock:
            running = {row["id"] for row in self.truth.rows if row["state"] == "running"}
        for name in LOADBALANCERS:
            said = ask(f"{self.stack.url(name)}/status", self.stack.operator_key) or {}
            hot = {row["id"] for row in said.get("instances", ()) if row["state"] == "hot"}
            if len(hot & running) < self.truth.stack.settings.hot:
                return False
        return True

    # -- the end ---------------------------------------------------------------------------------------

    def _note_sizes(self) -> None:
        """Note what our processes have."""
        for name in OURS:
            pid = self.stack.pid(name)
            try:
                self._seen.setdefault(name, []).append(Size(pid, memory_mb(pid), handles(pid)))
            except OSError:
                self.errors.append(f"{name} does not run")

    def _first_and_last(self) -> tuple[dict[str, Size], dict[str, Size]]:
        """Return what the process of each name that lived longest had when it was warm, and at its end.

        Two processes of one name tell no growth, so one that was killed is not compared with the next. It is
        warm in the second calm that it sees: a whole storm lies before. Where none saw three, the first calm
        is its begin.
        """
        begin, end = {}, {}
        for name, sizes in self._seen.items():
            longest, _ = Counter(size.pid for size in sizes).most_common(1)[0]
            mine = [size for size in sizes if size.pid == longest]
            begin[name], end[name] = mine[min(1, max(0, len(mine) - 2))], mine[-1]
        return begin, end

    def _dollars(self) -> tuple[float, float, float]:
        """Return the dollars of the ledger, those of the cloud in the same time, and seconds before it."""
        costs, now = self.truth.costs()
        if not isinstance(costs, dict) or "usd" not in costs:
            self.errors.append(f"no /costs at the end: {costs}")
            return 0.0, 0.0, 0.0
        (self.stack.root / "costs.json").write_text(json.dumps(costs))
        usd = {machine.label: machine.usd for machine in self.truth.machines.values()}
        (self.stack.root / "truth.json").write_text(json.dumps(usd))
        known = known_times(costs)
        ledger_usd, cloud_usd = self.truth.both_dollars(costs, now)
        unknown_s = now - self.truth.spent[0][0] - sum(b - a for a, b in known)
        return ledger_usd, cloud_usd, max(0.0, unknown_s)


def chosen_kinds(settings: CampaignSettings) -> Sequence[Kind]:
    """Return the kinds that strike in that seed."""
    kinds: Mapping[str, Kind] = all_kinds()
    if settings.only:
        return [kinds[name] for name in settings.only]
    return [
        k for k in kinds.values() if all(ASIDE[tag] == settings.seed % len(SEEDS_A_ROUND) for tag in k.tags)
    ]


def longest_hold(path: Path) -> float:
    """Return the longest hold of a process's loop that its file has."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0.0
    return max((float(line.split()[2]) for line in lines), default=0.0)


def run_seed(settings: CampaignSettings) -> Figures:
    """Run one seed from begin to end, and return what it found."""
    root = None if settings.keep is None else settings.keep / f"seed-{settings.seed}"
    if root is not None and root.exists():
        shutil.rmtree(root)
    if root is not None:
        root.parent.mkdir(parents=True, exist_ok=True)
    stack = Stack(settings.stack or StackSettings(settings.seed), root)
    with stack:
        figures = Campaign(settings, stack).run()
    figures.left_behind.extend(stack.left_behind)
    if settings.keep is None:
        shutil.rmtree(stack.root, ignore_errors=True)
    return figures
