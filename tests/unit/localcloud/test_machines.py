"""Machines from a file, and the built-in market."""

from operator import eq, ge, gt, le, lt

import pytest

from engine.profiles import PROFILES, get_profile
from localcloud.catalogue import big_market
from localcloud.machines import DAY_S, MACHINES, Machine, machines_from
from localcloud.offers import Slot, offer
from process.errors import ConfigError


@pytest.mark.parametrize("name", list(PROFILES))
def test_the_built_in_market_has_offers_for_every_profile_and_some_that_do_not_fit(name: str) -> None:
    """The query as the CLI sends it is tested with real processes; here by its words."""
    words, most = get_profile(name).offer_query.split(), max(m.num_gpus for m in MACHINES)
    shares = [m.share(s.count) for m in big_market() for s in m.slices()]
    small = any(get_profile(name).fits(m.gpu_name, most) is not False for m in MACHINES)
    for market in (MACHINES, shares) if small else (shares,):
        fits = [m for m in market if _fits(m, words)]
        assert 0 < len(fits) < len(market)


def _fits(machine: Machine, words: list[str]) -> bool:
    shown = offer(Slot(machine, 0, 500.0), 40.0, 0.0, bid=False)
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
