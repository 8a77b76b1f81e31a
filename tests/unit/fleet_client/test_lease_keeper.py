"""The jobs of a transport beside its requests: leases fetched ahead, and ends of leases that are told."""

import json
from contextlib import nullcontext
from typing import Any

import pytest

from fleet_client import lease_keeper
from fleet_client.call import Call
from fleet_client.lease_keeper import LeaseKeeper, LoadbalancerJob
from fleet_client.leases import Refusal
from fleet_client.options import FleetOptions
from fleet_client.token_estimate import TokenEstimate
from tests.fake_fleet import lease

CALL = Call("POST", "/v1/x", [], b"", TokenEstimate(100, 50))
TOLD = (200, b"{}", None)


class Woken(LeaseKeeper):
    """Counts how often it would have woken its transport."""

    def __init__(self, **options: Any) -> None:
        self.woken = 0
        super().__init__(FleetOptions(**options), nullcontext(), self._count)

    def _count(self) -> None:
        self.woken += 1


def batch(*numbers: int) -> tuple[int, bytes, None]:
    """What the loadbalancer answers when it gives leases to these instances."""
    one = {"address": "http://127.0.0.1:1", "token": "T", "expires_in_s": 60}
    leases = [one | {"request_id": f"r{number}", "instance_id": number} for number in numbers]
    return 200, json.dumps({"leases": leases}).encode(), None


def test_after_its_first_request_a_batch_is_to_be_fetched_and_the_next_takes_of_it() -> None:
    keeper = Woken(ahead=2)
    assert keeper.next_job(0.0) is None
    assert keeper.first(CALL, 0.0) == (None, False)
    assert keeper.woken == 0  # a batch must not take what this request is waiting for
    keeper.refill()
    assert keeper.woken == 1
    job = keeper.next_job(0.1)
    wanted = {"prompt_tokens": 100, "max_tokens": 50, "count": 2}
    assert job == LoadbalancerJob("/route", wanted, lease_keeper.BATCH_S, 0.1, 2)
    assert str(keeper) == "0 leases ahead, 2 coming"
    keeper.finish_job(job, batch(7, 8), 0.2)
    assert (str(keeper), keeper.woken) == ("2 leases ahead, 0 coming", 2)
    taken, nearer = keeper.first(CALL, 0.3)
    assert taken is not None
    assert (taken.instance_id, nearer, keeper.woken) == (7, False, 3)
    again = keeper.another(CALL, (), 0.4)
    assert again is not None
    assert again.instance_id == 8


def test_a_batch_that_does_not_come_is_asked_for_again_when_it_may_be() -> None:
    keeper = Woken(ahead=2)
    keeper.first(CALL, 0.0)
    job = keeper.next_job(0.0)
    assert job is not None
    keeper.finish_job(job, Refusal(503, "busy", 2.0), 0.1)
    assert keeper.next_job(0.2) is None
    assert keeper.look_in_s(0.2) == pytest.approx(1.9)
    assert keeper.next_job(2.2) is not None


def test_ends_are_told_one_by_one_and_a_failed_instance_keeps_no_lease_at_hand() -> None:
    keeper = Woken(ahead=2)
    keeper.first(CALL, 0.0)
    job = keeper.next_job(0.0)
    assert job is not None
    keeper.finish_job(job, batch(7, 8), 0.0)
    keeper.tell(lease(7), "failed", "no_connection")
    assert keeper.at_hand == 1
    assert keeper.next_job(0.1, ends=False) is not None  # the lease that is missing now
    jobs = [keeper.next_job(0.1) for _ in range(3)]
    told = [job.body for job in jobs if job is not None]
    assert [(body["outcome"], body.get("why")) for body in told] == [
        ("failed", "no_connection"),
        ("unused", None),
    ]
    assert told[1]["request_id"] == "r7"


def test_what_the_loadbalancer_does_not_take_in_is_counted() -> None:
    keeper = Woken()
    for came in (TOLD, (503, b"", None), Refusal(0, "unreachable")):
        keeper.tell(lease(1), "failed", "broke_off")
        job = keeper.next_job(0.0)
        assert job is not None
        keeper.finish_job(job, came, 0.1)
    assert keeper.untold == 2


def test_no_more_than_10000_ends_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_keeper, "ENDS_KEPT", 3)
    keeper = Woken()
    for _ in range(5):
        keeper.tell(lease(1), "failed", "broke_off")
    assert keeper.untold == 2


def test_at_the_end_all_leases_go_back_and_what_cannot_be_told_any_more_is_counted() -> None:
    keeper = Woken(ahead=2)
    keeper.first(CALL, 0.0)
    job = keeper.next_job(0.0)
    assert job is not None
    keeper.finish_job(job, batch(7, 8), 0.0)
    woken = keeper.woken
    keeper.give_all_back()
    assert (keeper.at_hand, keeper.woken) == (0, woken + 1)
    assert keeper.first(CALL, 0.1) == (None, False)
    under_way = keeper.next_job(0.1)
    assert under_way is not None
    assert under_way.body == {"request_id": "r7", "outcome": "unused"}
    keeper.abandon()
    assert (keeper.untold, keeper.next_job(0.2), keeper.look_in_s(0.2)) == (1, None, None)
    keeper.tell(lease(1), "failed", "broke_off")
    keeper.finish_job(under_way, Refusal(0, "cancelled"), 0.2)
    assert (keeper.untold, keeper.next_job(0.2), keeper.woken) == (3, None, woken + 1)


def test_requests_below_the_transports_priority_take_no_lease_at_hand() -> None:
    def call(priority: str | None) -> Call:
        return Call("POST", "/v1/x", [], b"", TokenEstimate(1, 1), priority=priority)

    keeper = Woken(ahead=1)
    assert [keeper.may_take(call(p)) for p in ("high", "normal", None, "low")] == [True, True, True, False]
    assert not Woken(ahead=0).may_take(call("high"))
