"""Leases that are fetched before they are needed: how many, when, and which one a request takes."""

from typing import Any

import pytest

from fleet_client.leases import ClientLease
from fleet_client.leases_ahead import BATCH, LeasesAhead
from fleet_client.token_estimate import TokenEstimate
from tests.fake_fleet import lease

SMALL = TokenEstimate(100, 50)


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
    ahead.take(TokenEstimate(10**6, None), 4.0)  # far above: it shows use, and takes none of these
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
    assert ahead.take(TokenEstimate(100_000, 4000), 0.1) is None
    assert ahead.typical.prompt_tokens <= 300
    assert ahead.take(TokenEstimate(150, 60), 0.2) is not None


def test_a_client_that_sets_no_limit_asks_for_none() -> None:
    ahead = LeasesAhead(2)
    ahead.take(TokenEstimate(100, None), 0.0)
    assert ahead.typical == TokenEstimate(100, None)
    for _ in range(50):
        ahead.take(TokenEstimate(200, 80), 0.0)
    assert ahead.typical == TokenEstimate(199, 80)


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


def filled(*leases: ClientLease, most: int = 0) -> LeasesAhead:
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
    ahead.take(TokenEstimate(10**6, None), 4.0)
    assert ahead.look_in_s(4.0) == pytest.approx(3.0)
    assert numbers(ahead.sweep(7.1)) == [1]
    assert ahead.want(7.1) == 1
    ahead.take(TokenEstimate(10**6, None), 11.0)
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
