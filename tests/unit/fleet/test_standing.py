"""What an operator sets for the whole fleet: it is written down, and holds over a restart."""

import json
import logging
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet.outside.audit import AuditTrail
from fleet.outside.ledger import Ledger
from fleet.outside.standing import MANAGE, POLICY, StandingOrders
from policies import Fixed
from process.errors import ConfigError
from tests.unit.fleet.test_turns import Loop

FLAGS = {MANAGE: "True", POLICY: "busy [] None"}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "ledger.sqlite")
    yield made
    made.close()


def orders(loop: Loop, **flags: str) -> StandingOrders:
    return StandingOrders(loop.scaler, AuditTrail(loop.scaler.clock), FLAGS | flags)


def test_what_is_set_by_hand_holds_over_a_restart(ledger: Ledger) -> None:
    first = Loop(ledger)
    orders(first).set_manage(False, "anna")
    assert orders(first).set_policy("fixed", {"hot": 3}, "anna")["hot"] == 3
    second = Loop(ledger)
    assert second.scaler.instances.manage
    orders(second).take_over()
    assert not second.scaler.instances.manage
    assert second.scaler.policy == Fixed(3)


@pytest.mark.parametrize(
    ("changed", "hot", "manage"),
    [({MANAGE: "False"}, 3, True), ({POLICY: "busy ['aim=0.5'] None"}, 0, False)],
)
def test_a_flag_that_says_something_else_than_it_said_then_holds(
    ledger: Ledger, changed: dict[str, str], hot: int, manage: bool
) -> None:
    first = Loop(ledger)
    orders(first).set_manage(False, "anna")
    orders(first).set_policy("fixed", {"hot": 3}, "anna")
    second = Loop(ledger)
    StandingOrders(second.scaler, AuditTrail(second.scaler.clock), FLAGS | changed).take_over()
    assert isinstance(second.scaler.policy, Fixed)
    assert second.scaler.policy.hot == hot
    assert second.scaler.instances.manage == manage


def test_a_wrong_policy_changes_nothing_and_is_not_kept(ledger: Ledger) -> None:
    loop = Loop(ledger)
    before = loop.scaler.policy
    with pytest.raises(ConfigError, match="hot"):
        orders(loop).set_policy("fixed", {"hot": -3}, "anna")
    assert loop.scaler.policy is before
    assert ledger.noted(POLICY) is None


@pytest.mark.parametrize("kept", ["", "[]", "{", '{"value": {"name": "gone"}, "flag": "busy [] None"}', "7"])
def test_what_cannot_be_read_or_is_known_no_more_is_passed_over(
    ledger: Ledger, kept: str, caplog: pytest.LogCaptureFixture
) -> None:
    ledger.note({POLICY: kept})
    loop = Loop(ledger)
    before = loop.scaler.policy
    orders(loop).take_over()
    assert loop.scaler.policy is before
    assert not any(r.exc_info for r in caplog.records)


def test_a_ledger_that_cannot_be_written_stops_no_order(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: object) -> None:
        raise sqlite3.OperationalError("disk is full")

    loop = Loop(ledger)
    monkeypatch.setattr(ledger, "note", fails)
    orders(loop).set_manage(False, "anna")
    assert not loop.scaler.instances.manage
    assert "will not survive a restart: disk is full" in caplog.text


# -- the audit trail ---------------------------------------------------------------------------------


def test_each_act_is_a_line_with_who_what_and_when(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "audit.jsonl"
    trail = AuditTrail(lambda: 1700.5, path)
    trail.add("anna", "drain instance 7 (fleet/3)\nforged: line")
    trail.add("10.0.0.1", "manage: off")
    said = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(one["at"], one["who"]) for one in said] == [(1700.5, "anna"), (1700.5, "10.0.0.1")]
    assert "\n" not in said[0]["did"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert trail.newest() == said[::-1]
    assert "by hand: anna: drain instance 7" in caplog.text


def test_the_trail_goes_on_after_a_restart_and_over_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    AuditTrail(lambda: 1.0, path).add("anna", "manage: off")
    with path.open("a") as f:
        f.write('{"at": 2.0, "wh\n')
    trail = AuditTrail(lambda: 3.0, path)
    trail.add("ben", "manage: on")
    assert [line["who"] for line in trail.newest()] == ["ben", "anna"]


def test_a_trail_that_cannot_be_written_keeps_its_lines_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "audit.jsonl"
    path.mkdir()
    trail = AuditTrail(lambda: 1.0, path)
    trail.add("anna", "manage: off")
    assert [line["who"] for line in trail.newest()] == ["anna"]
    assert "cannot be" in caplog.text
