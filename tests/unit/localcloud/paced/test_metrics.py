"""The page /metrics."""

import asyncio

from tests.unit.localcloud.paced.hand_clock import (
    COMPLETION,
    HELLO,
    PacedWorld,
)


def test_what_does_not_fit_waits_and_the_metrics_say_so() -> None:
    async def run() -> None:
        world = PacedWorld()
        calls = [
            world.call(COMPLETION, HELLO | {"prompt": "x" * 3_000, "max_tokens": 100, "stream": True})
            for _ in range(4)
        ]
        await world.settle()
        for _ in range(3):
            world.clock.next()
            await world.settle()
        figures = await figures_of(world)
        assert figures["num_requests_running"] == 2.0
        assert figures["num_requests_waiting"] == 2.0
        assert 0.75 < figures["kv_cache_usage_perc"] < 0.8
        assert figures["prompt_tokens_total"] == 1_500.0
        assert figures["generation_tokens_total"] == 5.0
        assert figures["num_preemptions_total"] == 0.0
        await world.finish(*calls)
        figures = await figures_of(world)
        assert figures["generation_tokens_total"] == 400.0
        assert figures["kv_cache_usage_perc"] == 0.0

    asyncio.run(run())


async def figures_of(world: PacedWorld) -> dict[str, float]:
    call = world.call("/metrics", b"", "GET")
    await world.finish(call)
    assert call.headers[b"content-type"].startswith(b"text/plain")
    lines = [line for line in call.body.decode().splitlines() if not line.startswith("#")]
    assert all('model_name="vllm-13"' in line for line in lines)
    return {line.partition("{")[0].removeprefix("vllm:"): float(line.rpartition(" ")[2]) for line in lines}
