"""What has arrived, second by second, from the loadbalancers' reports."""

import math
from typing import Any

import numpy as np
import pytest

from fleet.arrivals import ARRIVING_S, MIX_S, Arrived, Mix
from fleet.demand import Demand
from policies import BIN_S
from tests.messages import busy_report
from web.messages.busy import BusyReport


def report(name: str = "lb", demand: float = 1.0, **more: Any) -> BusyReport:
    usual: dict[str, Any] = {"hot_epoch": "e", "hot_version": 5, "arrivals": 10, "arrived_work": 100.0}
    return busy_report(name, demand, **(usual | more))


def arrived(d: Demand, at: float, requests: int, name: str = "lb") -> None:
    """That loadbalancer says that so many have arrived in all: 100 work each, of it 300 tokens to read."""
    d.add_report(
        report(
            name,
            arrivals=requests,
            arrived_work=100.0 * requests,
            prompt_tokens=300 * requests,
            output_tokens=70.0 * requests,
        ),
        at,
    )


def test_arrivals_are_put_into_the_second_in_which_they_came() -> None:
    d = Demand("e")
    for at, requests in ((100.3, 0), (101.3, 4), (102.3, 4), (103.3, 6)):
        arrived(d, at, requests)
    assert d.history.take_unsaved() == [Arrived(100, 4, 400.0, 1200), Arrived(102, 2, 200.0, 600)]
    assert d.history.take_unsaved() == []


def test_two_loadbalancers_fill_the_same_second() -> None:
    d = Demand("e")
    for name in ("a", "b"):
        arrived(d, 100.0, 0, name)
        arrived(d, 101.0, 3, name)
    assert d.history.take_unsaved() == [Arrived(100, 6, 600.0, 1800)]


def test_what_was_reported_late_is_spread_over_the_time_it_covers() -> None:
    d = Demand("e")
    arrived(d, 100.0, 0)
    arrived(d, 104.5, 9)
    assert d.history.take_unsaved() == [Arrived(s, 2, 200.0, 600) for s in range(100, 104)] + [
        Arrived(104, 1, 100.0, 300)
    ]


def test_what_could_not_be_written_comes_again_with_what_came_since() -> None:
    d = Demand("e")
    arrived(d, 100.0, 0)
    arrived(d, 101.0, 3)
    taken = d.history.take_unsaved()
    arrived(d, 101.9, 5)
    d.history.put_back(taken)
    assert d.history.take_unsaved() == [Arrived(101, 2, 200.0, 600), Arrived(100, 3, 300.0, 900)]


def test_arriving_is_work_per_second_in_bins_that_end_now() -> None:
    d = Demand("e")
    for n in range(31):
        arrived(d, 1000.0 + n, 10 * n if n <= 20 else 200)
    assert d.history.work_s(1030.0, 3600.0) == pytest.approx([1000.0] * 4 + [0.0] * 2)
    assert d.history.work_s(1030.0, 12.0) == pytest.approx([0.0] * 2), (
        "as far back as is asked for, in whole bins"
    )
    assert len(d.history.work_s(1030.0, BIN_S - 1)) == 0


def test_before_the_first_report_nothing_is_known_and_not_that_nothing_arrived() -> None:
    d = Demand("e")
    d.tick(1000.0)
    assert len(d.history.work_s(1000.0, 3600.0)) == 0
    arrived(d, 1000.0, 5)
    arrived(d, 1001.0, 5)
    assert len(d.history.work_s(1001.0, 3600.0)) == 0
    for n in range(2, 11):
        arrived(d, 1000.0 + n, 5)
    assert list(d.history.work_s(1010.0, 3600.0)) == [0.0, 0.0]


def test_with_all_loadbalancers_silent_nothing_arrives() -> None:
    d = Demand("e")
    arrived(d, 1000.0, 0)
    for n in range(1, 6):
        arrived(d, 1000.0 + n, 10 * n)
    assert list(d.history.work_s(1016.0, 3600.0)) == [1000.0, 0.0, 0.0]
    late = d.history.work_s(1000.0 + 3 * ARRIVING_S, 100.0)
    assert list(late) == [0.0] * 20


@pytest.mark.parametrize("hours", [1, 29])
def test_arriving_is_the_same_as_counting_by_hand_however_long_it_runs(hours: int) -> None:
    d = Demand("e")
    start, total, seconds = 50_000, 0, hours * 3600
    by_hand = np.array([(second * 7919) % 13 for second in range(seconds)])
    arrived(d, float(start), 0)
    for second in range(seconds):
        total += int(by_hand[second])
        arrived(d, start + second + 1.0, total)
    got = d.history.work_s(float(start + seconds), ARRIVING_S)
    kept = by_hand[-ARRIVING_S:].reshape(-1, 5)
    assert list(got) == pytest.approx(list(100.0 * kept.mean(axis=1)))


def test_deciding_twice_sees_the_same_arrivals() -> None:
    d = Demand("e")
    arrived(d, 100.0, 0)
    arrived(d, 120.0, 40)
    assert d.history.work_s(120.0, 3600.0) is d.history.work_s(120.0, 3600.0)
    with pytest.raises(ValueError, match="read-only"):
        d.history.work_s(120.0, 3600.0)[0] = 1.0


def test_a_restarted_process_goes_on_with_the_arrivals_of_the_ledger() -> None:
    d = Demand("e")
    d.history.restore([Arrived(s, 2.0, 300.0, 1000.0) for s in range(1000, 1010)], prefill_weight=0.1)
    arrived(d, 1020.0, 7000)
    arrived(d, 1021.0, 7003)
    assert list(d.history.work_s(1021.0, 3600.0)) == [300.0, 240.0, 0.0, 60.0]
    assert d.traffic.requests_total == 3
    assert d.history.take_unsaved() == [Arrived(1020, 3, 300.0, 900)], "it is not written down twice"
    assert d.history.mix is not None
    assert d.history.mix.work == pytest.approx((10 * 300 + 3 * 100) / 23, rel=0.01)
    assert d.history.mix.output_tokens == pytest.approx((10 * 200 + 3 * 70) / 23, rel=0.01)


def test_the_mean_request_is_that_of_the_last_hours() -> None:
    d = Demand("e")
    assert d.history.mix is None
    d.add_report(report(arrivals=0, arrived_work=0.0), 0.0)
    d.add_report(report(arrivals=1000, arrived_work=50_000.0), 1.0)
    assert d.history.mix == Mix(50.0, 0.0, 0.0)
    d.add_report(report(arrivals=2000, arrived_work=250_000.0), 1.0 + MIX_S)
    assert d.history.mix is not None
    assert d.history.mix.work == pytest.approx((200.0 + 50.0 / math.e) / (1.0 + 1.0 / math.e))
