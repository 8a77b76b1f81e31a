"""Which GPUs of the market serve a model in time, and what a million tokens cost there."""

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from engine.profiles import get_profile
from engine.reference import EventKind, SteppedModelServer
from engine.slo import Slo
from engine.step_time_constants import Timing
from fleet.fits import PROMPT_TOKENS, fits_of, held_within, not_for_rent
from fleet.outside.fits_table import show_fits
from tests.fleet_world import make_offer
from vast.rows import Offer

QWEN = get_profile("qwen3-32b")


def offer(id: int, gpu: str, count: int, usd_h: float, mem_gb: float, **more: Any) -> Offer:
    return replace(make_offer(id, usd_h, gpu), num_gpus=count, gpu_ram_mb=1024.0 * mem_gb, **more)


MARKET = [
    offer(1, "RTX 4090", 1, 0.3, 24),
    offer(2, "RTX 4090", 4, 1.4, 24),
    offer(3, "RTX 4090", 4, 1.2, 24),
    offer(4, "A100 SXM4", 2, 1.8, 80),
    offer(5, "A100 SXM4", 2, 1.0, 40),
    offer(6, "H100 SXM", 2, 4.2, 80),
    offer(7, "New and fast", 2, 1.0, 96, gpu_mem_bw_gb_s=2000.0, total_tflops=250.0),
    offer(8, "Says nothing", 2, 0.1, 96),
]


def test_each_kind_and_number_of_gpus_that_fits_has_a_line_the_cheapest_tokens_first() -> None:
    found = fits_of(MARKET, QWEN, Slo())
    names = {(f.gpu_name, f.num_gpus) for f in found}
    assert names == {("RTX 4090", 4), ("A100 SXM4", 2), ("H100 SXM", 2), ("New and fast", 2)}
    prices = [f.usd_million for f in found]
    assert None not in prices
    assert prices == sorted(prices)  # type: ignore[type-var]
    four = next(f for f in found if f.gpu_name == "RTX 4090")
    assert (four.offers, four.usd_h) == (2, 1.2)
    assert four.usd_million == pytest.approx(1.2 / four.tokens_s / 3600 * 1e6)


def test_two_boards_of_one_name_and_unlike_memory_are_two_lines() -> None:
    """A pair of A100s with 40 GB is too small for 65 GB of weights and a long request; four are not."""
    both = [offer(1, "A100 SXM4", 4, 1.0, 40), offer(2, "A100 SXM4", 4, 2.0, 80)]
    kv = {f.usd_h: f.kv_tokens for f in fits_of(both, replace(QWEN), Slo())}
    assert kv[1.0] < kv[2.0]


@pytest.mark.parametrize("gpu", ["RTX 4090", "A100 SXM4", "H100 SXM", "RTX 5090"])
def test_so_many_at_once_keep_the_objective_on_the_model_server_and_a_third_more_would_not(gpu: str) -> None:
    profile, slo = get_profile("vllm-13"), Slo(output_token_s=0.03)
    timing = profile.timing_on(gpu)
    at_once = held_within(timing, slo, PROMPT_TOKENS, profile.expected_output_tokens)
    assert at_once > 0
    assert mean_token_s(timing, at_once, profile.expected_output_tokens) <= slo.output_token_s * 1.1
    held = timing.kv_tokens / (PROMPT_TOKENS + profile.expected_output_tokens / 2)
    if at_once < min(timing.max_seqs, held) / 1.4:
        more = mean_token_s(timing, round(at_once * 1.35), profile.expected_output_tokens)
        assert more > slo.output_token_s


def mean_token_s(timing: Timing, at_once: int, output: float) -> float:
    """The mean time between tokens with so many requests all the time, each begun when another ends."""
    server = SteppedModelServer(timing, every_token=False)
    begun: dict[str, float] = {}
    took: list[float] = []
    number = 0

    def begin(now: float) -> None:
        nonlocal number
        number += 1
        server.submit(str(number), round(PROMPT_TOKENS), round(output) - (number * 37) % 60, now)

    for n in range(at_once):
        begin(n * 0.01)
    while len(took) < 20 * at_once and (at := server.next_change()) is not None:
        for event in server.advance(at):
            if event.kind is EventKind.TOKENS and event.id not in begun:
                begun[event.id] = event.at
            elif event.kind is EventKind.FINISHED:
                tokens = round(output) - (int(event.id) * 37) % 60
                took.append((event.at - begun.get(event.id, event.at)) / max(1, tokens - 1))
                begin(event.at)
    late = took[len(took) // 2 :]
    return sum(late) / len(late)


def test_an_objective_that_nothing_keeps_is_said_and_not_priced() -> None:
    found = fits_of(MARKET, QWEN, Slo(output_token_s=0.001))
    assert found
    assert all(f.at_once == 0 and f.usd_million is None for f in found)
    out = io.StringIO()
    show_fits(found, QWEN, Console(file=out, width=200), Slo(output_token_s=0.001))
    assert out.getvalue().count("too slow") == len(found)


def test_what_would_fit_and_is_not_for_rent_is_named_with_the_fewest_that_do() -> None:
    others = not_for_rent(fits_of(MARKET, QWEN, Slo()), QWEN, 8)
    assert "1 x H200" in others
    assert "2 x L40S" in others
    assert not any("A100 SXM4" in name for name in others), "there is one"
    assert not any("RTX 3070" in name for name in others), "8 GB"


def test_the_table_names_price_and_what_in_time_means() -> None:
    out = io.StringIO()
    show_fits(fits_of(MARKET, QWEN, Slo()), QWEN, Console(file=out, width=200))
    assert "2 x New and fast" in out.getvalue()
    assert "$/M tokens" in out.getvalue()
    assert "first token within 2 s" in out.getvalue()
    out = io.StringIO()
    show_fits([], QWEN, Console(file=out, width=200))
    assert "No offer on the market holds qwen3-32b" in out.getvalue()
