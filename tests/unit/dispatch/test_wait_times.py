"""When a refused client is told to ask again. Time is a number."""

from tests.dispatch_world import full, world


def test_with_nothing_hot_it_says_when_something_will_be() -> None:
    b = world()
    b.hot(expected_hot_s=90.0)
    assert b.refused(1.0) == ("nothing_hot", 90.0, (0, 0.0))
    b.now += 60.0
    assert b.refused(1.0).retry_after_s == 30.0
    b.now += 60.0
    assert b.refused(1.0).retry_after_s == 1.0


def test_with_nothing_hot_and_nothing_known_it_says_half_a_minute() -> None:
    assert world().refused(1.0) == ("nothing_hot", 30.0, (0, 0.0))


def test_with_all_busy_it_says_when_there_is_room_by_the_estimate() -> None:
    b, _ = full()
    why, after_s, _ = b.refused(400.0)
    assert (why, round(after_s, 3)) == ("all_busy", 4.0)


def test_with_all_busy_those_who_wait_come_first() -> None:
    b, _ = full()
    b.hold(600.0)
    why, after_s, _ = b.refused(400.0)
    assert (why, round(after_s, 3)) == ("all_busy", 10.0)
