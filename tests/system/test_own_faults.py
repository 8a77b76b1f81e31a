"""Faults of our own side, live: the ledger of an autoscaler is locked, read-only, and deleted in use."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.chaos import hook
from bench.chaos.stack import AUTOSCALER, Stack, StackSettings
from tests.own_faults import ledger_locked
from tests.waiting import wait_for

WAIT_S = 60.0
"""Seconds for each condition: this machine may be busy."""


def reasons(stack: Stack) -> list[str]:
    said = stack.ask_autoscaler("/health") or {}
    return [r["reason"] for r in said.get("reasons", [])]


def hot(stack: Stack) -> list[int]:
    said = stack.ask_autoscaler("/instances") or {}
    return [i["id"] for i in said.get("instances", []) if i["state"] == "hot"]


def well(stack: Stack, machine: int) -> bool:
    """Say whether everything is as it shall be: nothing is wrong, and that machine serves."""
    said = stack.ask_autoscaler("/health") or {}
    return said.get("status") == "ok" and hot(stack) == [machine]


def known_from(stack: Stack) -> float:
    said: Any = stack.ask_autoscaler("/costs") or {}
    return float(said.get("known_from") or 0.0)


@contextmanager
def locked(stack: Stack) -> Iterator[None]:
    with ledger_locked(stack.ledger):
        yield


@contextmanager
def read_only(stack: Stack) -> Iterator[None]:
    stack.hooks[AUTOSCALER].disk(hook.READ_ONLY)
    try:
        yield
    finally:
        stack.hooks[AUTOSCALER].disk(hook.WORKS)


@contextmanager
def deleted(stack: Stack) -> Iterator[None]:
    """The ledger's file is deleted; the next one is begun in a turn, so nobody has to be told."""
    before, inode = known_from(stack), stack.ledger.stat().st_ino
    assert before
    for end in ("-wal", "-shm", ""):
        stack.ledger.with_name(stack.ledger.name + end).unlink(missing_ok=True)
    wait_for("another ledger", lambda: stack.ledger.exists() and stack.ledger.stat().st_ino != inode, WAIT_S)
    wait_for("it knows the fleet", lambda: known_from(stack) > before, WAIT_S)
    yield


@pytest.mark.alone
@pytest.mark.timeout(300)
def test_a_ledger_that_is_locked_read_only_and_deleted_costs_no_machine(tmp_path: Path) -> None:
    """Field faults C2, C3 and C8: each destroyed a healthy machine, or left the fleet without anybody."""
    settings = StackSettings(3, speedup=300.0, hot=1, total=1, max_instances=2)
    causes: list[tuple[Callable[[Stack], AbstractContextManager[None]], bool]] = [
        (locked, True),
        (read_only, True),
        (deleted, False),
    ]
    with Stack(settings, tmp_path / "chaos") as stack:
        wait_for("a machine is hot", lambda: len(hot(stack)) == 1, WAIT_S)
        [machine] = hot(stack)
        wait_for("all is well", lambda: well(stack, machine), WAIT_S)
        for cause, told in causes:
            if cause is read_only and not stack.hooks:
                continue  # no compiler here to make the hook with
            with cause(stack):
                if told:
                    wait_for("it is said", lambda: "ledger_not_writable" in reasons(stack), WAIT_S)
                    until = time.monotonic() + 5.0 * settings.poll_s
                    while time.monotonic() < until:  # it lasts for some turns and checks
                        said = stack.ask_autoscaler("/health")
                        assert said is None or said["status"] != "ok"  # None: no answer in time
            wait_for(f"all is well after {cause.__name__}", lambda: well(stack, machine), WAIT_S)
        said = stack.ask_autoscaler("/decisions")
        assert said["bans"] == []
        orders = [c["do"] for d in said["decisions"] for c in d["commands"]]
        assert orders.count("create") == 1
        assert "destroy" not in orders
        assert [row["id"] for row in stack.status()["instances"]] == [machine]
        assert "Traceback" not in (stack.logs / f"{AUTOSCALER}.log").read_text()
