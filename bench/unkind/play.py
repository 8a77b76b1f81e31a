"""One fleet of one version of the code against the present local cloud: a minute, and what became of it."""

import contextlib
import json
import os
import signal
import sqlite3
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.children import ROOT, ChildProcess, child, free_port, wait_for

KEY = "k-of-an-unkind-day-0123456789"

SPEEDUP = 60.0
"""Boots of minutes take seconds; deadlines of half an hour, half a minute."""

LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Day:
    """What one fleet meets, and what is asked of it.

    only: the unkindnesses that are on. machines: for rent, as of --offers; empty for the built-in ones.
    faults: on from the start. hot: instances that are wanted hot. most_s: longest seconds of the clock.
    settle_s: how long it is watched after all are hot. cloud, autoscaler: further flags. act: called twice a
    second with the fleet and the seconds that have passed. whole: it is played to its end, else only until as
    many are hot as are wanted, or more were rented, or a machine is banned.
    """

    only: Sequence[str]
    machines: Sequence[Mapping[str, Any]] = ()
    faults: Sequence[str] = ()
    hot: int = 1
    most_s: float = 75.0
    settle_s: float = 4.0
    speedup: float = SPEEDUP
    cloud: Sequence[str] = ()
    autoscaler: Sequence[str] = ()
    act: "Callable[[Fleet, float], None] | None" = None
    whole: bool = False


@dataclass
class Outcome:
    """What became of a fleet. rented: machine of each instance that there was. hot_s: until all were hot.
    last_hot: how many were hot in the end."""

    rented: dict[int, int] = field(default_factory=dict)
    hot_s: float | None = None
    last_hot: int = 0
    banned: tuple[int, ...] = ()
    cloud: Mapping[str, Any] = field(default_factory=dict)
    ledger_usd: float | None = None
    health: Mapping[str, Any] = field(default_factory=dict)

    @property
    def charged_usd(self) -> float:
        """Dollars that the account was charged for everything."""
        return float(self.cloud.get("spent_usd", {}).get("total", 0.0))

    def says(self) -> str:
        """Return the figures in a line."""
        hot = "never hot" if self.hot_s is None else f"hot after {self.hot_s:.0f} s"
        return f"{len(self.rented)} rented, {hot}, {len(self.banned)} banned, ${self.charged_usd:.4f}"


@dataclass
class Fleet:
    """A fleet that runs: where its cloud and its autoscaler are."""

    cloud: str
    autoscaler: str
    state: Path
    server: ChildProcess

    def ask(self, url: str, body: object = None, method: str | None = None) -> Any:
        """Return what an address of the cloud or the autoscaler answers, None while it does not."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310 loopback
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:  # noqa: S310
                return json.loads(reply.read() or b"null")
        except urllib.error.HTTPError as e:
            with contextlib.suppress(ValueError):
                return json.loads(e.read())
            return None
        except (OSError, ValueError):
            return None

    def banned(self) -> tuple[int, ...]:
        """Return the machines that the ledger holds for bad, in either version's words."""
        try:
            with contextlib.closing(
                sqlite3.connect(f"file:{self.state / 'ledger.sqlite'}?mode=ro", uri=True)
            ) as db:
                rows = db.execute("SELECT machine FROM bad_machine WHERE until_s > ?", (time.time(),))
                return tuple(sorted(int(machine) for (machine,) in rows))
        except sqlite3.Error:
            return ()


def play(code: Path, day: Day, scratch: Path) -> Outcome:
    """Run the autoscaler of that checkout against the present local cloud; return what became of it."""
    scratch.mkdir(parents=True, exist_ok=True)
    ports = [free_port(), free_port()]
    cloud, autoscaler = (f"http://127.0.0.1:{port}" for port in ports)
    environ = {"LOCALCLOUD_API_KEY": KEY, "VAST_API_KEY": KEY, "PYTHONPATH": str(ROOT)}
    flags = ["--port", str(ports[0]), "--root", str(scratch / "cloud"), "--speedup", f"{day.speedup:g}"]
    flags += ["--realism", "harsh", *(word for name in day.only for word in ("--only", name)), *day.cloud]
    if not day.only:
        flags[flags.index("harsh")] = "none"
    if day.machines:
        (scratch / "offers.json").write_text(json.dumps(day.machines))
        flags += ["--offers", str(scratch / "offers.json")]
    flags += [word for fault in day.faults for word in ("--fault", fault)]
    with child((sys.executable, "-m", "localcloud", *flags), scratch / "cloud.log", environ=environ) as sky:
        fleet = Fleet(cloud, autoscaler, scratch / "state", sky)
        wait_for("the local cloud", sky, lambda: fleet.ask(f"{cloud}/localcloud/status") is not None)
        serve = (
            *(sys.executable, str(code / "autoscaler_server.py"), "serve", "--local", "--cloud-url", cloud),
            *("--port", str(ports[1]), "--public-url", autoscaler, "--state-dir", str(scratch / "state")),
            *("--speedup", f"{day.speedup:g}", "--policy", "fixed", "--policy-param", f"hot={day.hot}"),
            *("--policy-param", f"total={day.hot}", "--poll-interval-s", "1.5", "--check-boot-every-s", "1"),
            *("--replay-every-s", "0", *day.autoscaler),
        )
        with child(serve, scratch / "autoscaler.log", environ={**environ, "PYTHONPATH": str(code)}) as server:
            wait_for("the autoscaler", server, lambda: fleet.ask(f"{autoscaler}/health") is not None)
            fleet.server = server
            outcome = _watch(fleet, day)
            os.kill(server.pid, signal.SIGTERM)
        return outcome


def _watch(fleet: Fleet, day: Day) -> Outcome:
    seen = Outcome()
    begun = time.monotonic()
    all_hot_since: float | None = None
    while (passed := time.monotonic() - begun) < day.most_s:
        status = fleet.ask(f"{fleet.cloud}/localcloud/status") or {}
        for one in status.get("instances", []):
            seen.rented.setdefault(int(one["id"]), int(one["machine_id"]))
        shown = fleet.ask(f"{fleet.autoscaler}/instances") or {}
        hot = [i for i in shown.get("instances", []) if i["state"] == "hot"]
        seen.last_hot = len(hot)
        if len(hot) >= day.hot:
            seen.hot_s = passed if seen.hot_s is None else seen.hot_s
            all_hot_since = passed if all_hot_since is None else all_hot_since
            if not day.whole and passed - all_hot_since >= day.settle_s:
                break
        else:
            all_hot_since = None
        if not day.whole and (len(seen.rented) > day.hot or fleet.banned()):
            break
        if day.act is not None:
            day.act(fleet, passed)
        time.sleep(LOOK_EVERY_S)
    seen.cloud = fleet.ask(f"{fleet.cloud}/localcloud/status") or {}
    seen.health = fleet.ask(f"{fleet.autoscaler}/health") or {}
    seen.ledger_usd = ((fleet.ask(f"{fleet.autoscaler}/costs") or {}).get("usd") or {}).get("total")
    seen.banned = fleet.banned()
    return seen
