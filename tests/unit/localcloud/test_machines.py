"""Machines from a file, and the built-in market."""

from collections.abc import Mapping
from operator import eq, ge, gt, le, lt
from random import Random
from typing import Any

import pytest

from engine.profiles import PROFILES, get_profile
from localcloud.catalogue import big_market
from localcloud.cloud import Cloud
from localcloud.machines import DAY_S, MACHINES, Machine, machines_from
from localcloud.offers import Slot, offer
from localcloud.query import Query
from localcloud.realism import LEVELS
from process.errors import ConfigError


@pytest.mark.parametrize("name", list(PROFILES))
def test_the_built_in_market_has_offers_for_every_profile_and_some_that_do_not_fit(name: str) -> None:
    """The query as the CLI sends it is tested with real processes; here by its words."""
    words, most = get_profile(name).offer_query().split(), max(m.num_gpus for m in MACHINES)
    shares = [m.share(s.count) for m in big_market() for s in m.slices()]
    small = any(get_profile(name).fits(m.gpu_name, most) is not False for m in MACHINES)
    for market in (MACHINES, shares) if small else (shares,):
        fits = [m for m in market if _fits(m, words)]
        assert 0 < len(fits) < len(market)


def _fits(machine: Machine, words: list[str]) -> bool:
    return _passes(offer(Slot(machine, 0, 500.0), 40.0, 0.0, bid=False), words)


def _passes(shown: Mapping[str, Any], words: list[str]) -> bool:
    for word in words:
        for sign in (">=", "<=", ">", "<", "="):
            if sign in word:
                field, _, value = word.partition(sign)
                break
        if field == "cpu_arch":
            if shown[field] != value:
                return False
            continue
        number = float(value) * {"gpu_ram": 1e3, "gpu_total_ram": 1e3, "duration": DAY_S}.get(field, 1.0)
        ours, holds = float(shown[field]), {">=": ge, "<=": le, ">": gt, "<": lt, "=": eq}[sign]
        if not holds(ours, number):
            return False
    return True


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "at least one machine"),
        ({}, "wanted a list"),
        ([5], "wanted an object"),
        ([{"machine_id": 1}], "missing"),
        ([{"machine_id": 1, "gpu_name": "RTX 4090", "usd_gpu_h": 0.5, "odd": 1}], "unknown field 'odd'"),
        ([{"machine_id": 1, "gpu_name": "GTX 1", "usd_gpu_h": 0.5}], "gpu_name"),
        ([{"machine_id": 1, "gpu_name": "RTX 4090", "usd_gpu_h": "0.5"}], "usd_gpu_h: wanted float"),
        ([{"machine_id": 1, "gpu_name": "RTX 4090", "usd_gpu_h": 0.0}], "usd_gpu_h"),
        ([{"machine_id": 1, "gpu_name": "RTX 4090", "usd_gpu_h": 0.5}] * 2, "given twice"),
        (
            [{"machine_id": 1, "gpu_name": "RTX 4090", "usd_gpu_h": 0.5, "driver_version": "x"}],
            "driver_version",
        ),
    ],
)
def test_a_file_of_machines_is_refused_by_what_is_wrong(data: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        machines_from(data)


def test_a_file_of_machines_is_a_market() -> None:
    (machine,) = machines_from([{"machine_id": 1, "gpu_name": "RTX 4090", "usd_gpu_h": 1, "slots": 3}])
    assert (machine.usd_h, machine.slots, machine.offer_id(2)) == (1, 3, 102)


@pytest.mark.parametrize("level", list(LEVELS))
@pytest.mark.parametrize("speedup", [1.0, 30.0, 600.0])
@pytest.mark.parametrize("name", ["vllm-13", "vllm-70"])
def test_every_local_cloud_has_machines_for_a_profile_however_fast_it_is(
    level: str, speedup: float, name: str
) -> None:
    """Contracts of a fast cloud are as much shorter, and so is what the search wants of them."""
    realism = LEVELS[level]
    market = big_market() if realism.big_market else MACHINES
    cloud = Cloud(market, Random(1), speedup=speedup, realism=realism)
    words = get_profile(name).offer_query(speedup).split()
    rows = cloud.search(Query.read({"limit": 10_000, "rentable": {"eq": True}}), 0.0)
    assert any(_passes(row, words) for row in rows)
