"""What several loadbalancers report, put together."""

from demand import SILENT_S, Demand, Report


def report(name: str = "lb", demand: float = 1.0, **more: object) -> Report:
    defaults: dict[str, object] = {
        "hot_epoch": "e",
        "hot_version": 5,
        "busy": demand,
        "held": 0,
        "arrivals": 10,
        "arrived_work": 100.0,
    }
    return Report(loadbalancer=name, demand=demand, **{**defaults, **more})  # type: ignore[arg-type]


def test_demand_is_the_sum_over_loadbalancers_and_a_silent_one_is_forgotten() -> None:
    d = Demand("e")
    d.heard(report("a", 1.5), 100.0)
    d.heard(report("b", 0.5), 100.0)
    d.tick(101.0)
    assert d.demand == 2.0
    d.heard(report("a", 1.5), 101.0 + SILENT_S)
    d.tick(101.0 + SILENT_S)
    assert d.demand == 1.5
    assert d.series == ((101.0, 2.0), (101.0 + SILENT_S, 1.5))


def test_cumulative_figures_survive_lost_reports_and_a_restarted_loadbalancer() -> None:
    d = Demand("e")
    assert d.heard(report("a", arrivals=10, working_s={1: 3.0}), 0.0) == ({1: 3.0}, [])
    assert d.heard(report("a", arrivals=25, working_s={1: 8.0}), 3.0) == ({1: 5.0}, [])
    assert d.heard(report("a2", arrivals=4, working_s={1: 1.0}), 5.0) == ({1: 1.0}, [])
    assert d.arrivals == 29


def test_a_new_failure_is_told_once() -> None:
    d = Demand("e")
    assert d.heard(report(failures={1: 2, 2: 0}), 0.0)[1] == [1]
    assert d.heard(report(failures={1: 2, 2: 0}), 1.0)[1] == []
    assert d.heard(report(failures={1: 3, 2: 1}), 2.0)[1] == [1, 2]


def test_no_lease_is_out_only_when_every_loadbalancer_knows_the_drain_and_counts_none() -> None:
    d = Demand("e")
    assert not d.no_lease_on(1, 5), "nobody was heard of"
    d.heard(report("a", hot_version=5), 0.0)
    assert d.no_lease_on(1, 5)
    assert not d.no_lease_on(1, 6), "it does not know the drain yet"
    d.heard(report("b", hot_version=6, unfinished={1: 1}), 0.0)
    assert not d.no_lease_on(1, 5), "b counts one"
    d.heard(report("b", hot_epoch="old", hot_version=9), 1.0)
    assert not d.no_lease_on(1, 5), "b has the set of another autoscaler"
    assert Demand("e", told_nobody=True).no_lease_on(1, 5)


def test_the_series_keeps_only_what_a_policy_may_read() -> None:
    d = Demand("e", memory_s=10.0)
    for t in range(100):
        d.tick(float(t))
    assert len(d.series) == 11


def test_a_loadbalancer_that_was_silent_for_a_while_is_not_counted_from_the_beginning_again() -> None:
    d = Demand("e")
    d.heard(report("a", arrivals=1000, working_s={1: 500.0}, failures={1: 3}), 0.0)
    d.tick(SILENT_S + 1)
    assert d.demand == 0.0
    again = report("a", arrivals=1002, working_s={1: 501.5}, failures={1: 3})
    assert d.heard(again, SILENT_S + 2) == ({1: 1.5}, [])
    assert d.arrivals == 1002


def test_what_a_loadbalancer_counted_before_we_began_is_in_the_ledger_already() -> None:
    """After our restart its first report covers hours; else all hot dollars would become working ones."""
    d = Demand("e", began=1000.0)
    assert d.heard(report("a", working_s={1: 9999.0, 2: 0.5}), 1002.0)[0] == {1: 2.0, 2: 0.5}


def test_somebody_reports_while_a_loadbalancer_was_heard_of_lately() -> None:
    d = Demand("e")
    assert not d.reporting
    d.heard(report("a"), 0.0)
    assert d.reporting
    d.tick(SILENT_S + 1)
    assert not d.reporting
    assert Demand("e", told_nobody=True).reporting
