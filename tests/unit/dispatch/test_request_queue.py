"""Which waiting requests go first: two lanes, three classes, none starves. Time is a number."""

import random
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from dispatch.client_turns import CLASS_S
from dispatch.lease import Lease
from dispatch.request_queue import ASIDE_FEW, LATE_BOUND_S, LOW_SHARE, RequestQueue
from dispatch.route_request import QueuedRequest, RouteRequest
from engine.slo import Slo
from tests.dispatch_world import T0, DispatchWorld, full, instance, world

HIGH, NORMAL, LOW = 0, 1, 2


class Counter:
    """A queue in front of a counter that serves as many as there is room for."""

    def __init__(self, most: int = 100_000, late_bound_s: float | None = LATE_BOUND_S) -> None:
        self.queue = RequestQueue(most, late_bound_s)
        self.now = T0
        self.room = 0
        self.tried = 0

    def hold(
        self,
        priority: int = NORMAL,
        *,
        time_to_give_s: float = 1e9,
        late: bool = False,
        avoid: int = 0,
        client: str = "",
        takes_s: float = 1.0,
    ) -> QueuedRequest:
        """Let a request wait, in time unless said otherwise."""
        waiter = self.queue.hold(
            RouteRequest(1.0, None, (avoid,) if avoid else (), priority=priority, client=client),
            self.now + 1e6,
            self.now,
            0.0 if late else time_to_give_s,
            1.0 if late else 0.0,
            blocks=not avoid,
            takes_s=takes_s,
        )
        assert waiter is not None
        assert waiter.late is late
        return waiter

    def grant(
        self,
        room: int,
        most: int | None = None,
        can: Callable[[RouteRequest], bool] = lambda ask: not ask.avoid,
        shut: Callable[[str], bool] = lambda _: False,
    ) -> list[QueuedRequest]:
        """Return what is served with so much room; a request that avoids something is not, unless it can."""
        self.room, self.tried = room, 0
        self.hurried: list[bool] = []

        def lease(ask: RouteRequest, hurries: bool) -> Lease | None:
            self.tried += 1
            self.hurried.append(hurries)
            if not self.room or not can(ask):
                return None
            self.room -= 1
            return cast(Lease, object())

        def only_avoids(ask: RouteRequest) -> bool:
            return bool(ask.avoid) and self.room > 0

        return [w for w, _ in self.queue.grant(self.now, lease, only_avoids, most, shut)]

    def blocks(self, priority: int, client: str = "") -> bool:
        """Return whether a request that comes now must wait."""
        ask = RouteRequest(1.0, priority=priority, client=client)
        return self.queue.blocks(ask, self.now, lambda _: False)


# -- priorities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_within_a_lane_higher_classes_go_first_and_each_class_as_it_came(*, late: bool) -> None:
    c = Counter()
    came = [c.hold(priority, late=late) for priority in (LOW, NORMAL, HIGH, LOW, NORMAL, HIGH)]
    order = c.grant(6)
    assert order == [came[i] for i in (2, 5, 1, 4, 0, 3)]


def test_a_lower_class_counts_as_come_half_a_minute_later() -> None:
    c = Counter()
    low = c.hold(LOW)
    c.now += CLASS_S - 0.1
    first = c.hold(NORMAL)
    c.now += 0.2
    second = c.hold(NORMAL)
    assert c.grant(3) == [first, low, second]


@pytest.mark.parametrize("late", [False, True])
def test_whatever_comes_and_however_much_nobody_is_passed_by_one_who_came_a_minute_later(
    *, late: bool
) -> None:
    """The proof that none starves, on a queue that is never empty and always fuller than what is served."""
    rng = random.Random(1)
    c = Counter(late_bound_s=None if not late else LATE_BOUND_S)
    served: list[QueuedRequest] = []
    for _ in range(600):
        c.now += 1.0
        for _ in range(3):
            c.hold(rng.choice((HIGH, HIGH, HIGH, NORMAL, LOW)), late=late)
        served += c.grant(2)
    place = {waiter: n for n, waiter in enumerate(served)}
    unserved = [w for w in (*c.queue.in_time_lane, *c.queue.late_lane) if not w.over]
    latest = 0.0
    for waiter in served:  # so far none came 2 * CLASS_S after it
        assert waiter.since >= latest - 2 * CLASS_S
        latest = max(latest, waiter.since)
    assert all(w.since >= latest - 2 * CLASS_S for w in unserved)
    for priority in (HIGH, NORMAL, LOW):
        mine = [w for w in place if w.ask.priority == priority]
        assert [w.since for w in mine] == sorted(w.since for w in mine)
        assert len(mine) > 50


def test_who_asks_with_a_higher_class_need_not_wait_behind_a_lower_one_and_the_other_way_round() -> None:
    c = Counter()
    c.hold(NORMAL)
    assert c.grant(0) == []
    assert [c.blocks(p) for p in (HIGH, NORMAL, LOW)] == [False, True, True]
    c.now += CLASS_S
    assert c.blocks(HIGH), "by now it counts as much"


def test_one_of_a_higher_class_that_waits_is_overtaken_by_nobody() -> None:
    c = Counter()
    c.hold(LOW)
    c.hold(HIGH)
    c.grant(0)
    assert [c.blocks(p) for p in (HIGH, NORMAL, LOW)] == [True, True, True]


def test_only_work_of_its_own_class_and_higher_ones_is_ahead_of_who_comes() -> None:
    c = Counter()
    for priority in (HIGH, NORMAL, NORMAL, LOW):
        c.hold(priority)
    assert [c.queue.ahead_of(p) for p in (HIGH, NORMAL, LOW)] == [1.0, 3.0, 4.0]
    c.grant(2)
    assert [c.queue.ahead_of(p) for p in (HIGH, NORMAL, LOW)] == [0.0, 1.0, 2.0]
    c.grant(2)
    assert [c.queue.ahead_of(p) for p in (HIGH, NORMAL, LOW)] == [0.0, 0.0, 0.0]


def test_an_overdue_one_goes_before_all_of_any_class_and_nobody_asks_past_him() -> None:
    c = Counter(late_bound_s=60.0)
    overdue = c.hold(LOW, late=True)
    c.now += 60.0 + CLASS_S + 0.1
    high = c.hold(HIGH)
    assert c.grant(0) == []
    assert c.blocks(HIGH)
    assert c.grant(2) == [overdue, high]


def test_low_priority_leaves_places_for_the_others() -> None:
    c = Counter(most=8)
    for _ in range(round(8 * LOW_SHARE)):
        c.hold(LOW)
    assert c.queue.hold(RouteRequest(1.0, priority=LOW), c.now + 1.0, c.now, 1.0, 0.0, blocks=True) is None
    c.hold(NORMAL)
    c.hold(HIGH)
    assert c.queue.hold(RouteRequest(1.0, priority=HIGH), c.now + 1.0, c.now, 1.0, 0.0, blocks=True) is None


# -- clients take turns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_the_first_request_of_a_client_goes_before_the_second_of_another(*, late: bool) -> None:
    c = Counter()
    many = [c.hold(client="many", late=late) for _ in range(1000)]
    c.now += 1.0
    few = [c.hold(client="few", late=late) for _ in range(2)]
    assert c.grant(5) == [many[0], few[0], many[1], few[1], many[2]]
    assert c.grant(2) == many[3:5], "who has come back for more has his turns from then on"
    again = c.hold(client="few", late=late)
    assert again in c.grant(2)


def test_clients_that_always_wait_get_the_same_work_however_large_their_requests_are() -> None:
    c = Counter()
    got = {"large": 0.0, "small": 0.0, "many": 0.0}
    for _ in range(400):
        c.hold(client="large", takes_s=10.0)
        for _ in range(10):
            c.hold(client="small", takes_s=1.0)
            c.hold(client="many", takes_s=2.0)
    for _ in range(600):
        for waiter in c.grant(1):
            got[waiter.ask.client] += waiter.takes_s
    assert max(got.values()) - min(got.values()) <= 20.0, got


def test_a_higher_class_of_another_client_goes_first_and_is_worth_half_a_minute_of_the_fleet() -> None:
    c = Counter()
    low = c.hold(LOW, client="a")
    normal = [c.hold(NORMAL, client="b", takes_s=20.0) for _ in range(3)]
    high = [c.hold(HIGH, client="c", takes_s=20.0) for _ in range(4)]
    order = c.grant(8)
    assert order[:2] == high[:2]
    assert order.index(normal[0]) < order.index(high[3]), "it has had half a minute more than the others"
    assert order.index(normal[1]) < order.index(low) < order.index(normal[2])


def test_a_request_of_a_client_that_does_not_wait_need_not_wait_behind_those_that_others_hold() -> None:
    c = Counter()
    for _ in range(10):
        c.hold(client="many")
    assert len(c.grant(3)) == 3
    assert c.blocks(NORMAL, "many")
    assert not c.blocks(HIGH, "few")
    first = c.hold(client="few")
    assert c.blocks(NORMAL, "few"), "its own first"
    assert c.grant(2)[1] is first


def test_what_is_overdue_of_one_client_keeps_no_other_from_its_turns() -> None:
    c = Counter(late_bound_s=60.0)
    old = [c.hold(client="many", late=True) for _ in range(100)]
    c.now += 61.0
    mine = [c.hold(client="few") for _ in range(3)]
    own = c.hold(client="many")
    assert set(c.grant(6)) == {*mine, *old[:3]}
    assert c.grant(97) == old[3:]
    assert c.grant(1) == [own]


def test_clients_that_may_have_no_more_leases_let_the_others_pass_and_have_their_turns_later() -> None:
    c = Counter()
    mine = [c.hold(client="hoarder") for _ in range(50)]
    aside = c.hold(client="hoarder", avoid=1)
    others = [c.hold(client="other") for _ in range(3)]
    assert c.grant(10, shut=lambda client: client == "hoarder") == others
    assert not c.blocks(NORMAL, "other")
    assert c.grant(100, can=lambda ask: True) == [*mine, aside]


def test_no_client_holds_all_places() -> None:
    """One has 90 % of them; the more want all of them the fewer are left, but some are."""

    def held(c: Counter, client: str) -> int:
        def hold() -> QueuedRequest | None:
            ask = RouteRequest(1.0, client=client)
            return c.queue.hold(ask, c.now + 1.0, c.now, 1.0, 0.0, blocks=True)

        return sum(hold() is not None for _ in range(1000))

    c = Counter(most=1000)
    assert held(c, "one") == 900
    assert held(c, "two") == 90
    assert [held(c, f"more {n}") for n in range(3)] == [9, 1, 0]
    c = Counter(most=1000)
    for _ in range(1000):
        for n in range(10):
            c.queue.hold(RouteRequest(1.0, client=f"{n}"), c.now + 1.0, c.now, 1.0, 0.0, blocks=True)
    assert c.queue.most - c.queue.held >= 10
    assert held(c, "victim") == 9


def test_the_work_ahead_of_a_client_is_its_own_and_as_much_of_each_other() -> None:
    c = Counter()
    for _ in range(100):
        c.hold(client="many")
    assert c.queue.ahead_of_client(RouteRequest(1.0, client="few")) == 1.0
    assert c.queue.ahead_of_client(RouteRequest(1.0, client="many")) == 100.0
    c.hold(client="few")
    assert c.queue.ahead_of_client(RouteRequest(2.0, client="few")) == 4.0
    assert c.queue.ahead_of_client(RouteRequest(1.0, client="third")) == 2.0
    c.grant(101)
    assert c.queue.ahead_of_client(RouteRequest(1.0, client="few")) == 0.0


@pytest.mark.parametrize("clients", [2, 50])
def test_who_asks_for_less_than_its_share_waits_for_one_turn_of_each_whatever_the_others_ask(
    clients: int,
) -> None:
    """The others always have hundreds waiting, and mix low and normal priority."""
    rng = random.Random(1)
    c = Counter()
    mine: QueuedRequest | None = None
    waits = []
    for n in range(3000):
        for _ in range(3):
            c.hold(rng.choice((NORMAL, NORMAL, LOW)), client=f"many {rng.randrange(clients)}")
        if n % (2 * clients) == 0:
            assert mine is None
            mine, asked = c.hold(client="few"), n
        c.now += 1.0
        if mine in c.grant(1):
            waits.append(n - asked)
            mine = None
    assert len(waits) == 3000 // (2 * clients)
    assert max(waits) <= clients + 1


# -- what a pass costs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [5_000, 100_000])
def test_a_pass_looks_at_those_it_serves_and_one_more_however_many_wait(held: int) -> None:
    c = Counter(most=held)
    for n in range(held):
        c.hold(n % 3 if n < held // 2 else NORMAL)
    for _ in range(20):
        assert len(c.grant(3)) == 3
        assert c.tried == 4
    begun = time.process_time()
    for _ in range(100):
        c.grant(1)
    assert (time.process_time() - begun) / 100 < 0.001, "0.01 ms here; one look at each would take 10 ms"


def test_a_pass_tries_a_few_of_those_who_wait_for_another_instance_and_each_has_his_turn() -> None:
    c = Counter()
    picky = [c.hold(avoid=1) for _ in range(500)]
    other = c.hold()
    assert c.grant(1) == [other], "they let it pass"
    seen: set[QueuedRequest] = set()
    for _ in range(500 // ASIDE_FEW + 1):
        assert c.grant(1) == []
        assert c.tried <= ASIDE_FEW + 1, "and the one for whom there was no room just before"
        seen |= set(c.grant(1, can=lambda ask: True))
    assert len(seen) == 500 // ASIDE_FEW + 1
    while got := c.grant(100, can=lambda ask: True):
        assert not seen & set(got)
        seen |= set(got)
    assert seen == set(picky)


def test_who_stands_aside_is_as_any_other_when_there_is_no_room_for_anybody() -> None:
    c = Counter()
    picky, other = c.hold(avoid=1), c.hold()
    assert c.grant(1) == [other]
    assert not c.blocks(NORMAL)
    assert c.grant(0) == []
    assert c.blocks(NORMAL), "it came first"
    later = c.hold()
    assert c.grant(2, can=lambda ask: True) == [picky, later]


def test_when_five_thousand_turn_late_together_each_is_moved_once() -> None:
    c = Counter()
    at_once = [c.hold(late=True) for _ in range(5_000)]
    c.now += 0.001
    later = [c.hold(time_to_give_s=2.0) for _ in range(5_000)]
    c.now += 3.0
    begun = time.process_time()
    assert c.grant(0) == []
    assert time.process_time() - begun < 0.5, "0.03 s here; each looking for its place took 2 s"
    assert (c.queue.held, c.queue.late) == (10_000, 10_000)
    assert c.grant(20_000) == at_once + later


def test_who_has_gone_is_forgotten_when_such_are_the_most() -> None:
    c = Counter()
    stays = c.hold()
    for _ in range(50_000):
        c.queue.cancel(c.hold())
    assert len(c.queue.in_time_lane) < 200
    assert len(c.queue.came) < 200
    assert c.grant(1) == [stays]


def test_a_pass_may_be_cut_and_nobody_asks_past_those_who_come_next() -> None:
    c = Counter()
    waiters = [c.hold() for _ in range(10)]
    assert c.grant(10, most=4) == waiters[:4]
    assert c.queue.cut
    assert c.blocks(NORMAL)
    assert not c.blocks(HIGH)
    assert c.grant(10) == waiters[4:]
    assert not c.queue.cut
    assert not c.blocks(NORMAL)


# -- all of it at once -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_counts_are_those_of_who_waits_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    c = Counter(most=60, late_bound_s=rng.choice([None, 20.0]))
    waiting: list[QueuedRequest] = []
    for _ in range(4000):
        c.now += rng.expovariate(2.0)
        what = rng.random()
        if what < 0.6:
            ask = RouteRequest(rng.uniform(1.0, 9.0), None, rng.choice([(), (), (1,)]), rng.choice([0, 7]))
            ask.priority = rng.randrange(3)
            ask.client = rng.choice(["", "a", "b", "c"])
            until = c.now + rng.uniform(0.1, 60.0)
            blocked = rng.random() < 0.5
            more = c.queue.hold(
                ask,
                until,
                c.now,
                rng.uniform(0.0, 3.0),
                rng.uniform(0.0, 3.0),
                blocks=blocked,
                takes_s=ask.work,
            )
            waiting += [more] if more is not None else []
        elif what < 0.75 and waiting:
            c.queue.cancel(rng.choice(waiting))
        else:
            lucky: dict[str, Any] = {} if rng.random() < 0.8 else {"can": lambda ask: True}
            got = c.grant(rng.randrange(4), rng.choice([None, 2]), **lucky)
            assert all(w.over and w.until > c.now for w in got)
        waiting = [w for w in waiting if not w.over]
        queue = c.queue
        assert queue.held == len(waiting)
        assert queue.late == sum(w.late for w in waiting)
        assert queue.held_of == [sum(w.ask.priority == n for w in waiting) for n in range(3)]
        assert queue.work == pytest.approx(sum(w.ask.work for w in waiting), abs=1e-6)
        assert queue.prompt_tokens == sum(w.ask.prompt_tokens for w in waiting)
        for priority in range(3):
            ahead = sum(w.ask.work for w in waiting if not w.late and w.ask.priority <= priority)
            assert queue.ahead_of(priority) == pytest.approx(ahead, abs=1e-6)
        assert queue.oldest_wait_s(c.now) == max((c.now - w.since for w in waiting), default=0.0)
        assert sorted(map(id, (*queue.in_time_lane, *queue.late_lane))) == sorted(map(id, waiting))


def test_who_is_late_hurries_where_nobody_is_to_be_served_before_him() -> None:
    for late_bound_s, hurried in ((None, [True, False]), (LATE_BOUND_S, [False, False])):
        c = Counter(late_bound_s=late_bound_s)
        first, second = c.hold(time_to_give_s=5.0), c.hold(time_to_give_s=50.0)
        c.now += 10.0
        assert sorted(map(id, c.grant(2))) == sorted(map(id, (first, second)))
        assert c.hurried == hurried


# -- within the loadbalancer ---------------------------------------------------------------------------


def test_those_who_wait_are_served_in_the_order_they_came() -> None:
    b, lease = full()
    waiters = [b.hold(400.0) for _ in range(5)]
    assert b.grant() == []
    b.end(lease)
    assert b.served() == waiters[:2]
    assert b.balancer.queue.held == 3


def test_nobody_who_asks_overtakes_somebody_who_waits_and_can_be_in_time() -> None:
    b, _ = full()
    b.hold(600.0)
    b.now += 1.0  # room for 100 by the estimate, not for the 600 that came first
    assert b.served() == []
    assert b.ask(100.0) is None


def test_in_one_line_nobody_who_asks_overtakes_anybody_who_waits() -> None:
    b, _ = full(late_bound_s=None)
    b.hold(600.0)
    b.now += 3.0  # in two lanes it would be late by now
    assert b.served() == []
    assert b.ask(100.0) is None


def test_time_alone_makes_room_for_those_who_wait() -> None:
    b, _ = full()
    waiter = b.hold(300.0)
    b.now += 3.0
    assert b.served() == [waiter]


def test_who_waits_only_because_of_an_instance_he_avoids_lets_the_others_pass() -> None:
    b = world(instance(1))
    picky = b.hold(avoid=(1,))
    lease = b.lease(1000.0)
    other = b.hold()
    b.end(lease)
    assert b.served() == [other]
    b.hot(instance(1), instance(2))
    assert [(w, x.instance_id) for w, x in b.grant()] == [(picky, 2)]


def test_who_went_away_is_passed_over() -> None:
    b, lease = full()
    first, second = b.hold(), b.hold()
    b.balancer.cancel(first)
    b.balancer.cancel(first)
    assert b.balancer.queue.held == 1
    b.end(lease)
    assert b.served() == [second]


def test_who_has_waited_long_enough_is_not_served_any_more() -> None:
    b, lease = full()
    b.hold(wait_s=5.0)
    b.now += 6.0
    b.end(lease)
    assert b.grant() == []
    assert (b.balancer.queue.held, b.balancer.queue.work) == (0, 0.0)


def test_the_line_is_bounded() -> None:
    b, _ = full(max_held=2)
    b.hold()
    b.hold()
    assert b.refused(1.0, wait_s=10.0).why == "all_busy"


def test_those_who_wait_for_a_fleet_of_none_are_served_when_the_first_is_hot() -> None:
    b = world()
    waiters = [b.hold() for _ in range(3)]
    assert b.grant() == []
    b.hot(instance(1))
    assert b.served() == waiters


def test_a_replaced_hot_set_loses_nobody_who_waits() -> None:
    b, _ = full(max_held=500)
    waiters = [b.hold(10.0) for _ in range(500)]
    served: list[QueuedRequest] = []
    for n in range(2, 12):
        b.hot(*(instance(i) for i in range(n, n + 3)))
        served += b.served()
        b.refill()
    while granted := b.grant():
        served += [w for w, _ in granted]
        b.refill()
        b.now += 1.0
    assert served == waiters


# -- the late lane -------------------------------------------------------------------------------------


def lanes(b: DispatchWorld) -> tuple[int, int]:
    """Return how many wait that can be in time, and how many that cannot."""
    return b.balancer.queue.held - b.balancer.queue.late, b.balancer.queue.late


def test_who_cannot_be_in_time_by_the_work_ahead_is_late_at_once() -> None:
    """100 work/s, two seconds: the third comes behind 2.5 s of work."""
    b, _ = full()
    first, second, third = b.hold(150.0), b.hold(100.0), b.hold(1.0)
    assert [first.late, second.late, third.late] == [False, False, True]
    assert lanes(b) == (2, 1)


def test_work_of_the_late_is_not_ahead_of_who_comes_next() -> None:
    b, _ = full()
    first = b.hold(210.0)
    assert b.hold(5000.0).late
    b.balancer.cancel(first)
    assert not b.hold(1.0).late


def test_who_came_in_time_and_was_not_served_in_time_is_late_then() -> None:
    b, lease = full()
    waiter = b.hold(900.0)
    assert not waiter.late
    b.now += 2.1
    assert b.served() == []
    assert waiter.late
    b.end(lease)
    assert b.served() == [waiter]
    assert b.balancer.usage(b.now).traffic.turned_late == 1


def test_a_long_prompt_may_wait_longer_but_for_what_reading_it_takes() -> None:
    """4,000 tokens: 2 s + 4 s, less 400 work at 100 work/s."""
    b, _ = full()
    assert b.hold(500.0, prompt_tokens=4000).give_by - b.now == pytest.approx(2.0)
    b.hot(instance(1, throughput=400.0, hold_s=2.5))
    assert b.hold(500.0, prompt_tokens=4000).give_by - b.now == pytest.approx(5.0)


def test_the_objective_says_what_late_is() -> None:
    b, _ = full(slo=Slo(first_token_s=10.0, prompt_token_s=0.0))
    b.hold(900.0)
    assert not b.hold(150.0).late
    assert b.hold(1.0).late


def test_with_nothing_hot_who_would_be_late_is_known_by_when_something_will_be() -> None:
    b = world()
    b.hot(expected_hot_s=60.0)
    assert b.hold().late
    b.now += 59.0
    assert not b.hold().late


def test_who_can_be_in_time_is_served_before_the_late() -> None:
    b, lease = full()
    early, late = b.hold(300.0), b.hold(300.0)
    b.now += 0.5
    b.balancer.cancel(early)
    in_time = b.hold(300.0)
    assert (late.late, in_time.late) == (True, False)
    b.end(lease)
    assert b.served() == [in_time, late]


def test_the_late_get_what_the_others_leave() -> None:
    """With room for one, the late one waits on; with none in time, it gets it."""
    b, _ = full()
    b.hold(210.0)
    late = b.hold(100.0)
    b.now += 1.0
    assert b.served() == [], "the one in time does not fit, and so the late one must not either"
    b.now += 1.0
    assert b.served() == []
    b.now += 1.5  # now the first is late too, but it came first
    assert len(b.served()) == 2
    assert late.over


def test_who_asks_goes_before_the_late() -> None:
    b, _ = full()
    first = b.hold(210.0)
    late = b.hold(300.0)
    b.balancer.cancel(first)
    b.now += 2.0
    assert b.served() == []
    assert b.ask(200.0)
    assert not late.over


def test_who_has_been_waiting_for_longer_than_the_bound_goes_before_all_others() -> None:
    b, lease = full(late_bound_s=60.0, lease_s=600.0)
    first = b.hold(210.0)
    overdue = b.hold(800.0)
    b.balancer.cancel(first)
    b.now += 59.0
    assert b.served() == []
    in_time = b.hold(600.0)
    b.now += 1.5
    assert b.ask(1.0) is None, "a new request must wait for it too"
    assert b.served() == []
    b.end(lease)
    assert b.served() == [overdue], "what it leaves is too little for the other"
    assert not in_time.over


def test_only_the_overdue_go_first_and_not_all_who_are_late() -> None:
    b, lease = full(late_bound_s=60.0, lease_s=600.0)
    first = b.hold(210.0)
    overdue = b.hold(100.0)
    b.balancer.cancel(first)
    b.now += 50.0
    second = b.hold(210.0)
    late = b.hold(100.0)
    b.balancer.cancel(second)
    b.now += 11.0
    in_time = b.hold(100.0)
    b.end(lease)
    assert b.served() == [overdue, in_time, late]


def test_the_late_are_served_in_the_order_they_came_whenever_they_turned_late() -> None:
    b, lease = full()
    patient = b.hold(900.0, prompt_tokens=1000)  # 2 s + 1 s - 1 s
    b.now += 1.0
    at_once = b.hold(1.0)
    assert (patient.late, at_once.late) == (False, True)
    b.now += 1.5
    assert b.served() == []
    assert (patient.late, lanes(b)) == (True, (0, 2))
    b.end(lease)
    assert b.served() == [patient, at_once]


def test_without_the_late_lane_nobody_is_late() -> None:
    b, lease = full(late_bound_s=None)
    waiters = [b.hold(400.0) for _ in range(4)]
    b.now += 300.0
    assert b.served() == waiters[:1]
    b.end(lease)
    b.served()
    assert b.balancer.queue.late == 0
    late = b.balancer.usage(b.now).traffic.turned_late
    assert late == 2, "one that was given too late is counted all the same"
    assert not any(w.late for w in waiters)


@pytest.mark.parametrize("late", [False, True])
def test_who_goes_away_leaves_his_lane(*, late: bool) -> None:
    b, lease = full()
    gone = first = b.hold(50.0 if not late else 210.0, prompt_tokens=7)
    if late:
        gone = b.hold(50.0, prompt_tokens=7)
        b.balancer.cancel(first)
    assert gone.late is late
    stays = b.hold(60.0)
    b.balancer.cancel(gone)
    b.balancer.cancel(gone)
    assert (b.balancer.queue.held, b.balancer.queue.work, b.balancer.queue.prompt_tokens) == (1, 60.0, 0)
    assert b.balancer.queue.late == 0
    assert b.balancer.queue.ahead_of(LOW) == 60.0
    b.end(lease)
    assert b.served() == [stays]


@pytest.mark.parametrize("late", [False, True])
def test_who_is_late_and_waits_too_long_is_not_served_any_more(*, late: bool) -> None:
    b, lease = full()
    if late:
        b.hold(210.0, wait_s=5.0)
    assert b.hold(10.0, wait_s=5.0).late is late
    b.now += 6.0
    b.end(lease)
    assert b.served() == []
    assert lanes(b) == (0, 0)


def test_a_late_one_who_waits_only_because_of_an_instance_he_avoids_lets_the_others_pass() -> None:
    b, lease = full()
    first = b.hold(210.0)
    picky, late = b.hold(10.0, avoid=(1,)), b.hold(10.0)
    b.balancer.cancel(first)
    b.end(lease)
    assert b.served() == [late]
    b.hot(instance(1), instance(2))
    assert b.served() == [picky]


def test_an_overdue_one_who_avoids_all_there_is_keeps_nobody_from_being_served() -> None:
    b, lease = full(late_bound_s=60.0, lease_s=600.0)
    first = b.hold(210.0)
    picky = b.hold(10.0, avoid=(1,))
    b.balancer.cancel(first)
    b.now += 61.0
    assert b.ask(10.0) is None, "there is no room for either"
    b.end(lease)
    assert b.served() == []
    assert b.ask(10.0)
    assert not picky.over
