"""Leases ahead in a running transport: when they are fetched, used and given back, and for which requests."""

import asyncio
import time
from typing import Any

import openai
import pytest

from fleet_client import AsyncFleetTransport, Call, TokenEstimate, leases_ahead
from tests.fake_fleet import FakeFleet, FakeInstance, fake_fleet, make_certificate
from tests.unit.fleet_client.users import ALL, Make, plan, says, told
from tests.waiting import wait_for


def test_with_leases_ahead_a_request_needs_no_round_trip(user: Make, fleet: FakeFleet) -> None:
    one = user(fleet.url, ahead=4)
    one.stream()
    wait_for("four leases", lambda: len(fleet.loadbalancer.given) == 5)
    wait_for("all of them here", lambda: one.transport.leases_ahead == 4)
    fleet.loadbalancer.refusals.extend([(503, 60)] * 100)  # from now on there are none
    for _ in range(4):
        assert one.stream() == ALL
    used = {token for instance in fleet.instances for token in instance.used}
    assert used == {given.token for given in fleet.loadbalancer.given}


def test_leases_ahead_that_were_not_used_go_back_on_close(user: Make, fleet: FakeFleet) -> None:
    one = user(fleet.url, ahead=3)
    one.stream()
    wait_for("three leases", lambda: one.transport.leases_ahead == 3)
    one.close()
    used = [token for instance in fleet.instances for token in instance.used]
    ids = {given.request_id for given in fleet.loadbalancer.given if given.token not in used}
    assert {done["request_id"] for done in fleet.loadbalancer.dones} == ids
    assert len(ids) == 3
    assert {done["outcome"] for done in fleet.loadbalancer.dones} == {"unused"}
    ahead = {"prompt_tokens": 13, "count": 3}  # all in one call, which does not wait there
    assert ahead in fleet.loadbalancer.routes


def test_leases_ahead_go_back_when_nothing_happens_for_a_while(
    user: Make, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases_ahead, "IDLE_S", 0.3)
    user(fleet.url, ahead=3).stream()
    assert told(fleet, 3) == [("unused", "")] * 3


def test_leases_ahead_are_replaced_before_they_expire(user: Make, fleet: FakeFleet) -> None:
    fleet.loadbalancer.lease_s = 0.5
    one = user(fleet.url, ahead=2)
    one.stream()
    assert told(fleet, 2)[:2] == [("unused", "")] * 2
    wait_for("new ones", lambda: len(fleet.loadbalancer.given) >= 5)


def test_leases_ahead_of_an_instance_that_failed_are_not_used(
    user: Make, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases_ahead, "IDLE_S", 60.0)
    one = user(fleet.url, ahead=6)
    one.stream()
    wait_for("six leases", lambda: one.transport.leases_ahead == 6)
    first = fleet.instances[0]
    ready = [given for given in fleet.loadbalancer.given if given.instance_id == first.number]
    first.plan.append(says(503))
    while first.plan:
        assert one.stream() == ALL
    unused = {given.request_id for given in ready if given.token not in first.used}
    dones = fleet.loadbalancer.dones
    wait_for("they go back", lambda: unused <= {d["request_id"] for d in dones if d["outcome"] == "unused"})
    assert told(fleet)[0] == ("failed", "status_503")


def test_leases_ahead_come_in_one_call(user: Make, fleet: FakeFleet) -> None:
    one = user(fleet.url, ahead=100)
    one.stream()
    wait_for("all of them here", lambda: one.transport.leases_ahead == 100)
    assert sorted(said.get("count", 0) for said in fleet.loadbalancer.routes) == [0, 36, 64]
    for _ in range(30):
        assert one.stream() == ALL
    wait_for("a quarter more", lambda: one.transport.leases_ahead >= 90)
    assert len(fleet.loadbalancer.routes) <= 5
    tokens = [seen.header("authorization") for seen in fleet.requests]
    assert len(set(tokens)) == 31


def test_a_part_of_a_batch_is_better_than_none(user: Make, fleet: FakeFleet) -> None:
    fleet.loadbalancer.room = 6
    one = user(fleet.url, ahead=8)
    one.stream()
    wait_for("five leases", lambda: one.transport.leases_ahead == 5)
    wait_for("another call", lambda: len(fleet.loadbalancer.routes) >= 3)
    fleet.loadbalancer.room = None
    wait_for("the others", lambda: one.transport.leases_ahead == 8)


def test_batches_work_without_tls_on_loopback(user: Make) -> None:
    fleet = fake_fleet(2, tls=False)
    try:
        one = user(fleet.url, ahead=4)
        one.stream()
        wait_for("four leases", lambda: one.transport.leases_ahead == 4)
        assert [one.stream() for _ in range(4)] == [ALL] * 4
    finally:
        fleet.stop()


@pytest.mark.parametrize("refusal", [(503, 60), (429, 60, "too_many_unused")], ids=["503", "429"])
def test_a_client_that_is_refused_leases_ahead_does_not_ask_again_before_its_time(
    user: Make, fleet: FakeFleet, refusal: Any
) -> None:
    one = user(fleet.url, ahead=2)
    one.stream()
    wait_for("two leases", lambda: one.transport.leases_ahead == 2)
    fleet.loadbalancer.refusals.append(refusal)
    one.stream()
    wait_for("a refusal", lambda: not fleet.loadbalancer.refusals)
    wait_for("it is heard", lambda: " 0 coming" in repr(one.transport))
    asked = len(fleet.loadbalancer.routes)
    assert one.stream() == ALL
    time.sleep(0.3)
    assert len(fleet.loadbalancer.routes) == asked


def test_too_many_unused_leases_are_openais_own_429_with_the_time_to_wait(
    user: Make, fleet: FakeFleet
) -> None:
    fleet.loadbalancer.refusals.append((429, 40, "too_many_unused"))
    with pytest.raises(openai.RateLimitError) as e:
        user(fleet.url, wait_s=1.0).chat()
    assert e.value.code == "too_many_unused"
    assert e.value.response.headers["retry-after"] == "40"


@pytest.mark.parametrize("ahead", [0, 8], ids=["asked", "ahead"])
def test_another_try_never_goes_to_a_machine_that_was_tried(user: Make, ahead: int) -> None:
    fleet = fake_fleet(4, tls=False)
    try:
        one = user(fleet.url, ahead=ahead)
        one.stream()
        wait_for("leases ahead", lambda: one.transport.leases_ahead == ahead)
        seen = len(fleet.requests)
        plan(fleet, *[says(503)] * 3)
        assert one.stream() == ALL
        tried = [n for n, i in enumerate(fleet.instances) for _ in i.seen]
        assert len(fleet.requests) == seen + 4
        assert sorted(set(tried)) == [0, 1, 2, 3]
        failed = ("failed", "status_503")
        wait_for("three failures", lambda: told(fleet).count(failed) == 3)
    finally:
        fleet.stop()


def test_a_lease_ahead_is_not_taken_for_an_instance_that_the_call_avoids(fleet: FakeFleet) -> None:
    async def main() -> list[int]:
        transport = AsyncFleetTransport(fleet.url, ahead=6)
        body = b'{"model": "m", "prompt": "x"}'
        numbers = []
        for _ in range(5):
            call = Call("POST", "/v1/completions", [], body, TokenEstimate(1, 5), avoid=(1,))
            answer = await transport.exchange(call)
            assert answer.lease is not None
            numbers.append(answer.lease.instance_id)
            async for _ in answer:
                pass
            while transport.leases_ahead < 4:
                await asyncio.sleep(0.01)
        await transport.aclose()
        return numbers

    assert asyncio.run(main()) == [2] * 5
    assert len(fleet.loadbalancer.given) > 6


def test_nor_is_one_for_another_try(fleet: FakeFleet) -> None:
    third = FakeInstance(3, make_certificate())
    fleet.extra.append(third)
    fleet.instances.append(third)

    async def main() -> tuple[int, ...]:
        transport = AsyncFleetTransport(fleet.url, ahead=6)
        body = b'{"model": "m", "prompt": "x"}'
        first = await transport.exchange(Call("POST", "/v1/completions", [], body, TokenEstimate(1, 5)))
        await first.aclose()
        while transport.leases_ahead < 6:
            await asyncio.sleep(0.01)
        fleet.loadbalancer.room = 0
        plan(fleet, says(503))
        call = Call("POST", "/v1/completions", [], body, TokenEstimate(1, 5), avoid=(1,))
        answer = await transport.exchange(call)
        assert (answer.status, answer.lease is not None) == (200, True)
        await answer.aclose()
        await transport.aclose()
        return (*[number for number, _ in call.setbacks], answer.lease.instance_id if answer.lease else 0)

    assert sorted(asyncio.run(main())) == [2, 3]


def test_a_priority_goes_to_the_loadbalancer_and_its_header_not_to_the_instance(
    user: Make, fleet: FakeFleet
) -> None:
    one = user(fleet.url, priority="low")
    one.chat()
    one.chat(extra_headers={"X-Fleet-Priority": "high"})
    one.chat(extra_headers={"x-fleet-priority": "normal"})
    assert [body.get("priority") for body in fleet.loadbalancer.routes] == ["low", "high", None]
    assert all(seen.header("x-fleet-priority") is None for seen in fleet.requests)


def test_a_wrong_priority_is_a_400_that_names_the_header(user: Make, fleet: FakeFleet) -> None:
    with pytest.raises(openai.BadRequestError, match="X-Fleet-Priority: wanted high, normal or low") as e:
        user(fleet.url).chat(extra_headers={"X-Fleet-Priority": "urgent"})
    assert (e.value.param, e.value.code) == ("X-Fleet-Priority", "bad_priority")
    assert fleet.loadbalancer.routes == []


def test_leases_ahead_are_of_the_transports_priority_and_not_for_requests_below_it(
    user: Make, fleet: FakeFleet
) -> None:
    one = user(fleet.url, ahead=4)
    one.chat()
    wait_for("four leases", lambda: one.transport.leases_ahead == 4)
    asked = len(fleet.loadbalancer.routes)
    one.chat(extra_headers={"X-Fleet-Priority": "low"})
    assert fleet.loadbalancer.routes[asked]["priority"] == "low"
    assert one.transport.leases_ahead == 4
    one.chat(extra_headers={"X-Fleet-Priority": "high"})
    wait_for("another", lambda: len(fleet.loadbalancer.routes) == asked + 2)
    assert fleet.loadbalancer.routes[-1]["count"] == 1
    low = user(fleet.url, ahead=2, priority="low")
    low.chat()
    wait_for("two leases", lambda: low.transport.leases_ahead == 2)
    assert {"prompt_tokens": 13, "count": 2, "priority": "low"} in fleet.loadbalancer.routes
