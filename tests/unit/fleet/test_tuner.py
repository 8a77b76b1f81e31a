"""What sets the policy's level: what it asks, what it believes, and what it does when a replay goes wrong."""

import json
import logging
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoscaler_server import REPLAY
from fleet.arrivals import Arrived
from fleet.demand import Demand
from fleet.outside.ledger import Ledger
from fleet.outside.replay_process import ROOT, ReplayProcess
from fleet.outside.tuner import NoCurve, Tuner
from fleet.outside.turns import Autoscaler
from policies import Busy
from policies.objective import Objective
from tests.fleet_world import FakeVast, World
from tests.unit.fleet.test_replay import CHOSEN, REPLY
from tests.waiting import wait_for

NOW = 1_700_000_000.0
TUNED = Objective(k=1.7, fast_s=200.0, slow_s=3600.0, slow_share=0.7, hold_s=90.0, pool=4)

ANSWERS = """
import os, sys
sys.stdout.write(open(sys.argv[1]).read())
open(sys.argv[1] + ".asked", "w").write(sys.stdin.read())
open(sys.argv[1] + ".environment", "w").write("\\n".join(os.environ))
"""
HANGS = """
import os, sys, time
open(sys.argv[1] + ".pid.", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".pid.", sys.argv[1] + ".pid")
time.sleep(600)
"""
FAILS = """
import sys
print("Traceback\\nNumbaError: no compiler", file=sys.stderr)
sys.exit(3)
"""


class Bench:
    """An autoscaler with a small fleet and a history, and a Tuner whose replays are a script of ours."""

    def __init__(self, directory: Path, script: str = ANSWERS, reply: str = json.dumps(REPLY)) -> None:
        self.directory = directory
        self.world = World().with_pool(hot=2, total=3)
        self.world.now = NOW
        self.ledger = Ledger(directory / "ledger.sqlite")
        self.reply = directory / "reply.json"
        self.reply.write_text(reply)
        self.script = directory / "replay.py"
        self.script.write_text(script)
        self.start()

    def start(self, policy: Busy | Objective | None = None, **settings: Any) -> None:
        """A new process on the same state."""
        cloud = FakeVast(lambda: [c.row() for c in self.world.contracts.values()])
        self.scaler = Autoscaler(
            self.world.fleet,
            policy or Objective(),
            Demand("e1"),
            cloud,  # type: ignore[arg-type]
            cloud,  # type: ignore[arg-type]
            self.ledger,
            lambda: self.world.now,
        )
        command = (sys.executable, str(self.script), str(self.reply))
        self.replay = ReplayProcess(command)
        self.tuner = Tuner(self.scaler, self.directory, **{"replay": self.replay, **settings})

    def history(self, minutes: float = 40.0) -> "Bench":
        """Two requests a second of 500 tokens to read and 150 to answer, until now."""
        seconds = range(int(NOW - 60.0 * minutes), int(NOW))
        self.ledger.add_counts({}, [Arrived(s, 2.0, 400.0, 1000.0) for s in seconds], NOW)
        return self

    @property
    def asked(self) -> dict[str, Any]:
        """What the last replay was asked."""
        asked: dict[str, Any] = json.loads(Path(f"{self.reply}.asked").read_text())
        return asked


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*what: Any) -> Bench:
        made.append(Bench(tmp_path, *what))
        return made[-1]

    yield make
    for b in made:
        b.ledger.close()


# -- one replay ------------------------------------------------------------------------------------------


def test_a_replay_of_the_last_day_sets_the_level(bench: Callable[..., Bench]) -> None:
    b = bench().history()
    b.ledger.add_counts({}, [Arrived(int(NOW - 86_500), 9.0, 9.0, 9.0)], NOW)
    assert b.tuner.tune()
    assert b.scaler.policy == replace(TUNED, settled_at=NOW)
    assert (len(b.asked["bins"]["work"]), b.asked["goal"]) == (2400, 0.99), "a day and not more"
    assert (b.asked["running_usd_h"], b.asked["stopped_usd_h"]) == (0.4, 0.01)
    assert (b.asked["load_s"], b.asked["late_lane"], b.asked["max_instances"]) == (360.0, True, 8)
    assert b.asked["capacity"]["work_s"] == 950.0
    assert b.tuner.curve()["chosen"] == CHOSEN
    assert (b.tuner.curve()["hours"], b.tuner.curve()["requests"]) == (0.667, 4800)


def test_a_replay_is_not_given_our_keys(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAST_API_KEY", "secret")
    b = bench().history()
    assert b.tuner.tune()
    names = Path(f"{b.reply}.environment").read_text().split("\n")
    assert "PATH" in names
    assert "VAST_API_KEY" not in names


def test_what_a_replay_is_asked_holds_times_and_counts_only(bench: Callable[..., Bench]) -> None:
    b = bench().history()
    b.tuner.tune()

    def leaves(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [leaf for v in value.values() for leaf in leaves(v)]
        return [leaf for v in value for leaf in leaves(v)] if isinstance(value, list) else [value]

    for found in (b.asked, json.loads((b.directory / "level.json").read_text())):
        assert all(isinstance(leaf, int | float) for leaf in leaves(found))
    assert (b.directory / "level.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "of", ["no policy with a goal", "too short a history", "no history", "nothing rented yet"]
)
def test_there_is_no_replay_of_nothing(bench: Callable[..., Bench], of: str) -> None:
    b = bench()
    if of == "no policy with a goal":
        b.history().scaler.set_policy(Busy())
    elif of == "too short a history":
        b.history(minutes=19.0)
    elif of == "nothing rented yet":
        b.history()
        b.world.fleet = b.world.new_set()
        b.start()
    assert not b.tuner.tune()
    assert not Path(f"{b.reply}.asked").exists()
    with pytest.raises(NoCurve):
        b.tuner.curve()


@pytest.mark.parametrize(
    ("script", "reply", "said"),
    [
        (FAILS, "", "exit 3: NumbaError: no compiler"),
        (ANSWERS, "{}", "wanted an object with level and curve"),
        (ANSWERS, "", "no JSON"),
        (HANGS, "", "no answer within 0.2 s"),
        ("import os; os.kill(os.getpid(), 9)", "", "exit -9"),
    ],
)
def test_a_replay_that_goes_wrong_is_logged_and_costs_nothing(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture, script: str, reply: str, said: str
) -> None:
    b = bench(script, reply).history()
    command = (sys.executable, str(b.script), str(b.reply))
    b.start(replay=ReplayProcess(command, timeout_s=0.2 if script is HANGS else 60.0))
    before = b.scaler.policy
    with caplog.at_level(logging.WARNING):
        assert not b.tuner.tune()
    assert b.scaler.policy is before
    (record,) = caplog.records
    assert (record.levelno, said in record.getMessage()) == (logging.WARNING, True), record.getMessage()
    with pytest.raises(NoCurve, match="the last replay failed"):
        b.tuner.curve()
    assert not b.tuner.due(), "it is not tried again at once"
    b.world.now += 1800.0
    assert b.tuner.due()


def test_a_command_that_is_not_there_is_a_failure_too(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    b = bench().history()
    b.start(replay=ReplayProcess(("/nowhere/python",)))
    assert not b.tuner.tune()
    assert "level stays as it is" in caplog.text


def test_a_ledger_that_cannot_be_read_is_a_failure_too(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench().history()

    def broken(*_: float) -> list[Arrived]:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(b.ledger, "arrived", broken)
    assert not b.tuner.tune()
    assert "disk I/O error" in caplog.text


# -- whose level it is -----------------------------------------------------------------------------------


def test_what_an_operator_set_while_it_was_replayed_stands(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench().history()
    run = b.replay.run

    def meanwhile(request: bytes) -> bytes:
        b.scaler.set_policy(Objective(goal=0.999))
        return run(request)

    monkeypatch.setattr(b.replay, "run", meanwhile)
    assert b.tuner.tune(), "the curve is worth something all the same"
    assert b.scaler.policy == Objective(goal=0.999)
    assert b.tuner.due(), "and the new goal is replayed at once"


def test_a_level_given_by_hand_is_left_alone_but_the_curve_is_made(bench: Callable[..., Bench]) -> None:
    b = bench().history()
    b.scaler.set_policy(by_hand := Objective(k=5.0))
    assert b.tuner.tune()
    assert b.scaler.policy is by_hand
    assert b.tuner.curve()["policy"]["k"] == 5.0


def test_a_level_of_ours_is_replaced_by_the_next(bench: Callable[..., Bench]) -> None:
    b = bench().history()
    b.tuner.tune()
    b.world.now += 100.0
    b.reply.write_text(json.dumps({**REPLY, "level": {"k": 2.4, "pool": 2}}))
    b.tuner.tune()
    assert b.scaler.policy == replace(TUNED, k=2.4, settled_at=NOW + 100.0)


def test_a_pool_is_given_up_when_its_storage_has_cost_as_much_as_loading_it_again(
    bench: Callable[..., Bench],
) -> None:
    b = bench().history()
    b.tuner.tune()
    b.reply.write_text(json.dumps({**REPLY, "level": {"k": 2.4, "pool": 2}}))
    pools = []
    for _ in range(60):
        b.world.now += 1800.0
        b.history()
        b.tuner.tune()
        pools.append(b.scaler.policy.pool)  # type: ignore[attr-defined]
    assert pools[0] == TUNED.pool
    assert pools[-1] == 2
    assert set(pools) == {2, TUNED.pool}


def test_a_goal_that_is_set_again_gets_its_level_again(bench: Callable[..., Bench]) -> None:
    b = bench().history()
    b.tuner.tune()
    b.scaler.set_policy(Objective())
    b.tuner.policy_was_set()
    assert b.scaler.policy == TUNED
    b.scaler.set_policy(Objective(goal=0.95))
    b.tuner.policy_was_set()
    assert b.scaler.policy == Objective(goal=0.95)


def test_it_is_due_every_half_hour_and_when_the_goal_is_another(bench: Callable[..., Bench]) -> None:
    b = bench().history()
    assert b.tuner.due()
    b.tuner.tune()
    assert not b.tuner.due()
    b.world.now += 1799.0
    assert not b.tuner.due()
    b.world.now += 1.0
    assert b.tuner.due()
    b.world.now -= 1000.0
    b.scaler.set_policy(Objective(goal=0.95))
    assert b.tuner.due()
    b.scaler.set_policy(Busy())
    assert not b.tuner.due()


def test_it_can_be_turned_off(bench: Callable[..., Bench]) -> None:
    b = bench().history()
    b.start(every_s=0.0)
    assert not b.tuner.due()
    with pytest.raises(NoCurve, match="turned off"):
        b.tuner.curve()


# -- restarts --------------------------------------------------------------------------------------------


def test_a_restarted_autoscaler_goes_on_with_the_tuned_level(bench: Callable[..., Bench]) -> None:
    b = bench().history()
    b.tuner.tune()
    curve = b.tuner.curve()
    b.world.now += 60.0
    b.start()
    assert b.scaler.policy == TUNED, "but the pool is not to shrink for it"
    assert not b.tuner.due()
    assert b.tuner.curve() == curve
    b.start(Objective(goal=0.9))
    assert b.scaler.policy == Objective(goal=0.9)
    assert b.tuner.due()
    b.start(Objective(k=4.0))
    assert b.scaler.policy == Objective(k=4.0)
    b.start(Busy())
    assert isinstance(b.scaler.policy, Busy)


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "[]",
        "{}",
        '{"at": 1, "hours": 1, "requests": 1}',
        json.dumps({**REPLY, "at": 1.0, "hours": 1.0, "requests": 1.0, "goal": 7.0}),
        json.dumps({**REPLY, "at": "x", "hours": 1.0, "requests": 1.0, "goal": 0.99}),
        json.dumps({**REPLY, "at": 1.0, "hours": 1.0, "requests": 1.0, "goal": 0.99, "level": {"k": -1}}),
        json.dumps({**REPLY, "at": 1.0, "hours": 1.0, "requests": 1.0, "goal": None}),
        json.dumps({**REPLY, "at": 1.0, "hours": 1.0, "requests": 1.0, "goal": 0.99}),  # chosen is missing
    ],
)
def test_a_file_that_is_not_ours_is_logged_and_passed_over(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture, raw: str
) -> None:
    b = bench()
    (b.directory / "level.json").write_text(raw)
    b.start()
    assert b.scaler.policy == Objective()
    assert "is not a result of ours" in caplog.text


def test_a_result_from_the_future_is_taken_for_one_of_now(bench: Callable[..., Bench]) -> None:
    b = bench().history()
    b.tuner.tune()
    b.world.now -= 3600.0
    b.start()
    b.world.now += 1800.0
    assert b.tuner.due()


def test_a_result_that_cannot_be_written_is_used_all_the_same(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    b = bench().history()
    b.tuner = Tuner(b.scaler, b.directory / "gone", b.replay)
    assert b.tuner.tune()
    assert "cannot be written" in caplog.text
    assert b.scaler.policy == replace(TUNED, settled_at=NOW)


# -- the thread and the process --------------------------------------------------------------------------


def alive(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_replay_under_way_is_ended_with_us(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    b = bench(HANGS).history()
    thread = threading.Thread(target=b.tuner.run, daemon=True)
    thread.start()
    pid_file = Path(f"{b.reply}.pid")
    wait_for("the replay has begun", pid_file.exists)
    pid = int(pid_file.read_text())
    assert alive(pid)
    b.tuner.stop()
    thread.join(timeout=10.0)
    assert not thread.is_alive()
    assert not alive(pid)
    assert caplog.records == [], "that it was ended is no failure"


def test_the_loop_replays_when_it_is_due_and_at_once_for_a_new_goal(bench: Callable[..., Bench]) -> None:
    b = bench().history()
    thread = threading.Thread(target=b.tuner.run, daemon=True)
    thread.start()
    wait_for("it was tuned", lambda: isinstance(b.scaler.policy, Objective) and b.scaler.policy.k > 0.0)
    with b.scaler.lock:
        b.scaler.set_policy(Objective(goal=0.95))
    b.tuner.policy_was_set()
    wait_for("the new goal was replayed", lambda: b.asked["goal"] == 0.95)
    b.tuner.stop()
    thread.join(timeout=10.0)
    assert not thread.is_alive()


def test_a_fault_of_ours_does_not_end_the_loop(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench().history()
    b.start(every_s=10.0)
    calls: list[int] = []

    def broken() -> bool:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError
        return True

    monkeypatch.setattr(b.tuner, "tune", broken)
    thread = threading.Thread(target=b.tuner.run, daemon=True)
    thread.start()
    wait_for("it was tried", lambda: calls)
    b.tuner.policy_was_set()
    wait_for("it was tried again", lambda: len(calls) > 1)
    b.tuner.stop()
    thread.join(timeout=10.0)
    assert "a fault of ours" in caplog.text


def test_a_replay_does_not_outlive_an_autoscaler_that_was_killed(tmp_path: Path) -> None:
    """kill -9: the kernel ends the replay."""
    (tmp_path / "hangs.py").write_text(HANGS)
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys\n"
            "from process.children import dying_with_parent\n"
            "subprocess.run(dying_with_parent(sys.argv[1:]))",
            *("nice", "-n", "10", sys.executable, str(tmp_path / "hangs.py"), str(tmp_path / "x")),
        ],
        cwd=ROOT,
    )
    wait_for("the replay has begun", (tmp_path / "x.pid").exists)
    pid = int((tmp_path / "x.pid").read_text())
    parent.kill()
    parent.wait()
    wait_for("it has ended", lambda: not alive(pid))


def test_a_real_replay_finds_a_level_for_a_small_history(tmp_path: Path) -> None:
    """An hour with a lull: the level keeps the goal, and the curve rises."""
    b = Bench(tmp_path)
    busy = [Arrived(s, 4.0, 800.0, 2000.0) for s in range(int(NOW) - 3600, int(NOW)) if s // 600 % 2]
    b.ledger.add_counts({}, busy, NOW)
    b.tuner = Tuner(b.scaler, tmp_path, ReplayProcess(REPLAY))
    begun = time.monotonic()
    assert b.tuner.tune()
    assert time.monotonic() - begun < 120.0
    policy = b.scaler.policy
    assert isinstance(policy, Objective)
    assert policy.k > 0.0
    curve = b.tuner.curve()
    assert len(curve["curve"]) > 1
    assert all(0.0 <= p["met"] <= 1.0 and p["usd_day"] > 0.0 for p in curve["curve"])
    assert (tmp_path / "level.json").exists()
    b.ledger.close()
