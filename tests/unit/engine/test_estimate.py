"""Step times by arithmetic: what is known of some GPUs comes out of their data sheets, too."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from engine.estimate import ModelShape, Weights, estimate, full_queue_work_s, kv_tokens
from engine.gpus import GPUS, Family, GpuModel, GpuNumbers, by_numbers, gpu_of
from engine.profiles import PROFILES, get_profile
from engine.reference import EventKind, SteppedModelServer
from engine.step_time_constants import TIMINGS, Key, Timing
from localcloud.machines import GPUS as MARKET

SHAPES = {
    # docs/reference/timing.md 3 with the GB of weights that its KV tokens come from.
    "13B": ModelShape(13.02, 13.02, 7.1, Weights.W4, 40, 5120, 819_200),
    "70B": ModelShape(70.55, 70.55, 36.8, Weights.W4, 80, 8192, 327_680),
}
WITHIN = 0.25
CONTEXT = 390


def named(key: Key) -> GpuModel:
    return GPUS[key[2]]


def nameless(key: Key) -> GpuModel:
    """The same GPU as an offer describes it: only fp32 flops, and no word of NVLink."""
    gpu, listed = GPUS[key[2]], MARKET[key[2]]
    found = by_numbers(GpuNumbers(gpu.mem_gb, listed.mem_bw_gb_s, listed.tflops))
    return replace(found, nvlink=gpu.nvlink)


def decode_tokens_s(timing: Timing, batch: int) -> float:
    return batch / timing.step_ms(batch, batch * CONTEXT) * 1e3


def saturated_work_s(timing: Timing, weight: float = 0.1) -> float:
    """Work per second of a server that 1,500 requests of 300 and 180 tokens keep full: its middle third."""
    server = SteppedModelServer(timing)
    ended: list[float] = []
    for n in range(1500):
        server.submit(str(n), 300, 180, 0.0)
    while (at := server.next_change()) is not None:
        ended += [e.at for e in server.advance(at) if e.kind is EventKind.FINISHED]
    return 500 * (180 + 300 * weight) / (ended[999] - ended[499])


@pytest.mark.parametrize("gpu_of_row", [named, nameless])
@pytest.mark.parametrize("key", TIMINGS, ids=lambda key: f"{key[0]} {key[3]}x {key[2]}")
def test_an_estimate_is_within_a_quarter_of_each_known_constant(
    key: Key, gpu_of_row: Callable[[Key], GpuModel]
) -> None:
    """Decode alone, decode of a full memory, prefill, and the throughput of a full queue."""
    known = TIMINGS[key]
    found = estimate("", SHAPES[key[0]], gpu_of_row(key), key[3], 1)
    held = min(known.kv_tokens // CONTEXT, known.max_seqs)
    assert decode_tokens_s(found, 1) == pytest.approx(decode_tokens_s(known, 1), rel=WITHIN)
    assert decode_tokens_s(found, held) == pytest.approx(decode_tokens_s(known, held), rel=WITHIN)
    for prompt in (500, 1000, 4000):
        assert found.prefill_ms(prompt) == pytest.approx(known.prefill_ms(prompt), rel=WITHIN)
    assert found.kv_tokens == pytest.approx(known.kv_tokens, rel=WITHIN)
    assert full_queue_work_s(found, 0.1) == pytest.approx(saturated_work_s(known), rel=WITHIN)


@pytest.mark.parametrize("name", [p.name for p in PROFILES.values() if p.throughput_by_gpu])
def test_ranking_would_be_the_same_within_a_quarter_without_the_known_figures(name: str) -> None:
    profile = get_profile(name)
    blank = replace(profile, throughput_by_gpu={}, rows=None)
    for gpu, work_s in profile.throughput_by_gpu.items():
        count, _, one = gpu.rpartition("x ")
        assert blank.throughput_on(one, int(count or 1)) == pytest.approx(work_s, rel=WITHIN), gpu


@pytest.mark.parametrize("gpu", ["RTX 5090", "H200", "L4", "RTX PRO 6000 WS", "B200"])
def test_the_closed_form_of_a_full_queue_is_what_the_model_server_does(gpu: str) -> None:
    timing = get_profile("vllm-13").timing_on(gpu)
    assert full_queue_work_s(timing, 0.1) == pytest.approx(saturated_work_s(timing), rel=WITHIN)


def test_every_gpu_of_the_local_market_is_known_by_name_and_by_its_numbers_alike() -> None:
    """By its numbers at most the factor of its tensor cores is off; the L4's and V100's are unlike others."""
    assert len(GPUS) >= 25
    assert set(MARKET) <= set(GPUS)
    for name, listed in MARKET.items():
        told = GpuNumbers(listed.ram_mb / 1024, listed.mem_bw_gb_s, listed.tflops)
        gpu = by_numbers(told)
        assert gpu_of("no such name", told) == gpu
        assert gpu.gb_s == pytest.approx(GPUS[name].gb_s, rel=0.02), name
        assert gpu.mem_gb == pytest.approx(GPUS[name].mem_gb, rel=0.1), name
    assert gpu_of("no such name") is None
    assert gpu_of("no such name", GpuNumbers(24.0, 0.0, 30.0)) is None


def test_families_are_told_apart_by_an_offers_numbers() -> None:
    kinds = {
        name: by_numbers(GpuNumbers(m.ram_mb / 1024, m.mem_bw_gb_s, m.tflops)).family
        for name, m in MARKET.items()
    }
    wrong = {name for name, family in kinds.items() if family is not GPUS[name].family}
    assert wrong == {"RTX A5000"}, "24 GB, as a consumer card has: half its flops are promised"
    assert kinds["RTX A5000"] is Family.GEFORCE


def test_more_bandwidth_decodes_faster_and_more_flops_read_prompts_faster() -> None:
    gpu = GpuModel(24.0, 1000.0, 150.0, Family.GEFORCE)
    base, wide, quick = (
        estimate("", SHAPES["13B"], g, 1, 1)
        for g in (gpu, replace(gpu, gb_s=2000.0), replace(gpu, tflops=300.0))
    )
    assert decode_tokens_s(wide, 1) == pytest.approx(2 * decode_tokens_s(base, 1), rel=0.01)
    assert decode_tokens_s(quick, 1) == decode_tokens_s(base, 1)
    assert base.prefill_ms(4000) / quick.prefill_ms(4000) == pytest.approx(2.0, rel=0.05)
    assert wide.e == base.e


def test_a_mixture_of_experts_reads_few_weights_and_computes_with_few() -> None:
    dense = ModelShape(30.0, 30.0, 60.0, Weights.W16, 48, 2048, 98_304)
    mixed = replace(dense, active_b=3.0, experts=128, experts_used=8)
    assert 0.8 * 60.0 < mixed.read_gb < 60.0, "32 requests use nearly all experts"
    h100 = GPUS["H100 SXM"]
    assert estimate("", mixed, h100, 1, 1).e == pytest.approx(estimate("", dense, h100, 1, 1).e / 10.0)
    assert kv_tokens(mixed, h100, 1) == kv_tokens(dense, h100, 1), "all of them are in memory"


def test_what_does_not_fit_is_known() -> None:
    big = get_profile("vllm-70")
    assert big.fits("RTX 4090", 1) is False
    assert big.fits("A100 SXM4", 1) is True
    assert big.fits("no such name") is None
    assert get_profile("tiny").fits("RTX 4090") is None


def test_a_board_with_less_memory_than_others_of_its_name_is_taken_by_its_own_numbers() -> None:
    """Vast calls an A100 of 40 GB by the same name as one of 80 GB."""
    profile, told = get_profile("vllm-70"), GpuNumbers(40.0, 1_555.0, 19.5)
    assert profile.fits("A100 SXM4", 1) is True
    assert profile.fits("A100 SXM4", 1, told) is False
    small, usual = (get_profile("vllm-13").timing_on("A100 SXM4", 1, t) for t in (told, None))
    assert small.kv_tokens < usual.kv_tokens / 2
    assert get_profile("vllm-13").throughput_on("A100 SXM4", 1, told) < 1720.0
    assert gpu_of("L40S", GpuNumbers(46_068 / 1024, 800.0, 90.0)) == GPUS["L40S"], "the driver's own share"
