"""The big market: kinds, slices, places, and a search that stays fast."""

import time
from random import Random
from typing import Any

import pytest
from vastai.utils import _regions as REGIONS_OF_THE_PACKAGE  # type: ignore[import-untyped]

from localcloud.catalogue import big_market
from localcloud.cloud import Cloud
from localcloud.machines import Machine
from localcloud.orders import CloudRefusal, Order
from localcloud.query import Query
from localcloud.realism import HARSH
from localcloud.regions import REGIONS

EIGHT = Machine(9, "L40S", 0.6, slots=8, sliced=True, host_id=3, disk_gb=800.0)
ORDER = Order(image="vllm", disk_gb=40.0, cancel_unavail=True)


def found(cloud: Cloud, **query: Any) -> list[dict[str, Any]]:
    return cloud.search(Query.read({"limit": 10_000, **query}), 0.0)


def sizes(cloud: Cloud, **query: Any) -> list[tuple[int, float]]:
    rows = found(cloud, rentable={"eq": True}, **query)
    return sorted((row["num_gpus"], row["gpu_frac"]) for row in rows)


def test_a_machine_of_eight_is_offered_in_slices_of_1_2_4_and_8() -> None:
    cloud = Cloud([EIGHT], Random(1))
    assert sizes(cloud) == [(1, 1 / 8), (2, 1 / 4), (4, 1 / 2), (8, 1.0)]
    all_of_them = [row["num_gpus"] for row in found(cloud, disable_bundling=True)]
    assert sorted(all_of_them) == [*[1] * 8, *[2] * 4, 4, 4, 8]
    by_size = {row["num_gpus"]: row for row in found(cloud)}
    assert [by_size[n]["dph_base"] for n in (1, 2, 4, 8)] == pytest.approx([0.6, 1.2, 2.4, 4.8])
    assert {row["cpu_cores"] for row in by_size.values()} == {128}
    assert [by_size[n]["cpu_cores_effective"] for n in (1, 8)] == [16.0, 128.0]


def test_slices_share_the_gpus_and_the_disk_of_their_machine() -> None:
    cloud = Cloud([EIGHT], Random(1))
    (two,) = (row["id"] for row in found(cloud, num_gpus={"eq": "2"}))
    rental = cloud.create(two, ORDER, 0.0)
    assert cloud.rentals[rental].machine.num_gpus == 2
    assert sizes(cloud, disable_bundling=True) == [*[(1, 1 / 8)] * 6, *[(2, 1 / 4)] * 3, (4, 1 / 2)]
    assert {row["disk_space"] for row in found(cloud)} == {760.0}
    for taken in (900, 901, 908, 912, 914):  # its GPUs alone, itself, the four and the eight around it
        with pytest.raises(CloudRefusal, match="no_such_ask"):
            cloud.create(taken, ORDER, 0.0)
    cloud.destroy(rental, 1.0)
    assert len(sizes(cloud)) == 4


def test_a_stopped_slice_comes_back_to_any_free_one_of_its_size() -> None:
    cloud = Cloud([EIGHT], Random(1))
    first = cloud.create(908, ORDER, 0.0)
    with cloud.changing(first, 1.0) as rental:
        rental.stop(1.0)
    cloud.create(900, ORDER, 2.0)
    with cloud.changing(first, 3.0) as rental:
        rental.start(3.0)
    assert (rental.slot, rental.machine.num_gpus) == (9, 2)


def test_one_on_demand_takes_all_gpus_of_its_slice_from_bidders() -> None:
    cloud = Cloud([EIGHT], Random(1))
    bidders = [cloud.create(900 + n, Order(image="vllm", price=0.4), 0.0) for n in (0, 1, 5)]
    assert cloud.slots(EIGHT)[12].holder_bid == pytest.approx(0.8)
    cloud.create(912, ORDER, 0.0)
    assert [cloud.rentals[b].slot for b in bidders] == [None, None, 5]


def test_a_country_or_region_stands_for_all_that_lies_there() -> None:
    assert {name: set(str(codes).split(",")) for name, codes in REGIONS_OF_THE_PACKAGE.items()} == REGIONS
    cloud = Cloud(big_market(), Random(1))
    german = {row["id"] for row in found(cloud, geolocation={"eq": "DE"})}
    european = {row["id"] for row in found(cloud, geolocation={"eq": "EU"})}
    assert german
    assert german < european
    assert {row["id"] for row in found(cloud, geolocation={"in": ["DE", "US"]})} > german
    places = {row["geolocation"][-2:] for row in found(cloud, geolocation={"eq": "EU"})}
    assert {"DE", "SE"} <= places <= set(REGIONS["EU"])
    abroad = {row["geolocation"][-2:] for row in found(cloud, geolocation={"notin": ["EU", "CN"]})}
    assert abroad.isdisjoint({*REGIONS["EU"], "CN"})
    assert "US" in abroad


def test_the_big_market_has_what_makes_a_search_hard() -> None:
    machines = big_market()
    assert machines == big_market()
    assert len(machines) >= 100
    assert len({m.machine_id for m in machines}) == len(machines)
    assert len({m.gpu_name for m in machines}) >= 10
    assert {m.slots for m in machines if m.sliced} == {1, 2, 4, 8}
    hosts = [m.host_id for m in machines]
    assert any(hosts.count(h) >= 3 for h in hosts), "one host has several machines"
    usual = [m for m in machines if m.gpu_name == "RTX 4090"]
    assert {m.cpu_arch for m in usual} == {"amd64", "arm64"}
    for least, most, name in (
        (12.2, 13.0, "cuda_max_good"),
        (0.93, 0.995, "reliability"),
        (1.0, 90.0, "rental_days"),
        (0.0, 0.02, "inet_usd_gb"),
        (150.0, 5000.0, "inet_down"),
    ):
        values = [getattr(m, name) for m in machines]
        assert min(values) <= least, name
        assert max(values) >= most, name
    assert {m.datacenter for m in machines} == {True, False}
    assert {m.verification for m in machines} == {"verified", "unverified"}


def test_filters_are_answered_truthfully() -> None:
    cloud = Cloud(big_market(), Random(1), realism=HARSH.only(["bandwidth"]))
    query = {
        "cpu_arch": {"eq": "amd64"},
        "cuda_max_good": {"gte": "12.8"},
        "duration": {"gt": 7 * 86_400.0},
        "disk_space": {"gte": "500"},
        "inet_down_cost": {"lt": "0.011"},
        "reliability": {"gt": "0.98"},
        "verified": {"eq": True},
    }
    rows = found(cloud, **query)
    assert rows
    for row in rows:
        assert row["cpu_arch"] == "amd64"
        assert row["cuda_max_good"] >= 12.8
        assert row["duration"] > 7 * 86_400.0
        assert row["disk_space"] >= 500.0
        assert row["inet_down_cost"] < 0.011
        assert row["reliability"] > 0.98
        assert (row["datacenter"], row["verification"]) == (row["hosting_type"] == 1, "verified")
    assert {row["datacenter"] for row in found(cloud, **query, datacenter={"eq": True})} == {True}
    for name in query:  # each of them leaves something out
        assert len(found(cloud, **{k: v for k, v in query.items() if k != name})) > len(rows), name


def test_a_search_in_the_big_market_takes_less_than_50_ms() -> None:
    cloud = Cloud(big_market(), Random(1), realism=HARSH)
    cloud.advance(0.0)
    took = []
    for at in range(5):
        begun = time.process_time()
        cloud.search(Query.read({"gpu_ram": {"gte": 22_000.0}, "limit": 1_000}), float(at))
        took.append(time.process_time() - begun)
    assert min(took) < 0.05
