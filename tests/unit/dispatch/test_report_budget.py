"""An instance that says too much, or what cannot be: it is out, and the others do not notice."""

import json
from typing import Any

import msgspec
import pytest

from dispatch.report_budget import OUT_S
from tests.dispatch_world import DispatchWorld, instance, world
from tests.messages import load_report, request_end
from web.messages.busy import BusyReport, read_busy
from web.messages.decoding import BadField, decode
from web.messages.reports import MAX_EVENTS, LoadReport, PushedReport, read_report


def strangers(count: int, first: int = 0) -> tuple[str, ...]:
    """Ids of requests that this loadbalancer did not give."""
    return tuple(f"{first + n:016x}" for n in range(count))


def push(number: int, count: int) -> PushedReport:
    """One of unknown ids, each time others."""
    return PushedReport("boot1", number, 0, 1, False, strangers(count, number * count), (), True)


def row(b: DispatchWorld, id: int) -> dict[str, Any]:
    """What the operator sees of it."""
    return next(one for one in b.describe()["instances"] if one["id"] == id)


def test_an_instance_with_more_events_than_it_can_keep_is_out_for_a_while_and_then_tried_again() -> None:
    b = world(instance(1), instance(2))
    for id in (1, 2):
        b.report(id)
    b.report(1, started=strangers(150_000))
    said = "it reported 150000 events in a report, of 65536 at most"
    assert row(b, 1)["out"] == said
    report, odd = read_busy(msgspec.json.encode(b.balancer.usage(b.now, "lb")))
    assert ([report.instances[id].out for id in (1, 2)], odd) == ([said, None], None)
    assert [row(b, id)["in_queue"] for id in (1, 2)] == [False, True]
    assert row(b, 1)["work"] == 0.0
    assert b.lease(10.0).instance_id == 2
    b.now += 10.0
    asked = {p.instance_id for _ in range(50) for p in b.balancer.polls(b.now)}
    assert 1 not in asked
    b.now += OUT_S
    asked = {p.instance_id for _ in range(50) for p in b.balancer.polls(b.now)}
    assert 1 in asked
    assert row(b, 1)["out"] is None


def test_an_instance_that_pushes_faster_than_it_was_told_is_out_and_not_heard() -> None:
    b = world(instance(1), instance(2))
    for id in (1, 2):
        b.report(id)
    taken = [b.balancer.pushed(1, push(n, MAX_EVENTS), b.now) is not None for n in range(77)]
    assert sum(taken) < 60
    assert row(b, 1)["out"].startswith("it reported more than")
    assert not row(b, 1)["in_queue"]
    assert b.balancer.pushed(2, push(1, 1), b.now) is not None


def test_an_instance_that_keeps_to_what_it_was_told_is_never_out() -> None:
    b = world(instance(1))
    b.report(1)
    for n in range(2000):
        next_in_s = b.balancer.pushed(1, push(n, 3), b.now)
        assert next_in_s is not None
        b.now += next_in_s


def test_strangers_are_demand_only_as_far_as_the_machine_can_hold_them() -> None:
    b = world(instance(1), instance(2))
    for id in (1, 2):
        b.report(id)
    b.report(1, started=strangers(60_000), running=100_000)
    inst = b.balancer.instances.by_id[1]
    assert len(inst.other_requests) <= 1024
    usage = b.balancer.usage(b.now)
    assert usage.demand == pytest.approx(1.0)
    assert usage.instances[1].work == pytest.approx(inst.capacity)


@pytest.mark.parametrize("tokens", ["1" + "0" * 300, "1" + "0" * 400, "-1", "1.5", '"many"', "4294967296"])
def test_one_length_that_cannot_be_ends_its_request_and_leaves_the_report_useful(tokens: str) -> None:
    said = msgspec.to_builtins(load_report(seq=3, ended=(request_end("a" * 16), request_end("b" * 16))))
    raw = json.dumps(said).replace('"output_tokens": 100', f'"output_tokens": {tokens}', 1)
    found = read_report(raw.encode(), LoadReport)
    assert found.seq == 3
    assert found.ended == [request_end("a" * 16, "aborted", 0), request_end("b" * 16)]


def test_an_odd_counter_is_as_none_and_a_head_that_cannot_be_is_refused() -> None:
    said = msgspec.to_builtins(load_report())
    found = read_report(
        json.dumps(said | {"generation_tokens_total": 10**300, "kv_use": -4}).encode(), LoadReport
    )
    assert (found.generation_tokens_total, found.kv_use) == (0, None)
    sizes = said | {"started": ["a" * 16], "started_bytes": [-1]}
    assert read_report(json.dumps(sizes).encode(), LoadReport).started == ["a" * 16]
    for wrong in ({"running": 10**300}, {"running": 10**9}, {"seq": -1}, {"boot_id": "x" * 1000}):
        with pytest.raises(BadField):
            read_report(json.dumps(said | wrong).encode(), LoadReport)
    for raw in (b"[" * 100_000 + b"]" * 100_000, b'{"ended": ' + b"[" * 100_000, b"NaN", b"\xff", b"{}"):
        with pytest.raises(BadField):
            read_report(raw, LoadReport)


def test_a_report_of_many_odd_ends_is_refused_before_it_costs_time() -> None:
    said = msgspec.to_builtins(load_report()) | {"ended": [{"id": "a"}] * 60_000}
    with pytest.raises(BadField, match="id"):
        read_report(json.dumps(said).encode(), LoadReport)


def test_one_length_that_may_be_but_never_is_changes_little_of_what_is_expected() -> None:
    b = world(instance(1))
    lease = b.lease(10.0)
    b.report(1, started=(lease.request_id,), running=1)
    before = b.balancer.work_of(0, None)
    b.report(1, ended=(request_end(lease.request_id, "finished", 10_000_000),))
    assert b.balancer.work_of(0, None) < 4.0 * before


def test_whatever_an_instance_says_the_autoscaler_takes_the_report() -> None:
    b = world(instance(1))
    b.report(1, running=100_000, waiting=100_000, started=strangers(60_000))
    raw = msgspec.json.encode(b.balancer.usage(b.now, "lb"))
    assert decode(raw, BusyReport).instances[1].work > 0.0


def test_one_odd_row_does_not_make_the_others_unheard() -> None:
    b = world(instance(1), instance(2))
    said = json.loads(msgspec.json.encode(b.balancer.usage(b.now, "lb")))
    said["instances"]["1"]["work"] = 1e300
    found, odd = read_busy(json.dumps(said).encode())
    assert list(found.instances) == [2]
    assert odd is not None
    assert odd.startswith("instances[...].work: ")
    with pytest.raises(BadField, match="demand"):
        read_busy(json.dumps(said | {"demand": -1.0}).encode())
