"""What the loadbalancer says of leases, and those that are fetched ahead."""

import json
from typing import Any

import pytest

from fleet_client.leases import BATCH, Lease, LeasesAhead, Refusal, read_batch, read_route, route_body
from fleet_client.token_estimate import Size
from tests.fake_fleet import lease

SMALL = Size(100, 50)


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
    assert got == Lease("https://1.2.3.4:5", "r", 7, 1000.0, 1060.0, "T", "PEM")
    assert isinstance(got, Lease)
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
    assert route_body(Size(5, None), 1.0, [1, 2, 1], affinity=("0" * 16,), priority="low", count=3) == {
        "prompt_tokens": 5,
        "wait_s": 1.0,
        "avoid": [1, 2],
        "affinity": ["0" * 16],
        "priority": "low",
        "count": 3,
    }
    assert route_body(SMALL, 0.0, range(100))["avoid"] == list(range(36, 100))  # the last that failed


# -- leases ahead --------------------------------------------------------------------------------------


def test_leases_are_fetched_ahead_from_the_first_request_on_and_used_oldest_first() -> None:
    ahead = LeasesAhead(3)
    assert (ahead.want(0.0), ahead.look_in_s(0.0)) == (0, None)
    assert ahead.take(SMALL, 0.0) is None
    assert (ahead.typical, ahead.want(0.0), ahead.want(0.0)) == (SMALL, 3, 0)
    assert ahead.arrived([lease(1), lease(2), lease(3)], 3, 0.1) == ()
    got = ahead.take(SMALL, 0.2)
    assert got is not None
    assert got.instance_id == 1
    assert (ahead.want(0.2), len(ahead)) == (1, 2)


def test_a_lease_in_the_last_part_of_its_life_goes_back_and_is_replaced() -> None:
    ahead = LeasesAhead(2)
    ahead.take(SMALL, 0.0)
    ahead.want(0.0)
    ahead.arrived([lease(1, 0.0, 10.0), lease(2, 0.0, 100.0)], 2, 0.0)
    ahead.take(Size(10**6, None), 4.0)  # far above: it shows use, and takes none of these
    assert ahead.look_in_s(4.0) == pytest.approx(3.0)
    taken = ahead.take(SMALL, 7.1)
    assert taken is not None
    assert taken.instance_id == 2
    assert [one.instance_id for one in ahead.sweep(7.1)] == [1]
    assert ahead.want(7.1) == 2


def test_a_request_far_above_the_others_takes_its_own_lease_and_sways_the_mean_little() -> None:
    ahead = LeasesAhead(2)
    ahead.take(SMALL, 0.0)
    ahead.want(0.0)
    ahead.arrived([lease(1), lease(2)], 2, 0.0)
    assert ahead.take(Size(100_000, 4000), 0.1) is None
    assert ahead.typical.prompt_tokens <= 300
    assert ahead.take(Size(150, 60), 0.2) is not None


def test_a_client_that_sets_no_limit_asks_for_none() -> None:
    ahead = LeasesAhead(2)
    ahead.take(Size(100, None), 0.0)
    assert ahead.typical == Size(100, None)
    for _ in range(50):
        ahead.take(Size(200, 80), 0.0)
    assert ahead.typical == Size(199, 80)


def test_all_go_back_when_none_is_used_for_a_while() -> None:
    ahead = LeasesAhead(1)
    ahead.take(SMALL, 0.0)
    ahead.want(0.0)
    ahead.arrived([lease(1)], 1, 0.0)
    assert ahead.look_in_s(1.0) == pytest.approx(4.0)
    assert ahead.sweep(4.9) == []
    assert ahead.want(5.0) == 0
    assert [one.instance_id for one in ahead.sweep(5.0)] == [1]
    assert ahead.arrived([lease(2)], 1, 5.1) == [lease(2)]
    assert ahead.look_in_s(5.2) is None


def test_after_a_refusal_it_asks_later_and_later_and_not_before_it_is_told() -> None:
    ahead = LeasesAhead(1)
    ahead.take(SMALL, 0.0)
    assert ahead.want(0.0) == 1
    ahead.refused(1, 0.0, 0.0)
    assert ahead.look_in_s(0.0) == pytest.approx(0.1)
    assert (ahead.want(0.09), ahead.want(0.11)) == (0, 1)
    ahead.refused(1, 2.0, 0.2)
    assert (ahead.want(2.1), ahead.want(2.21)) == (0, 1)
    ahead.arrived([lease(1)], 1, 2.3)
    ahead.take(SMALL, 2.3)
    assert ahead.want(2.3) == 1


def test_an_instance_that_failed_keeps_no_lease_ahead_and_a_close_gives_all_back() -> None:
    ahead = LeasesAhead(3)
    ahead.take(SMALL, 0.0)
    ahead.want(0.0)
    ahead.arrived([lease(1), lease(2), lease(1)], 3, 0.0)
    assert [one.instance_id for one in ahead.leave(1)] == [1, 1]
    assert ahead.want(0.0) == 2
    assert [one.instance_id for one in ahead.close()] == [2]
    assert ahead.arrived([lease(3), lease(4)], 2, 0.1) == [lease(3), lease(4)]
    assert (ahead.take(SMALL, 0.1), ahead.want(0.1)) == (None, 0)


def test_no_leases_ahead_are_the_default() -> None:
    ahead = LeasesAhead(0)
    assert ahead.take(SMALL, 0.0) is None
    assert (ahead.want(0.0), ahead.look_in_s(0.0)) == (0, None)


def filled(*leases: Lease, most: int = 0) -> LeasesAhead:
    """Leases that are here since 0.0."""
    ahead = LeasesAhead(most or len(leases))
    ahead.take(SMALL, 0.0)
    ahead.arrived(leases, ahead.want(0.0), 0.0)
    return ahead


def numbers(leases: Any) -> list[int]:
    return [one.instance_id for one in leases]


def test_one_call_fetches_all_that_is_missing_up_to_64() -> None:
    for most, calls in ((1, [1]), (8, [8]), (64, [64]), (100, [64, 36]), (256, [64] * 4)):
        ahead = LeasesAhead(most)
        ahead.take(SMALL, 0.0)
        asked = []
        while wanted := ahead.want(0.0):
            asked.append(wanted)
        assert asked == calls
    assert BATCH == 64


def test_a_call_is_made_when_a_quarter_is_missing() -> None:
    ahead = filled(*(lease(n) for n in range(16)))
    calls = []
    for n in range(40):
        assert ahead.take(SMALL, 0.1) is not None
        wanted = ahead.want(0.1)
        if wanted:
            calls.append((n, wanted))
            ahead.arrived([lease(n) for _ in range(wanted)], wanted, 0.1)
    assert calls == [(n, 4) for n in range(3, 40, 4)]


def test_a_batch_is_used_in_its_order() -> None:
    ahead = filled(*(lease(n) for n in (5, 3, 9, 3)))
    taken = [ahead.take(SMALL, 0.1) for _ in range(5)]
    assert [one and one.instance_id for one in taken] == [5, 3, 9, 3, None]


def test_after_a_partial_answer_the_rest_is_asked_for_later_and_later() -> None:
    ahead = LeasesAhead(8)
    ahead.take(SMALL, 0.0)
    assert ahead.want(0.0) == 8
    assert ahead.arrived([lease(1), lease(2), lease(3)], 8, 0.0) == ()
    assert len(ahead) == 3
    assert ahead.want(0.05) == 0
    assert ahead.look_in_s(0.0) == pytest.approx(0.1)
    assert ahead.want(0.11) == 5
    ahead.arrived([lease(4)], 5, 0.11)
    assert (ahead.want(0.3), ahead.want(0.32)) == (0, 4)
    ahead.arrived([lease(n) for n in range(4)], 4, 0.32)
    ahead.take(SMALL, 0.33)
    ahead.take(SMALL, 0.33)
    assert ahead.want(0.33) == 2  # there is room again


def test_those_of_a_batch_expire_each_by_its_own_time() -> None:
    ahead = filled(*(lease(n, life_s=10.0 * n) for n in (1, 2, 3)))
    assert ahead.look_in_s(4.9) == pytest.approx(0.1)  # idle
    ahead.take(Size(10**6, None), 4.0)
    assert ahead.look_in_s(4.0) == pytest.approx(3.0)
    assert numbers(ahead.sweep(7.1)) == [1]
    assert ahead.want(7.1) == 1
    ahead.take(Size(10**6, None), 11.0)
    assert numbers(ahead.sweep(14.1)) == [2]
    one = ahead.take(SMALL, 15.0)
    assert one is not None
    assert one.instance_id == 3


def test_of_the_leases_here_the_one_nearest_to_the_prefix_is_taken_and_the_oldest_of_equals() -> None:
    ahead = filled(*(lease(n, request_id=f"{n}-{k}") for k in range(2) for n in (1, 2, 3)))
    near = {2: 5, 3: 1}
    taken = [ahead.take(SMALL, 0.1, near=near) for _ in range(6)]
    assert [one and one.request_id for one in taken] == ["2-0", "2-1", "3-0", "3-1", "1-0", "1-1"]


def test_no_lease_is_taken_of_an_instance_to_be_avoided() -> None:
    ahead = filled(*(lease(n) for n in (1, 2, 1, 3)))
    one = ahead.take(SMALL, 0.1, avoid=(1, 3), near={1: 9})
    assert one is not None
    assert one.instance_id == 2
    assert ahead.take(SMALL, 0.1, avoid=(1, 3)) is None
    assert len(ahead) == 3


@pytest.mark.parametrize(
    ("near", "route_s", "worth"),
    [
        ({}, 0.001, False),  # nobody has read it
        ({9: 1}, 0.001, False),  # too little
        ({9: 2}, 0.001, True),
        ({9: 2}, 0.060, False),  # 512 tokens are read in 51 ms
        ({9: 20}, 0.060, True),
        ({9: 20, 1: 20}, 0.001, False),  # there is a lease for one that has read it, too
        ({9: 20, 1: 19}, 0.001, False),  # ... or nearly as much
        ({9: 20, 1: 4}, 0.001, True),
        ({9: 20, 1: 4}, 0.500, False),
        ({8: 20}, 0.001, False),  # to be avoided
    ],
)
def test_a_question_is_worth_it_when_it_is_answered_sooner_than_the_prefix_is_read_again(
    near: dict[int, int], route_s: float, worth: bool
) -> None:
    ahead = filled(lease(1), lease(2))
    ahead.answered(route_s)
    assert ahead.better_asked(20, near, (8,), 0.1) == worth


def test_a_new_prompt_is_told_when_others_often_come_back_and_find_no_lease_where_they_were_read() -> None:
    ahead = filled(lease(1), lease(2))
    ahead.answered(0.02)
    assert not ahead.better_asked(100, {}, (), 0.1)
    for _ in range(20):  # a client whose prompts are all new
        assert not ahead.better_asked(8, {}, (), 0.1)
    for _ in range(20):  # conversations, and their instances are others
        assert ahead.better_asked(8, {9: 4}, (), 0.1)
    assert ahead.better_asked(8, {}, (), 0.1)
    assert not ahead.better_asked(1, {}, (), 0.1)  # too little in any case
    for _ in range(60):  # conversations, and there is a lease where they were read
        assert not ahead.better_asked(8, {2: 4}, (), 0.1)
    assert not ahead.better_asked(8, {}, (), 0.1)


def test_without_a_fresh_lease_here_there_is_nothing_to_compare() -> None:
    assert not LeasesAhead(0).better_asked(20, {9: 20}, (), 0.0)
    ahead = filled(lease(1, life_s=1.0))
    assert ahead.better_asked(20, {9: 20}, (), 0.1)
    assert not ahead.better_asked(20, {9: 20}, (1,), 0.1)
    assert not ahead.better_asked(20, {9: 20}, (), 0.9)


def test_how_long_an_answer_takes_is_a_running_mean() -> None:
    ahead = LeasesAhead(1)
    ahead.answered(0.1)
    assert ahead.route_s == pytest.approx(0.1)
    for _ in range(50):
        ahead.answered(0.01)
    assert ahead.route_s == pytest.approx(0.01, abs=0.001)
