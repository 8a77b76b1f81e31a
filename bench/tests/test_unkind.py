"""The rows of `make harsh-undo`: each tells a fleet that does right from one that does not."""

from dataclasses import fields

import pytest

from bench.unkind.play import Day, Outcome
from bench.unkind.rows import MET_BEFORE, ROWS, Play
from localcloud.faults import FAULTS
from localcloud.machines import machines_from
from localcloud.realism import Realism


class Player:
    """Plays every day with the outcome that a test gives, and remembers the days."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.days: list[Day] = []

    def __call__(self, day: Day) -> Outcome:
        self.days.append(day)
        return self.outcome


def outcome(rented: int, *, hot: bool = True, banned: tuple[int, ...] = (), ledger: float = 1.0) -> Outcome:
    return Outcome(
        rented={1001 + n: 11 + n for n in range(rented)},
        hot_s=20.0 if hot else None,
        banned=banned,
        cloud={"spent_usd": {"total": 1.0}},
        ledger_usd=ledger,
        last_hot=rented,
    )


def wanted(row: str) -> int:
    player = Player(outcome(1))
    ROWS[row](player)
    return player.days[0].hot


NO_WASTE = [
    *("kind", "script_bytes", "old_drivers", "foreign_cpus", "sizes", "big_market"),
    *("renters", "price_moves", "offers_vanish", "rate_limits", "credit"),
    *("bandwidth", "stopped_storage", "price_increase"),
    *("ssh_greeting", "ssh_tmux", "ssh_key_lag_s", "ssh_keys_lost", "ssh_refused"),
]


@pytest.mark.parametrize("row", NO_WASTE)
def test_a_row_is_right_only_when_nothing_was_wasted(row: str) -> None:
    hot = wanted(row)
    said = {
        "right": ROWS[row](Player(outcome(hot))).right,
        "one in vain": ROWS[row](Player(outcome(hot + 1))).right,
        "never hot": ROWS[row](Player(outcome(hot, hot=False))).right,
        "banned": ROWS[row](Player(outcome(hot, banned=(11,)))).right,
    }
    assert said == {"right": True, "one in vain": False, "never hot": False, "banned": False}


def test_a_ledger_that_differs_from_what_was_charged_is_wrong() -> None:
    for row in ("price_moves", "bandwidth", "stopped_storage"):
        assert ROWS[row](Player(outcome(1))).right
        assert not ROWS[row](Player(outcome(1, ledger=0.8))).right
        assert not ROWS[row](Player(outcome(1, ledger=1.2))).right


def test_a_limit_of_the_account_must_be_said() -> None:
    played = outcome(0, hot=False)
    played.health = {"holds": [{"kind": "spend-limit"}]}
    assert ROWS["spend_limit_usd_h"](Player(played)).right
    played.health = {}
    assert not ROWS["spend_limit_usd_h"](Player(played)).right


@pytest.mark.parametrize(
    "row", ["gated_model", "missing_model", "wrong_argument", "missing_image", "private_image"]
)
def test_what_every_machine_would_fail_of_may_cost_two_and_bans_none(row: str) -> None:
    def right(rented: int, banned: tuple[int, ...], holds: list[object]) -> bool:
        played = outcome(rented, hot=False, banned=banned)
        played.health = {"holds": holds}
        return ROWS[row](Player(played)).right

    assert right(2, (), ["said"])
    assert not right(3, (), ["said"])
    assert not right(2, (11,), ["said"])
    assert not right(2, (), [])


@pytest.mark.parametrize("row", list(ROWS))
def test_a_row_switches_unkindnesses_on_that_there_are_and_rents_machines_that_can_be(row: str) -> None:
    player: Player | Play = Player(outcome(1))
    ROWS[row](player)
    assert isinstance(player, Player)
    for day in player.days:
        assert set(day.only) <= {f.name for f in fields(Realism)}
        if row != "kind" and row in {f.name for f in fields(Realism)}:
            assert row in day.only
        assert {name.partition(":")[0] for name in day.faults} <= set(FAULTS)
        if day.machines:
            machines_from([dict(m) for m in day.machines])


def test_what_was_met_before_is_a_row() -> None:
    assert set(ROWS) >= MET_BEFORE
