"""Which instance serves the next request, and how several requests are spread. Time is a number."""

from collections import Counter

import pytest

from dispatch.instance import ServingInstance
from tests.dispatch_world import full, instance, world


def test_a_request_goes_to_the_instance_that_is_done_with_it_first() -> None:
    b = world(instance(1), instance(2))
    first = b.lease()
    assert b.lease().instance_id != first.instance_id


def test_as_many_requests_as_idle_instances_take_one_each() -> None:
    b = world(*(instance(i) for i in range(1, 51)))
    assert Counter(b.lease().instance_id for _ in range(50)) == Counter(range(1, 51))


def test_equal_instances_are_chosen_among_by_chance() -> None:
    firsts = {world(*(instance(i) for i in range(1, 6)), seed=seed).lease().instance_id for seed in range(30)}
    assert len(firsts) > 1


def test_an_idle_fast_machine_is_preferred_to_an_idle_slow_one() -> None:
    b = world(*(instance(i) for i in range(1, 20)), instance(20, throughput=300.0))
    assert b.lease().instance_id == 20


def test_work_is_compared_in_seconds_between_machines_of_unequal_speed() -> None:
    """100 work takes 1 s on the slow one and 0.32 s on the fast one, which is better for the first three."""
    for count, fast in ((1, 1), (2, 2), (3, 3), (4, 3)):
        b = world(instance(1), instance(2, throughput=310.0))
        assert Counter(x.instance_id for x in b.batch(100.0, count))[2] == fast


def test_the_request_goes_where_it_does_least_to_everybody() -> None:
    """Four at once share the steps of the fast one and are still done sooner than one on the slow one."""
    b = world(instance(1), instance(2, throughput=300.0))
    assert [b.lease().instance_id for _ in range(4)] == [2, 2, 2, 2]


def test_the_share_of_the_work_follows_the_speed_when_there_is_much_of_it() -> None:
    b = world(instance(1, hold_s=100.0), instance(2, throughput=300.0, hold_s=100.0))
    given: Counter[int] = Counter()
    for _ in range(200):
        given[b.lease(10.0).instance_id] += 1
        b.refill()
    assert 150 <= given[2] < 200, "as many as its speed, and more, for steps are shared"


def test_the_choice_among_a_thousand_looks_at_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    b = world(*(instance(i) for i in range(1, 1001)))
    looked = 0
    work = ServingInstance.work

    def counted(self: ServingInstance, now: float) -> float:
        nonlocal looked
        looked += 1
        return work(self, now)

    monkeypatch.setattr(ServingInstance, "work", counted)
    for _ in range(2000):
        b.now += 0.001
        b.lease(10.0)
    assert looked / 2000 < 25


def test_an_instance_to_avoid_gets_nothing() -> None:
    b = world(instance(1), instance(2))
    assert {b.lease(10.0, avoid=(1,)).instance_id for _ in range(20)} == {2}


def test_nobody_is_sent_where_he_must_not_go_even_when_there_is_no_other() -> None:
    assert world(instance(1)).ask(avoid=(1,)) is None


def test_avoided_instances_at_the_head_of_the_queue_do_not_hide_those_behind() -> None:
    b = world(*(instance(i) for i in range(1, 31)))
    assert b.lease(avoid=tuple(range(1, 30))).instance_id == 30


def test_the_same_seed_makes_the_same_choices() -> None:
    def run(seed: int) -> list[int]:
        b = world(*(instance(i) for i in range(1, 20)), seed=seed)
        return [b.lease(10.0).instance_id for _ in range(200)]

    assert run(3) == run(3)
    assert run(3) != run(4)


# -- capacity ------------------------------------------------------------------------------------------


def test_an_instance_is_given_no_more_than_its_capacity() -> None:
    b = world(instance(1))
    assert [b.ask(300.0) is not None for _ in range(4)] == [True, True, True, False]
    assert b.lease(100.0)


def test_an_idle_instance_takes_one_request_of_any_size() -> None:
    b = world(instance(1))
    assert b.lease(50_000.0)
    assert b.ask(1.0) is None


def test_an_instance_that_others_keep_busy_is_not_idle() -> None:
    b = world(instance(1))
    b.report(1, running=20)
    assert b.ask(50_000.0) is None


def test_full_instances_at_the_head_do_not_hide_one_with_another_limit() -> None:
    b = world(*(instance(i, hold_s=2.0) for i in range(1, 30)), instance(30, hold_s=60.0))
    leases = [b.ask(150.0) for _ in range(60)]
    assert sum(x is not None for x in leases) == 60


# -- several leases at once ----------------------------------------------------------------------------


def test_a_batch_goes_to_as_many_idle_instances_as_it_has_leases() -> None:
    b = world(*(instance(i) for i in range(1, 33)))
    leases = b.batch(100.0, 32)
    assert Counter(x.instance_id for x in leases) == Counter(range(1, 33))


def test_they_go_to_unequal_machines_by_their_speed() -> None:
    b = world(instance(1, hold_s=100.0), instance(2, throughput=300.0, hold_s=100.0))
    leases = b.batch(10.0, 64)
    assert Counter(x.instance_id for x in leases) == {1: 16, 2: 48}
    assert [b.work(1), b.work(2)] == pytest.approx([160.0, 480.0])


def test_what_instances_have_already_counts() -> None:
    b = world(instance(1), instance(2))
    b.lease(300.0, avoid=(2,))
    leases = b.batch(100.0, 5)
    assert Counter(x.instance_id for x in leases) == {1: 1, 2: 4}


def test_no_instance_is_given_more_than_it_may_hold_or_read() -> None:
    b = world(instance(1), instance(2))
    assert len(b.batch(100.0, 64)) == 20
    assert b.batch(100.0, 64) == []
    b = world(instance(1, hold_s=100.0))
    leases = b.batch(110.0, 64, prompt_tokens=1000)
    assert len(leases) == 2, "a second of prompts and one more"


def test_one_request_of_any_size_fits_an_idle_instance() -> None:
    b = world(instance(1), instance(2))
    assert len(b.batch(50_000.0, 64)) == 2


def test_a_batch_does_not_overtake_who_waits() -> None:
    b, _ = full()
    b.hold(600.0)
    b.now += 1.0
    assert b.grant() == []
    assert b.batch(10.0, 5) == []
    assert len(b.batch(10.0, 5, priority=0)) == 5, "but a higher class may"


def test_each_token_is_leased_once_and_an_unused_batch_is_kept_for_its_client() -> None:
    b = world(instance(1, throughput=1e6), instance(2, throughput=1e6))
    leases = [x for _ in range(10) for x in b.batch(1.0, 64)]
    assert len({x.token for x in leases}) == 640
    for lease in leases:
        assert b.end(lease, "unused")
    assert [b.row(i)["unfinished"] for i in (1, 2)] == [0, 0]
    assert sum(b.row(i)["tokens_in_stock"] for i in (1, 2)) == 160
    again = [x for _ in range(10) for x in b.batch(1.0, 64)]
    assert {x.token for x in again} == {x.token for x in leases}


def test_a_batch_of_many_with_nothing_hot_is_none() -> None:
    assert world().batch(1.0, 64) == []
