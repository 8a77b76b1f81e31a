"""Every GPU on the market ranks by its expected price a token, and is told to loadbalancers as it is."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from engine.gpus import GPUS
from engine.profiles import PROFILES, get_profile
from fleet.commands import Create
from fleet.gpu_numbers import numbers_of
from fleet.instance import Instance
from fleet.market import ranked, sorted_out, usd_per_million_work
from fleet.preferences import Preferences
from localcloud.catalogue import big_market
from policies import Fixed
from simulation.virtual.cloud import told_of
from tests.fleet_world import Contract, World, make_offer
from vast.rows import Offer
from web.messages.decoding import decode
from web.messages.hot_set import HotTiming

PROFILE = get_profile("vllm-13")


def new_card(id: int, usd_h: float, **more: Any) -> Offer:
    """Offer of a GPU that nobody has heard of, with the numbers of an RTX 5090."""
    numbers = {"gpu_ram_mb": 32_607.0, "gpu_mem_bw_gb_s": 1_792.0, "total_tflops": 104.8}
    return replace(make_offer(id, usd_h, "RTX 9090"), **{**numbers, **more})


def test_a_gpu_without_measured_constants_is_rented_where_its_tokens_are_cheaper() -> None:
    """Taken for the slowest, neither would ever be: 0.50/620 is more than 0.40/950."""
    for fast in (make_offer(2, 0.50, "RTX 5090"), new_card(2, 0.50)):
        w = World(policy=Fixed(1, 1))
        w.offers = [make_offer(1, 0.40), fast]
        w.tick()
        w.tick()
        (create,) = [c for c in w.ordered if isinstance(c, Create)]
        assert create.offer.id == 2


def test_every_gpu_of_a_big_market_has_a_price_a_token_of_its_own() -> None:
    work_s = {
        (m.gpu_name): PROFILE.throughput_on(m.gpu_name, 1, told_of(m))
        for m in big_market()
        if PROFILE.fits(m.gpu_name, 1, told_of(m))
    }
    assert len(work_s) >= 15
    assert len({round(rate) for rate in work_s.values()}) == len(work_s)
    assert work_s["RTX 5090"] > work_s["RTX 4090"] > work_s["RTX 3090"]
    assert work_s["H200"] > work_s["H100 SXM"] > work_s["A100 SXM4"]


def test_the_same_board_by_name_and_by_numbers_ranks_alike() -> None:
    known, unknown = make_offer(1, 0.5, "RTX 5090"), new_card(2, 0.5)
    prices = [usd_per_million_work(o, PROFILE) for o in (known, unknown)]
    assert prices[1] == pytest.approx(prices[0], rel=0.02)
    silent = new_card(3, 0.5, gpu_mem_bw_gb_s=None, total_tflops=None)
    assert [o.id for o in ranked([silent, unknown], PROFILE)] == [2, 3], "what says nothing is the slowest"


def test_offers_that_cannot_hold_the_model_are_left_out_and_counted() -> None:
    small = [make_offer(1, 0.1, "RTX 3060"), new_card(2, 0.1, gpu_ram_mb=8_192.0)]
    wanted, refused = sorted_out([*small, make_offer(3)], PROFILE, Preferences())
    assert [o.id for o in wanted] == [3]
    assert refused == {"with too little GPU memory": 2}


def test_an_instance_keeps_what_its_offer_said_where_the_listing_says_nothing() -> None:
    offer = new_card(1, 0.5)
    i = Instance.ordered("fleet/a", offer, "wanted", PROFILE, 0.0)
    i.read_row(Contract(7, "fleet/a", 101, 0.5, status="running", gpu="RTX 9090").row(), PROFILE, 1.0)
    assert i.gpu_told == numbers_of(offer)
    assert i.throughput_work_s == pytest.approx(PROFILE.throughput_on("RTX 5090"), rel=0.02)


@pytest.mark.parametrize("name", [p.name for p in PROFILES.values() if p.shape is not None])
def test_step_times_of_every_profile_and_gpu_reach_the_loadbalancer(name: str) -> None:
    profile = get_profile(name)
    for gpu in (*GPUS, "Nobody knows it"):
        for count in (1, 2, 8):
            timing = profile.timing_on(gpu, count)
            told = HotTiming.of(timing)
            assert told.timing() == replace(timing, name="told")
            assert decode(msgspec.json.encode(told), HotTiming) == told, "it is within its bounds"
            assert profile.throughput_on(gpu, count) > 0.0
