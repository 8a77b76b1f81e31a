"""How long an instance's steps take is learned from its reports."""

import random

import numpy as np
import pytest

from dispatch.step_times import RANGE, WINDOW_S, BusyWindow, StepTimes
from engine.forward import (
    COL_BASE_S,
    COL_CONTEXT_S,
    COL_PREFILL_S,
    COL_PROMPT_S,
    COL_REQUEST_S,
    COL_SQUARE_S,
    COL_STEP_TOKENS,
    constants,
)
from engine.step_time_constants import TIMINGS, Timing

TOLD = TIMINGS["13B", "awq4", "A100 SXM4", 1]


def off(factors: tuple[float, ...]) -> Timing:
    """What was told, each constant wrong by its own factor."""
    a, b, c, d, e, f = (
        x * y for x, y in zip((TOLD.a, TOLD.b, TOLD.c, TOLD.d, TOLD.e, TOLD.f), factors, strict=True)
    )
    return Timing("off", a, b, c, d, e, f, TOLD.kv_tokens)


def spans(times: StepTimes, true: Timing, count: int, seed: int = 1) -> None:
    """So many spans of a server with those constants, at loads that change."""
    rng, now, made, read = random.Random(seed), 0.0, 0, 0
    for _ in range(count):
        running, prompt = rng.uniform(5, 50), rng.uniform(300, 2000)
        context = running * prompt
        steps, reads = rng.randint(60, 200), rng.randint(1, 8)
        step_ms = true.a + true.b * running + true.c * context / 1e3
        ms = steps * step_ms + reads * (
            max(0.0, true.d - true.a) + true.e * prompt / 1e3 + true.f * (prompt / 1e3) ** 2
        )
        seconds = max(ms / 1e3, WINDOW_S)
        scale = seconds / (ms / 1e3)
        span = BusyWindow(now, running, context, made, read)
        now += seconds
        span.extend(now, running, context)
        made += round(scale * steps * running)
        read += round(scale * reads * prompt)
        times.learn(span, made, read, prompt, prompt**2)


def test_what_was_told_stays_when_it_is_true() -> None:
    times = StepTimes(TOLD)
    spans(times, TOLD, 150)
    assert times.factors == pytest.approx(np.ones(6), abs=0.05)


@pytest.mark.parametrize(
    "factors",
    [(1.3, 1.3, 1.3, 1.3, 1.3, 1.3), (0.7, 1.0, 1.3, 1.0, 0.8, 1.0), (1.0, 0.7, 0.8, 1.3, 1.3, 0.7)],
)
def test_a_step_is_predicted_within_three_percent_after_ten_minutes(factors: tuple[float, ...]) -> None:
    times, true = StepTimes(off(tuple(1.0 / x for x in factors))), TOLD
    spans(times, true, 150)
    wanted, learned = constants(true), times.constants
    for running, context, tokens in ((10, 10_000, 0), (40, 40_000, 0), (20, 20_000, 1500)):

        def seconds(s: np.ndarray, n: int = running, c: int = context, t: int = tokens) -> float:
            floor = max(s[COL_BASE_S], s[COL_PREFILL_S]) if t else s[COL_BASE_S]
            return float(
                floor
                + s[COL_REQUEST_S] * n
                + s[COL_CONTEXT_S] * c
                + s[COL_PROMPT_S] * t
                + s[COL_SQUARE_S] * t * t
            )

        assert seconds(learned) == pytest.approx(seconds(wanted), rel=0.03)


def test_a_span_that_is_too_short_or_in_which_nothing_was_made_teaches_nothing() -> None:
    times = StepTimes(TOLD)
    short = BusyWindow(0.0, 10.0, 1e4, 0, 0)
    short.extend(WINDOW_S / 2, 10.0, 1e4)
    times.learn(short, 1000, 0, 100.0, 1e4)
    silent = BusyWindow(0.0, 10.0, 1e4, 0, 0)
    silent.extend(WINDOW_S, 10.0, 1e4)
    times.learn(silent, 0, 0, 100.0, 1e4)
    assert (times.windows, list(times.factors)) == (0, [1.0] * 6)


def test_a_span_goes_on_until_a_report_is_missing_or_the_counters_begin_anew() -> None:
    span = BusyWindow(0.0, 10.0, 1e4, 100, 100)
    assert span.goes_on(1.0, 200, 100)
    assert not span.goes_on(1.0, 50, 100)
    assert not span.goes_on(1.0, 200, 50)
    assert not span.goes_on(WINDOW_S + 1.0, 200, 100)


def test_absurd_counters_cannot_take_a_constant_out_of_its_range() -> None:
    times = StepTimes(TOLD)
    for n in range(50):
        span = BusyWindow(10.0 * n, 5.0, 1e3, 0, 0)
        span.extend(10.0 * n + 5.0, 5.0, 1e3)
        times.learn(span, 10**9 if n % 2 else 1, 10**9, 100.0, 1e4)
    assert np.all(times.factors >= 1.0 / RANGE)
    assert np.all(times.factors <= RANGE)
    assert np.all(np.isfinite(times.constants))
    assert times.constants[COL_STEP_TOKENS] == TOLD.step_tokens
