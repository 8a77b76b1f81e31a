"""What one instance gives with the lengths of a log."""

import pytest

from engine.profiles import get_profile
from engine.slo import Slo
from simulation.traces.request import Request
from simulation.virtual.capacity import capacity_of


def test_an_instance_does_less_with_longer_prompts_and_less_on_a_slower_gpu() -> None:
    profile, slo = get_profile("vllm-13"), Slo()

    def capacity(gpu: str, prompt: int, output: int) -> tuple[float, float]:
        log = [Request(float(n), prompt, output, -1) for n in range(50)]
        found = capacity_of(profile, profile.timing_on(gpu), log, slo)
        assert found.work_s == pytest.approx(found.requests_s * (0.1 * prompt + output), rel=0.01)
        return found.work_s, found.concurrency

    short, long = capacity("A100 SXM4", 300, 180), capacity("A100 SXM4", 8000, 180)
    assert short[0] > 1.5 * long[0]
    assert short[1] > 3 * long[1], "memory holds fewer of them"
    assert short[0] > 1.5 * capacity("RTX 3090", 300, 180)[0]
    assert short[0] == pytest.approx(profile.throughput_on("A100 SXM4"), rel=0.15), "as the profile says"
