"""What `plan` says of a market: in the order of the autoscaler, with all that loading costs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from engine.profiles import get_profile
from fleet.candidates import candidates, choose, summary
from fleet.deadlines import Deadlines
from fleet.limits import Limits
from fleet.market import Market
from fleet.outside.config import AutoscalerConfig
from fleet.outside.plan import PlanConfig, machines_of, plan
from fleet.preferences import Preferences
from localcloud.machines import machines_from
from process.errors import ConfigError
from tests.fleet_world import make_offer
from tests.ports import free_port

PROFILE = get_profile("vllm-13")


def test_loading_costs_the_time_and_the_traffic() -> None:
    offer = replace(make_offer(1, 0.36), inet_down_usd_gb=0.02, inet_down_mbps=1000.0)
    [found] = candidates([offer], PROFILE)
    assert found.hot_s == PROFILE.load_time_s  # 22.4 GB come in 3 min
    assert found.download_usd == pytest.approx(22.4 * 0.02)
    assert found.usd_to_set_up == pytest.approx(0.36 * 600 / 3600 + 22.4 * 0.02)
    slow = candidates([replace(offer, inet_down_mbps=100.0)], PROFILE)[0]
    assert slow.hot_s == pytest.approx(22.4 * 80.0 + PROFILE.start_time_s)
    assert candidates([replace(offer, inet_down_usd_gb=None)], PROFILE)[0].usd_to_set_up is None


def test_the_order_is_that_in_which_the_autoscaler_takes_them() -> None:
    offers = [make_offer(n, usd, gpu) for n, usd, gpu in ((1, 0.5, "H100 SXM"), (2, 0.3, "RTX 3090"))]
    offers += [make_offer(3, 0.31, "RTX 4090"), make_offer(4, 0.31, "RTX 4090")]
    market = Market(PROFILE, Deadlines.for_profile(PROFILE))
    market.end_search(offers, 0.0)
    assert [c.offer.id for c in candidates(offers, PROFILE)] == [o.id for o in market.snapshot(0.0).offers]


def test_the_summary_says_what_keeps_from_it() -> None:
    found = candidates([replace(make_offer(n, 4.0), inet_down_usd_gb=0.01) for n in (1, 2, 3)], PROFILE)
    said = " ".join(summary(found, 4, Limits(2, 10.0)))
    assert "Only 3 of 4" in said
    assert "$12.00 an hour" in said
    assert "--max-dollars-per-hour is 10" in said
    assert "--max-instances is 2" in said
    assert "on one host" in said
    assert summary([], 1, Limits()) == ["Only 0 of 1 can be rented now: nothing else on the market fits."]


def test_a_cloud_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    config = AutoscalerConfig(local=True, cloud_url=f"http://127.0.0.1:{free_port()}", speedup=60.0)
    with pytest.raises(ConfigError):
        plan(config, PlanConfig(), [], console=Console())
    with pytest.raises(ConfigError, match="--count"):
        plan(config, PlanConfig(count=0), [])
    assert json.dumps(candidates([make_offer(1)], PROFILE)[0].shown())


def test_no_host_has_more_than_its_share() -> None:
    offers = [
        replace(make_offer(n, 0.3), host_id=host) for n, host in ((1, 7), (2, 7), (3, 7), (4, 8), (5, 9))
    ]
    found = candidates(offers, PROFILE)
    assert [c.offer.id for c in choose(found, 3, Preferences())] == [1, 4, 5]
    assert [c.offer.id for c in choose(found, 6, Preferences())] == [1, 2, 4, 5]
    assert [c.offer.id for c in choose(found, 4, Preferences(max_per_host=0))] == [1, 2, 3, 4]
    [said, *_] = summary(choose(found, 4, Preferences()), 4, Limits(), Preferences())
    assert said.startswith("Only 3 of 4")
    assert "at most 1 of a host" in said


def test_offers_are_machines_for_a_run_in_virtual_time() -> None:
    """What `plan --trace` plays is a market of exactly these offers."""
    new = {"gpu_ram_mb": 32_768.0, "gpu_mem_bw_gb_s": 2_000.0, "total_tflops": 120.0}
    offers = [
        make_offer(1, 0.3),
        make_offer(2, 0.3, "Unknown 1"),
        replace(make_offer(3, 0.3, "New and fast"), **new),  # type: ignore[arg-type]
    ]
    machines = machines_from(machines_of(candidates(offers, PROFILE)))
    assert [(m.gpu_name, m.slots) for m in machines] == [("New and fast", 1), ("RTX 4090", 1)]
    assert machines[0].usd_h == pytest.approx(0.29)
    gpu = machines[0].gpu
    assert (gpu.ram_mb, gpu.mem_bw_gb_s, gpu.tflops) == (32_768, 2_000.0, 120.0)
