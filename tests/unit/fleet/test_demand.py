"""What several loadbalancers report, put together."""

import math

import msgspec
import pytest

from fleet.demand import SILENT_S, Demand
from policies import Traffic
from tests.messages import busy_report
from tests.unit.fleet.test_arrivals import arrived, report
from web.messages.busy import InstanceUse

NOW = 1_700_000_000.0


def test_demand_is_the_sum_over_loadbalancers_and_a_silent_one_is_forgotten() -> None:
    d = Demand("e")
    d.add_report(report("a", 1.5), 100.0)
    d.add_report(report("b", 0.5), 100.0)
    d.tick(101.0)
    assert d.demand == 2.0
    d.add_report(report("a", 1.5), 101.0 + SILENT_S)
    d.tick(101.0 + SILENT_S)
    assert d.demand == 1.5
    assert tuple(d.since(-math.inf)) == ((101.0, 2.0), (101.0 + SILENT_S, 1.5))


def test_cumulative_figures_survive_lost_reports_and_a_restarted_loadbalancer() -> None:
    d = Demand("e")
    assert d.add_report(report("a", arrivals=10, working_s={1: 3.0}), 0.0) == ({1: 3.0}, [])
    assert d.add_report(report("a", arrivals=25, working_s={1: 8.0}), 3.0) == ({1: 5.0}, [])
    assert d.add_report(report("a2", arrivals=4, working_s={1: 1.0}), 5.0) == ({1: 1.0}, [])
    assert d.arrivals == 29


def test_a_new_failure_is_told_once() -> None:
    d = Demand("e")
    assert d.add_report(report(failures={1: 2, 2: 0}), 0.0)[1] == [1]
    assert d.add_report(report(failures={1: 2, 2: 0}), 1.0)[1] == []
    assert d.add_report(report(failures={1: 3, 2: 1}), 2.0)[1] == [1, 2]


def test_no_lease_is_out_only_when_every_loadbalancer_knows_the_drain_and_counts_none() -> None:
    d = Demand("e")
    assert not d.no_lease_on(1, 5), "no loadbalancer was heard of"
    d.add_report(report("a", hot_version=5), 0.0)
    assert d.no_lease_on(1, 5)
    assert not d.no_lease_on(1, 6), "it does not know the drain yet"
    d.add_report(report("b", hot_version=6, unfinished={1: 1}), 0.0)
    assert not d.no_lease_on(1, 5), "b counts one"
    d.add_report(report("b", hot_epoch="old", hot_version=9), 1.0)
    assert not d.no_lease_on(1, 5), "b has the set of another autoscaler"
    assert Demand("e", no_balancers=True).no_lease_on(1, 5)


def test_the_series_keeps_only_what_a_policy_may_read() -> None:
    d = Demand("e", memory_s=10.0)
    for t in range(100):
        d.tick(float(t))
    assert len(d.since(-math.inf)) == 11


def test_a_loadbalancer_that_was_silent_for_a_while_is_not_counted_from_the_beginning_again() -> None:
    d = Demand("e")
    d.add_report(report("a", arrivals=1000, working_s={1: 500.0}, failures={1: 3}), 0.0)
    d.tick(SILENT_S + 1)
    assert d.demand == 0.0
    again = report("a", arrivals=1002, working_s={1: 501.5}, failures={1: 3})
    assert d.add_report(again, SILENT_S + 2) == ({1: 1.5}, [])
    assert d.arrivals == 1002


def test_what_a_loadbalancer_counted_before_we_began_is_in_the_ledger_already() -> None:
    """After our restart its first report covers hours; else all hot dollars would become working ones."""
    d = Demand("e", began=1000.0)
    assert d.add_report(report("a", working_s={1: 9999.0, 2: 0.5}), 1002.0)[0] == {1: 2.0, 2: 0.5}


def test_somebody_reports_while_a_loadbalancer_was_heard_of_lately() -> None:
    d = Demand("e")
    assert not d.reporting
    d.add_report(report("a"), 0.0)
    assert d.reporting
    d.tick(SILENT_S + 1)
    assert not d.reporting
    assert Demand("e", no_balancers=True).reporting


def test_the_traffic_is_the_sum_over_loadbalancers_and_its_counters_never_go_back() -> None:
    d = Demand("e")
    arrived(d, 100.0, 1000, "a")
    arrived(d, 100.0, 50, "b")
    assert d.traffic == Traffic(), "what they counted before they were heard of is of no time that we know"
    arrived(d, 101.0, 1010, "a")
    arrived(d, 101.0, 55, "b")
    assert d.traffic == Traffic(15, 15 * 300, 15 * 70.0, 1500.0)
    arrived(d, 102.0, 0, "c")  # b was restarted, and counts from 0 under another name
    arrived(d, 103.0, 2, "c")
    assert d.traffic.requests_total == 17
    arrived(d, 104.0, 1, "c")  # a counter that goes back although its name stayed
    assert d.traffic.requests_total == 17


def test_what_waits_is_that_of_the_loadbalancers_heard_of_lately() -> None:
    d = Demand("e")
    waits = {"held": 2, "held_work": 30.0, "held_prompt_tokens": 200, "in_flight": 5, "kv_tokens": 9.0}
    d.add_report(report("a", **waits, oldest_wait_s=3.0), 100.0)
    d.add_report(report("b", **waits, oldest_wait_s=1.0), 105.0)
    assert d.traffic == Traffic(0, 0, 0.0, 0.0, 10, 4, 60.0, 400, 3.0, 18.0)
    d.tick(101.0 + SILENT_S)
    assert d.traffic == Traffic(0, 0, 0.0, 0.0, 5, 2, 30.0, 200, 1.0, 9.0)


def test_a_policy_is_given_the_demand_as_far_back_as_it_looks_and_one_more() -> None:
    d = Demand("e")
    for t in range(0, 100, 5):
        d.tick(float(t))
    assert [t for t, _ in d.since(90.0)] == [90.0, 95.0]
    assert [t for t, _ in d.since(88.0)] == [85.0, 90.0, 95.0], "else it would never have looked back so far"
    assert len(d.since(-math.inf)) == 20
    assert d.since(500.0) == [(95.0, 0.0)]


# -- the fleet's own capacity ----------------------------------------------------------------------------


def saturated(d: Demand, at: float, arrived: float, held: float) -> None:
    d.add_report(report(arrivals=round(arrived), arrived_work=arrived, held_work=held), at)


def test_what_a_full_fleet_serves_is_its_capacity() -> None:
    """Two hot instances, 300 work/s arrive, and what waits grows by 100 a second: they do 100 each."""
    d = Demand("a")
    for n in range(30):
        at = NOW + 5.0 * n
        saturated(d, at, 1500.0 * n, 500.0 * n + 1.0)
        d.tick(at, 2)
    assert d.saturation.work_s == pytest.approx(100.0, rel=0.02)


def test_nothing_is_learnt_of_a_fleet_that_is_not_full_or_has_just_changed() -> None:
    d = Demand("a")
    for n in range(60):
        at = NOW + 5.0 * n
        saturated(d, at, 1500.0 * n, 0.0)
        d.tick(at, 2)
    assert d.saturation.work_s is None, "nothing waited"
    d = Demand("a")
    for n in range(60):
        at = NOW + 5.0 * n
        saturated(d, at, 1500.0 * n, 500.0)
        d.tick(at, 2 + n % 2)
    assert d.saturation.work_s is None, "it was another number each time"


def test_late_requests_are_counted_over_loadbalancers_and_their_restarts() -> None:
    d = Demand("a")
    d.add_report(report(turned_late=5), NOW)
    d.add_report(report(turned_late=9, arrivals=20), NOW + 1.0)
    d.add_report(report(turned_late=2, arrivals=40), NOW + 2.0)
    assert d.turned_late == 4


def test_an_operator_is_told_which_instances_a_loadbalancer_does_not_listen_to() -> None:
    demand = Demand("e")
    uses = {7: InstanceUse(0, 0.0, 0.0, 0.0, 1, "it reported too much"), 8: InstanceUse(0, 0.0, 0.0, 0.0, 0)}
    demand.add_report(msgspec.structs.replace(busy_report(), instances=uses), 0.0)
    assert demand.out() == {7: "it reported too much"}
