"""Percentiles of the answers of the last minute, from counts that only grow."""

from random import Random

import msgspec
import numpy as np
import pytest

from fleet.answer_window import NONE, OVER_S, AnswerWindow, quantiles
from fleet.demand import Demand
from tests.messages import busy_report
from web.messages.busy import (
    FIRST_TOKEN_BOUNDS_S,
    TOKEN_BOUNDS_S,
    WHOLE_BOUNDS_S,
    AnswersReport,
    BusyReport,
)


def counted(bounds: tuple[float, ...], seconds: list[float]) -> tuple[int, ...]:
    at = np.searchsorted(bounds, seconds)
    return tuple(int(n) for n in np.bincount(at, minlength=len(bounds) + 1))


def report(*first_s: float, late: int = 0) -> AnswersReport:
    seconds = list(first_s)
    return AnswersReport(
        counted(FIRST_TOKEN_BOUNDS_S, seconds),
        counted(TOKEN_BOUNDS_S, [s / 10 for s in seconds]),
        counted(WHOLE_BOUNDS_S, [s * 10 for s in seconds]),
        late,
    )


def test_percentiles_from_buckets_are_those_of_the_answers_within_a_bucket() -> None:
    rng = Random(5)
    seconds = [rng.lognormvariate(-0.5, 0.8) for _ in range(20_000)]
    found = quantiles(FIRST_TOKEN_BOUNDS_S, counted(FIRST_TOKEN_BOUNDS_S, seconds))
    for shown, share in zip(found, (50, 95, 99), strict=True):
        right = float(np.percentile(seconds, share))
        assert shown is not None
        ends = [np.searchsorted(FIRST_TOKEN_BOUNDS_S, s) for s in (right, shown)]
        assert ends[0] == ends[1], f"{shown} is not in the bucket of {right}"
    assert quantiles(TOKEN_BOUNDS_S, [0] * (len(TOKEN_BOUNDS_S) + 1)) == NONE
    assert quantiles((1.0, 2.0), (0, 0, 5)) == (2.0, 2.0, 2.0)  # above every bound


def test_only_what_came_in_the_last_minute_counts() -> None:
    window = AnswerWindow()
    window.lately(0.0)
    window.add(report(), report(*[0.25] * 99, 9.0, late=1))
    found = window.lately(1.0)
    assert (found.answers, found.late) == (100, 1)
    assert found.first_token[0] == pytest.approx(0.25, abs=0.05)
    window.lately(OVER_S + 1.0)
    found = window.lately(OVER_S + 2.0)
    assert (found.answers, found.late, found.first_token) == (0, 0, NONE)


@pytest.mark.parametrize("odd", [AnswersReport((), (), (), 0), AnswersReport((5,) * 32, (1,), (), 7)])
def test_counts_of_another_version_do_no_harm(odd: AnswersReport) -> None:
    window = AnswerWindow()
    window.lately(0.0)
    window.add(report(0.25), odd)
    window.add(odd, report(0.25))
    window.add(odd, None)
    assert window.lately(1.0).answers >= 0


def told(*first_s: float) -> BusyReport:
    return msgspec.structs.replace(busy_report(), answers=report(*first_s))


def test_what_a_loadbalancer_counted_before_its_first_report_is_not_of_now() -> None:
    demand = Demand()
    demand.answers.lately(0.0)
    demand.add_report(told(*[0.25] * 50), 1.0)
    assert demand.answers.lately(1.0).answers == 0
    demand.add_report(told(*[0.25] * 53), 2.0)
    assert demand.answers.lately(2.0).answers == 3
    demand.add_report(told(0.25), 3.0)  # it was started anew
    assert demand.answers.lately(3.0).answers == 3
