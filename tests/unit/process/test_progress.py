"""Progress: nothing of what is quick, then a line every few seconds, with the time that is left."""

import pytest

from process.progress import EVERY_S, FIRST_S, Progress, in_words


class Told:
    """Progress on a clock that a test moves, and what it said."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.now = 100.0
        self.lines: list[str] = []
        self.progress = Progress(quiet=quiet, clock=lambda: self.now, say=self.lines.append)


def test_of_what_is_quick_nothing_is_said() -> None:
    told = Told()
    for n in range(10):
        told.now = 100.0 + n * FIRST_S / 10.0
        told.progress.to(n / 10.0)
    assert told.lines == []


def test_a_line_comes_every_few_seconds_with_the_time_left_at_the_speed_so_far() -> None:
    told = Told()
    for n in range(1, 41):
        told.now = 100.0 + n
        told.progress.to(n / 200.0, f"step {n}")
    assert len(told.lines) == (40 - FIRST_S) // EVERY_S + 1
    assert told.lines[0] == "2%, step 5, 5 s so far, about 195 s left".replace("195 s", "3 min")
    assert told.lines[-1] == "20%, step 40, 40 s so far, about 3 min left"


def test_where_nobody_knows_the_whole_no_time_left_is_made_up() -> None:
    told = Told()
    told.now = 107.0
    told.progress.to(None, "7,000 requests")
    assert told.lines == ["7,000 requests, 7 s so far"]


def test_items_are_counted_and_quiet_is_quiet() -> None:
    told = Told()
    for _ in told.progress.over(["a", "b"]):
        told.now += 8.0
    assert told.lines == [
        "50%, 1 of 2 done, a last, 8 s so far, about 8 s left",
        "100%, 2 of 2 done, b last, 16 s so far, about 0 s left",
    ]
    quiet = Told(quiet=True)
    quiet.now = 200.0
    quiet.progress.to(0.5)
    assert quiet.lines == []


@pytest.mark.parametrize(("seconds", "said"), [(3.4, "3 s"), (150.0, "2 min"), (9000.0, "2.5 h")])
def test_durations_are_said_as_people_do(seconds: float, said: str) -> None:
    assert in_words(seconds) == said
