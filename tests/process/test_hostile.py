"""A small seed of `make hostile`: no input ends in a 500, a traceback, a dead server or memory that grows."""

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bench.hostile.__main__ import Found, attack
from bench.hostile.inputs import message, mutated
from dispatch.load_reports import Poll
from fleet_client.leases import ClientLease, read_batch, read_route, read_well
from tests.loadbalancer_app import LoadBalancerApp
from web.messages.busy import BusyAnswer, BusyReport, read_busy
from web.messages.decoding import BadField, decode
from web.messages.hot_set import HotSet
from web.messages.leases import DoneBody, LeaseAnswer, LeaseBatch, PaceBody, RouteBody, WellBody
from web.messages.operator import ManageBody, PolicyBody
from web.messages.reports import LoadReport, PushedReport, ReadyBody, TokenBatch, read_report

SEED = 20261130


def test_hostile_inputs_over_all_faces(tmp_path: Path) -> None:
    found = attack(tmp_path, 3200, SEED, idle=0)
    assert {name: one.faults() for name, one in found.items()} == {name: [] for name in found}
    for name, one in found.items():
        assert one.statuses["200"] > 50, f"{name}: {one.statuses}: the inputs get far"
        refused = one.statuses["400"] + (one.statuses["closed"] if name.endswith("-tls") else 0)  # no TLS
        assert refused > 50, f"{name}: {one.statuses}: they are hostile"


def test_what_must_not_be_is_found() -> None:
    assert Found(warm_mb=100.0, end_mb=112.0).faults() == []
    assert Found(warm_mb=100.0, end_mb=114.0).faults() == ["memory grew from 100 to 114 MB"]
    assert Found(wrong=["500 for x"], tracebacks=["…"], gone=True).faults() == [
        "500 for x",
        "…",
        "it is gone",
    ]


MESSAGES: list[Any] = [
    *(BusyAnswer, BusyReport, HotSet, DoneBody, LeaseAnswer, LeaseBatch, PaceBody, RouteBody, WellBody),
    *(ManageBody, PolicyBody, LoadReport, PushedReport, ReadyBody, TokenBatch),
]


@pytest.mark.parametrize("kind", MESSAGES, ids=[kind.__name__ for kind in MESSAGES])
def test_a_message_is_read_or_refused_with_its_field(kind: Any) -> None:
    rng = random.Random(f"{SEED} {kind.__name__}")
    read = 0
    for n in range(400):
        raw = message(kind, rng)
        with suppress(BadField):
            decode(raw if n % 4 else mutated(raw, rng), kind)
            read += 1
    assert 0 < read < 400, "some fit, and some do not"


def test_what_a_lying_instance_reports_is_taken_or_refused() -> None:
    rng, app = random.Random(SEED), LoadBalancerApp()
    app.stock()
    balancer = app.balancer
    inst = balancer.instances.by_id[7]
    taken = 0
    for n in range(600):
        app.clock.now += 1.0
        balancer.tick(app.clock.now)
        app.client.post("/route", json={"work": 1.0})
        for refill in balancer.refills(app.clock.now):
            batch = None
            with suppress(BadField):
                batch = decode(message(TokenBatch, rng), TokenBatch)
            balancer.complete_refill(refill, batch, app.clock.now)
        try:
            report = read_report(message(LoadReport, rng), LoadReport)
            balancer.complete_poll(Poll(inst.spec, n), report, app.clock.now)
            taken += 1
        except BadField:
            continue
        balancer.usage(app.clock.now)
        assert 0.0 <= app.client.get("/status").get_json()["busy"] <= 1.0
    assert taken > 100


def test_what_a_lying_loadbalancer_says_is_a_lease_or_a_refusal() -> None:
    rng = random.Random(SEED)
    for n in range(1500):
        raw = message(LeaseBatch if n % 2 else LeaseAnswer, rng)
        status = rng.choice((200, 200, 503))
        one = read_route(status, raw, rng.choice((None, "nan", "1e999", "-1", "x")), 0.0)
        if isinstance(one, ClientLease):
            assert 0.0 <= one.expires <= 1e6
        else:
            assert one.message.isprintable()
            assert 0.0 <= one.retry_after_s <= 600.0
        assert read_batch(status, raw, None, 0.0)
    odd = b'{"out": {"' + b"7" * 5000 + b'": "silent", "8": "silent", "-1": "x", "\\u0667": "x"}}'
    assert read_well((200, odd, None)) == {8: "silent"}


def test_rows_of_busy_that_cannot_be_cost_only_themselves() -> None:
    rng = random.Random(SEED)
    for _ in range(500):
        try:
            report, _ = read_busy(message(BusyReport, rng))
        except BadField:
            continue
        assert report.busy >= 0.0
