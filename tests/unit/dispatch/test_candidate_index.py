"""The instances that can serve are ordered by the work they have left, at any time. Time is a number."""

import random

import pytest

from dispatch.candidate_index import CandidateIndex
from dispatch.instance import ServingInstance
from dispatch.predicted_load import LoadTable, request_row
from dispatch.request_estimates import PREFILL_WEIGHT
from tests.dispatch_world import T0, instance


def serving(id: int, table: LoadTable, throughput: float = 100.0) -> ServingInstance:
    """One with tokens."""
    inst = ServingInstance(instance(id, throughput), table, T0)
    inst.stock.refill([f"token{id}"], 600.0, T0)
    return inst


@pytest.mark.parametrize("seed", range(3))
def test_the_first_are_those_with_the_least_work_left_however_much_time_has_passed(seed: int) -> None:
    rng, table, now = random.Random(seed), LoadTable(), T0
    index = CandidateIndex(random.Random(1))
    all_of_them = [serving(id, table) for id in range(1, 41)]
    for inst in all_of_them:
        for n in range(rng.randrange(4)):
            row = request_row(1.0, rng.uniform(1.0, 900.0), 1e9, 0)
            inst.add_other(f"{inst.id}.{n}", row, PREFILL_WEIGHT, now)
        index.update(inst, now)
    for _ in range(30):
        now += rng.expovariate(2.0)
        least = sorted(inst.work(now) / inst.throughput for inst in all_of_them)
        found = sorted(index.first(5, now))[:5]
        assert [seconds for seconds, *_ in found] == pytest.approx(least[:5])


def test_instances_of_another_speed_do_not_hide_each_other() -> None:
    table, index = LoadTable(), CandidateIndex(random.Random(1))
    for id in range(1, 21):
        index.update(serving(id, table, 100.0 if id < 20 else 1000.0), T0)
    assert index.classes == 2
    assert 20 in {inst.id for *_, inst in index.first(1, T0)}


def test_an_instance_that_cannot_serve_is_in_no_class_and_an_empty_class_is_forgotten() -> None:
    table, index = LoadTable(), CandidateIndex(random.Random(1))
    inst = serving(1, table)
    index.update(inst, T0)
    index.update(inst, T0)
    assert (inst in index, len(index.first(9, T0))) == (True, 1)
    inst.circuit.trip(T0)
    index.update(inst, T0)
    assert (inst in index, index.first(9, T0)) == (False, [])
    index.discard(inst)
    index.drop_empty_classes()
    assert index.classes == 0
