"""Who waits and who goes first: two lanes, three classes, nobody starves. Time is a number."""

import random
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from dispatch.request_queue import ASIDE_FEW, CLASS_S, LATE_BOUND_S, LOW_SHARE, Line
from dispatch.types import Ask, Lease, Waiter

HIGH, NORMAL, LOW = 0, 1, 2
T0 = 1_700_000_000.0


class Counter:
    """A line in front of a counter that serves as many as there is room for."""

    def __init__(self, most: int = 100_000, late_bound_s: float | None = LATE_BOUND_S) -> None:
        self.line = Line(most, late_bound_s)
        self.now = T0
        self.room = 0
        self.tried = 0

    def hold(
        self, priority: int = NORMAL, *, time_to_give_s: float = 1e9, late: bool = False, avoid: int = 0
    ) -> Waiter:
        """Somebody comes and waits, in time unless said otherwise."""
        waiter = self.line.hold(
            Ask(1.0, None, (avoid,) if avoid else (), priority=priority),
            self.now + 1e6,
            self.now,
            0.0 if late else time_to_give_s,
            1.0 if late else 0.0,
            blocked=not avoid,
        )
        assert waiter is not None
        assert waiter.late is late
        return waiter

    def grant(
        self, room: int, most: int | None = None, can: Callable[[Ask], bool] = lambda ask: not ask.avoid
    ) -> list[Waiter]:
        """Who is served when there is room for so many; who avoids something is not, unless he can."""
        self.room, self.tried = room, 0
        self.hurried: list[bool] = []

        def lease(ask: Ask, hurries: bool) -> Lease | None:
            self.tried += 1
            self.hurried.append(hurries)
            if not self.room or not can(ask):
                return None
            self.room -= 1
            return cast(Lease, object())

        def only_avoids(ask: Ask) -> bool:
            return bool(ask.avoid) and self.room > 0

        return [w for w, _ in self.line.grant(self.now, lease, only_avoids, most)]

    def blocks(self, priority: int) -> bool:
        """Whether one who asks now must wait."""
        return self.line.blocks(Ask(1.0, priority=priority), self.now, lambda _: False)


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
    """The proof that nobody starves, on a line that is never empty and always fuller than what is served."""
    rng = random.Random(1)
    c = Counter(late_bound_s=None if not late else LATE_BOUND_S)
    served: list[Waiter] = []
    for _ in range(600):
        c.now += 1.0
        for _ in range(3):
            c.hold(rng.choice((HIGH, HIGH, HIGH, NORMAL, LOW)), late=late)
        served += c.grant(2)
    place = {waiter: n for n, waiter in enumerate(served)}
    unserved = [w for w in (*c.line._in_time, *c.line._late) if not w.over]
    latest = 0.0
    for waiter in served:  # so far none came 2 * CLASS_S after him
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
    assert c.blocks(HIGH), "by now he counts as much"


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
    assert [c.line.ahead_of(p) for p in (HIGH, NORMAL, LOW)] == [1.0, 3.0, 4.0]
    assert c.line.work_ahead == 4.0
    c.grant(2)
    assert [c.line.ahead_of(p) for p in (HIGH, NORMAL, LOW)] == [0.0, 1.0, 2.0]
    c.grant(2)
    assert c.line.work_ahead == 0.0


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
    assert c.line.hold(Ask(1.0, priority=LOW), c.now + 1.0, c.now, 1.0, 0.0, blocked=True) is None
    c.hold(NORMAL)
    c.hold(HIGH)
    assert c.line.hold(Ask(1.0, priority=HIGH), c.now + 1.0, c.now, 1.0, 0.0, blocked=True) is None


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
    assert c.grant(1) == [other], "they let him pass"
    seen: set[Waiter] = set()
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
    assert c.blocks(NORMAL), "he came first"
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
    assert (c.line.held, c.line.late) == (10_000, 10_000)
    assert c.grant(20_000) == at_once + later


def test_who_has_gone_is_forgotten_when_such_are_the_most() -> None:
    c = Counter()
    stays = c.hold()
    for _ in range(50_000):
        c.line.cancel(c.hold())
    assert len(c.line._in_time.entries) < 200
    assert len(c.line._came) < 200
    assert c.grant(1) == [stays]


def test_a_pass_may_be_cut_and_nobody_asks_past_those_who_come_next() -> None:
    c = Counter()
    waiters = [c.hold() for _ in range(10)]
    assert c.grant(10, most=4) == waiters[:4]
    assert c.line.cut
    assert c.blocks(NORMAL)
    assert not c.blocks(HIGH)
    assert c.grant(10) == waiters[4:]
    assert not c.line.cut
    assert not c.blocks(NORMAL)


# -- all of it at once -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_counts_are_those_of_who_waits_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    c = Counter(most=60, late_bound_s=rng.choice([None, 20.0]))
    waiting: list[Waiter] = []
    for _ in range(4000):
        c.now += rng.expovariate(2.0)
        what = rng.random()
        if what < 0.6:
            ask = Ask(rng.uniform(1.0, 9.0), None, rng.choice([(), (), (1,)]), rng.choice([0, 7]))
            ask.priority = rng.randrange(3)
            until = c.now + rng.uniform(0.1, 60.0)
            blocked = rng.random() < 0.5
            more = c.line.hold(
                ask, until, c.now, rng.uniform(0.0, 3.0), rng.uniform(0.0, 3.0), blocked=blocked
            )
            waiting += [more] if more is not None else []
        elif what < 0.75 and waiting:
            c.line.cancel(rng.choice(waiting))
        else:
            lucky: dict[str, Any] = {} if rng.random() < 0.8 else {"can": lambda ask: True}
            got = c.grant(rng.randrange(4), rng.choice([None, 2]), **lucky)
            assert all(w.over and w.until > c.now for w in got)
        waiting = [w for w in waiting if not w.over]
        line = c.line
        assert line.held == len(waiting)
        assert line.late == sum(w.late for w in waiting)
        assert line.low == sum(w.ask.priority == LOW for w in waiting)
        assert line.work == pytest.approx(sum(w.ask.work for w in waiting), abs=1e-6)
        assert line.prompt_tokens == sum(w.ask.prompt_tokens for w in waiting)
        for priority in range(3):
            ahead = sum(w.ask.work for w in waiting if not w.late and w.ask.priority <= priority)
            assert line.ahead_of(priority) == pytest.approx(ahead, abs=1e-6)
        assert line.oldest_wait_s(c.now) == max((c.now - w.since for w in waiting), default=0.0)
        assert sorted(map(id, (*line._in_time, *line._late))) == sorted(map(id, waiting))


def test_who_is_late_hurries_where_nobody_is_to_be_served_before_him() -> None:
    for late_bound_s, hurried in ((None, [True, False]), (LATE_BOUND_S, [False, False])):
        c = Counter(late_bound_s=late_bound_s)
        first, second = c.hold(time_to_give_s=5.0), c.hold(time_to_give_s=50.0)
        c.now += 10.0
        assert sorted(map(id, c.grant(2))) == sorted(map(id, (first, second)))
        assert c.hurried == hurried
