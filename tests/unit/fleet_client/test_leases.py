"""What the loadbalancer says of leases, and what it is told."""

import json
from typing import Any, TypeVar

import msgspec
import pytest

from fleet_client import leases
from fleet_client.leases import ClientLease, Refusal, read_batch, read_route, route_body
from fleet_client.token_estimate import TokenEstimate
from tests.fake_fleet import lease
from web.messages.decoding import decode
from web.messages.leases import DoneBody, InstanceCertificate, LeaseAnswer, LeaseBatch, RouteBody

T = TypeVar("T")

SMALL = TokenEstimate(100, 50)


def test_a_lease_counts_from_its_arrival_and_no_clock_of_the_loadbalancer_matters() -> None:
    said = {
        "address": "https://1.2.3.4:5/",
        "token": "T",
        "request_id": "r",
        "instance_id": 7,
        "model": "m",
        "expires_at": -1e9,
        "expires_in_s": 60,
        "certificate": "PEM",
    }
    got = read_route(200, json.dumps(said).encode(), None, 1000.0)
    assert got == ClientLease("https://1.2.3.4:5", "r", 7, 1000.0, 1060.0, "T", "PEM")
    assert isinstance(got, ClientLease)
    assert [got.fresh(now) for now in (1000.0, 1041.9, 1042.1, 1061.0)] == [True, True, False, False]
    assert "PEM" not in repr(got)
    assert "'T'" not in repr(got)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{}",
        b'{"address": "http://127.0.0.1:1", "token": "T\\r\\nX: 1", "request_id": "r", "instance_id": 1, '
        b'"expires_in_s": 1}',
        b'{"address": "http://127.0.0.1:1", "token": "T", "request_id": "r", "instance_id": 1, '
        b'"expires_in_s": 1, "certificate": 5}',
        b'{"address": "http://127.0.0.1:1", "token": "T", "request_id": "r", "instance_id": "1"}',
    ],
    ids=range(6),
)
def test_a_lease_that_cannot_be_read_is_none_and_is_not_shown(raw: bytes) -> None:
    assert read_route(200, raw, None, 0.0) == Refusal(0, "its lease cannot be read")


def test_a_refusal_says_what_the_loadbalancer_said() -> None:
    raw = b'{"error": "all_busy", "message": "all are busy", "retry_after_s": 3}'
    assert read_route(503, raw, "3", 0.0) == Refusal(503, "all are busy", 3.0)
    assert read_route(503, b"<html>", "Fri, 31 Dec", 0.0) == Refusal(503, "status 503", 0.0)
    assert read_route(401, b'{"error": "unauthorized"}', None, 0.0) == Refusal(401, "unauthorized", 0.0, True)
    assert read_route(429, b"{}", "1e9", 0.0) == Refusal(429, "status 429", 600.0)


# -- several in one answer -----------------------------------------------------------------------------


def said(number: int, **more: Any) -> dict[str, Any]:
    """A lease as it comes in a batch."""
    return {
        "address": f"https://127.0.0.1:{number}",
        "token": f"T{number}",
        "request_id": f"r{number}",
        "instance_id": number,
        "model": "m",
        "expires_in_s": 60,
    } | more


def batch(*leases: object, **certificates: object) -> bytes:
    return json.dumps({"leases": leases, "certificates": certificates}).encode()


def test_a_batch_has_its_leases_in_order_and_each_the_certificate_of_its_instance() -> None:
    known = {"7": {"certificate": "PEM7", "public_key_sha256": "x"}, "8": {"certificate": "PEM8"}}
    got = read_batch(200, batch(said(8), said(7), said(7, request_id="r"), **known), None, 1000.0)
    assert isinstance(got, list)
    assert [(one.instance_id, one.request_id, one.certificate) for one in got] == [
        (8, "r8", "PEM8"),
        (7, "r7", "PEM7"),
        (7, "r", "PEM7"),
    ]
    assert {(one.granted, one.expires) for one in got} == {(1000.0, 1060.0)}


def test_a_lease_of_a_batch_without_a_certificate_has_none_wherever_else_one_stands() -> None:
    got = read_batch(200, batch(said(7, certificate="PEM"), **{"8": {"certificate": "PEM8"}}), None, 0.0)
    assert isinstance(got, list)
    assert [one.certificate for one in got] == [None]


def test_what_cannot_be_read_of_a_batch_costs_nothing_else() -> None:
    odd = [None, 5, {}, said(1, token="T\r\nX: 1"), said(2, instance_id="2"), said(3)]
    for certificates in ({"3": 5}, {"3": None}, {}):
        got = read_batch(200, batch(*odd, said(4), **certificates), None, 0.0)
        assert isinstance(got, list)
        assert [one.instance_id for one in got] == [3, 4]


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b'{"leases": []}', b'{"leases": 5}', b"[" * 9999, batch(None)], ids=range(7)
)
def test_a_batch_without_a_lease_is_a_refusal(raw: bytes) -> None:
    assert read_batch(200, raw, None, 0.0) == Refusal(0, "its lease cannot be read")


def test_a_batch_is_refused_as_a_single_lease_is() -> None:
    raw = b'{"error": "too_many_unused", "message": "use those you have"}'
    got = read_batch(429, raw, "7", 0.0)
    assert got == read_route(429, raw, "7", 0.0) == Refusal(429, "use those you have", 7.0)
    assert isinstance(got, Refusal)
    assert got.code == "too_many_unused"


def test_what_is_asked_has_sizes_and_hashes_and_only_what_is_not_the_default() -> None:
    assert route_body(SMALL, 0.0) == {"prompt_tokens": 100, "max_tokens": 50}
    assert route_body(
        TokenEstimate(5, None), 1.0, [1, 2, 1], affinity=("0" * 16,), priority="low", count=3
    ) == {
        "prompt_tokens": 5,
        "wait_s": 1.0,
        "avoid": [1, 2],
        "affinity": ["0" * 16],
        "priority": "low",
        "count": 3,
    }
    assert route_body(SMALL, 0.0, range(100))["avoid"] == list(range(36, 100))  # the last that failed


def as_read(body: dict[str, Any], kind: type[T]) -> T:
    """The body as the loadbalancer reads it."""
    return decode(json.dumps(body).encode(), kind)


def test_the_leases_that_the_loadbalancer_encodes_are_understood() -> None:
    given = LeaseAnswer("https://10.0.0.7:8000", "token", "0" * 16, 7, "vllm-13", 1e9, 60.0, "PEM", "hash")
    one = read_route(200, msgspec.json.encode(given), None, 100.0)
    assert one == ClientLease("https://10.0.0.7:8000", "0" * 16, 7, 100.0, 160.0, "token", "PEM")
    bare = msgspec.structs.replace(given, certificate=None, public_key_sha256=None)
    batch = LeaseBatch([bare, bare], {7: InstanceCertificate("PEM", "hash")})
    assert read_batch(200, msgspec.json.encode(batch), None, 100.0) == [one, one]


def test_what_is_asked_of_the_loadbalancer_is_what_the_real_one_takes() -> None:
    body = leases.route_body(TokenEstimate(5, 7), 3.0, [1, 1, 2])
    assert as_read(body, RouteBody) == RouteBody(prompt_tokens=5, max_tokens=7, wait_s=3.0, avoid=[1, 2])
    assert as_read(leases.route_body(TokenEstimate(0, None), 0.0), RouteBody) == RouteBody(prompt_tokens=0)
    hashes = ["0123456789abcdef"] * 256
    body = leases.route_body(TokenEstimate(5, 7), 0.0, affinity=hashes, priority="low", count=64)
    checked = as_read(body, RouteBody)
    assert (checked.affinity, checked.priority, checked.count) == (hashes, "low", 64)
    for outcome, why in (("unused", ""), ("failed", "wrong_certificate")):
        done = as_read(leases.done_body(lease(), outcome, why), DoneBody)
        assert (done.outcome, done.why or "") == (outcome, why)
