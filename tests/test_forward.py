"""A model server run forward is the model server: the same first tokens and ends, compiled or not."""

import random

import numpy as np
import pytest

from dispatch import forward
from dispatch.belief import Belief, row
from dispatch.forward import COLUMNS, HELD, MADE, UNREAD, constants, price, run
from model_timing import TIMINGS, Timing
from simulation.timing import Kind, ModelServer

A100 = TIMINGS["13B", "awq4", "A100 SXM4", 1]


def small(kv_tokens: int) -> Timing:
    """An A100 with less memory, so that it is full now and then."""
    return Timing("small", A100.a, A100.b, A100.c, A100.d, A100.e, A100.f, kv_tokens)


def served(
    timing: Timing, asked: list[tuple[float, int, int]]
) -> tuple[dict[str, float], dict[str, float], int]:
    """(first tokens, ends, how often one was put back) of requests (when, prompt, answer) on the server."""
    server = ModelServer(timing, every_token=False)
    events = []
    for n, (at, prompt, output) in enumerate(asked):
        events += server.submit(str(n), prompt, output, at)
    while (change := server.next_change()) is not None:
        events += server.advance(change)
    first: dict[str, float] = {}
    for e in events:
        if e.kind in (Kind.TOKENS, Kind.FINISHED):
            first.setdefault(e.id, e.at)
    return first, {e.id: e.at for e in events if e.kind is Kind.FINISHED}, server.preemptions


def some(seed: int) -> list[tuple[float, int, int]]:
    """Requests that come one by one and in bursts."""
    rng, at, asked = random.Random(seed), 0.0, []
    for n in range(rng.randint(1, 40)):
        at += rng.random() if rng.random() < 0.5 else 0.0
        # The server begins its first step with the first alone, so nobody comes at the very same time.
        asked.append((at + 1e-9 * n, rng.randint(1, 3000), rng.randint(1, 400)))
    return asked


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_model_server_to_the_microsecond(seed: int) -> None:
    """Chunks, admission in order, growth, being put back and read again: 12,000 tokens are soon full."""
    timing, asked = small(12_000), some(seed)
    first, ends, _ = served(timing, asked)
    rows = np.stack([row(p, 0.0, o, 1e9, 0) for _, p, o in asked])
    got_first, got_end = np.zeros(len(asked)), np.zeros(len(asked))
    come = np.array([at for at, _, _ in asked])
    run(rows, come, constants(timing), 0.0, np.inf, got_first, got_end)
    assert got_first == pytest.approx([first[str(n)] for n in range(len(asked))], abs=1e-6)
    assert got_end == pytest.approx([ends[str(n)] for n in range(len(asked))], abs=1e-6)


def test_among_the_cases_are_some_in_which_memory_ran_out() -> None:
    assert sum(served(small(12_000), some(seed))[2] for seed in range(40)) > 20


@pytest.mark.parametrize("seed", range(5))
def test_what_is_compiled_is_what_stands_there(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain Python function, without numba, gives the same numbers."""
    asked = some(seed)
    rows = np.stack([row(p, 0.0, o, 1e9, 0) for _, p, o in asked])
    come = np.array([at for at, _, _ in asked])
    compiled = np.zeros((2, len(asked)))
    took = run(rows.copy(), come, constants(small(9_000)), 0.0, np.inf, compiled[0], compiled[1])
    for name in ("_step_s", "_steps_until", "_settle", "_insert", "_take_out"):
        monkeypatch.setattr(forward, name, getattr(forward, name).py_func)
    plain = np.zeros((2, len(asked)))
    again = run.py_func(rows.copy(), come, constants(small(9_000)), 0.0, np.inf, plain[0], plain[1])  # type: ignore[attr-defined]
    assert again == pytest.approx(took, rel=1e-12)
    assert plain == pytest.approx(compiled, rel=1e-12)


def test_a_request_that_never_fits_ends_never_and_stops_nobody() -> None:
    rows = np.stack([row(20_000.0, 0.0, 10.0, 1e9, 0), row(100.0, 0.0, 10.0, 1e9, 0)])
    first, end = np.zeros(2), np.zeros(2)
    run(rows, np.zeros(2), constants(small(9_000)), 0.0, np.inf, first, end)
    assert first[0] == end[0] == forward.NEVER_S
    assert end[1] < 10.0


def test_the_price_is_what_everybody_waits_longer_for_it() -> None:
    """By hand: with and without it, on the server itself."""
    timing = small(20_000)
    there = [(0.0, 900, 120), (1e-9, 700, 60), (2e-9, 1500, 200)]
    new = (3e-9, 1200, 80)
    first, ends, _ = served(timing, there)
    first_with, ends_with, _ = served(timing, [*there, new])
    wanted = sum(ends_with.values()) - sum(ends.values())
    wanted += 10.0 * (sum(first_with.values()) - sum(first.values()))
    rows = np.stack([row(p, 0.0, o, 1e9, 0) for _, p, o in there])
    ask = row(new[1], 0.0, new[2], 1e9, 0)
    got, own_first, own_end = price(rows, 3, constants(timing), 0.0, ask, np.inf, ask, 10.0)
    # On the server the first began alone, here all three are there: part of a step.
    assert got == pytest.approx(wanted, rel=0.03)
    assert own_first == pytest.approx(first_with["3"], abs=0.15)
    assert own_end == pytest.approx(ends_with["3"], abs=0.15)


def test_who_is_expected_to_come_makes_a_crowded_server_dearer_and_not_an_idle_one_cheaper() -> None:
    ask = row(1000.0, 0.0, 200.0, 1e9, 0)
    s = constants(A100)
    rows = np.stack([ask] * 20)
    alone, _, _ = price(rows, 20, s, 0.0, ask, np.inf, ask, 10.0)
    crowd, _, _ = price(rows, 20, s, 0.0, ask, 0.3, ask, 10.0)
    assert crowd > alone
    assert price(rows, 0, s, 0.0, ask, 0.3, ask, 10.0)[0] < price(rows, 20, s, 0.0, ask, 0.3, ask, 10.0)[0]


# -- the belief ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_a_belief_that_is_told_everything_is_the_server(seed: int) -> None:
    """Requests and ends are told at once: after each, tokens made and memory held are the server's."""
    rng, timing = random.Random(seed), A100
    server, belief, s, now = ModelServer(timing, every_token=False), Belief(0.0), constants(A100), 0.0
    for n in range(60):
        until = now + rng.expovariate(3.0)
        while (change := server.next_change()) is not None and change <= until:
            now = change
            for e in server.advance(now):
                if e.kind is Kind.FINISHED:
                    belief.remove(e.id, s, now)
        now = until
        prompt, output = rng.randint(10, 2000), rng.randint(2, 300)
        for e in server.submit(str(n), prompt, output, now):
            if e.kind is Kind.FINISHED:
                belief.remove(e.id, s, now)
        belief.add(str(n), row(prompt, 0.0, 1e9, 1e9, 0), s, now)
        belief.age(s, now)
        assert len(belief) == server.running + server.waiting
        assert belief.context == pytest.approx(server.kv_tokens_used, abs=3.0 * len(belief) + 4200)


def test_a_belief_is_as_new_as_the_question_and_never_before_the_step_under_way() -> None:
    s, belief = constants(A100), Belief(10.0)
    belief.add("one", row(1500.0, 0.0, 100.0, 1e9, 0), s, 10.0)
    belief.age(s, 10.0001)
    assert belief.at > 10.1, "reading 1,500 tokens is one step"
    assert belief.rows[0, UNREAD] == 0.0
    belief.age(s, 12.0)
    assert 12.0 <= belief.at < 12.1
    assert belief.rows[0, MADE] == pytest.approx((12.0 - 10.15) / 0.0088, rel=0.1)
    assert belief.rows[0, HELD] == belief.rows[0, MADE] + 1500.0


def test_nobody_ends_in_a_belief_until_it_is_told() -> None:
    s, belief = constants(A100), Belief(0.0)
    belief.add("one", row(100.0, 0.0, 5.0, 1e9, 0), s, 0.0)
    belief.age(s, 60.0)
    assert "one" in belief
    belief.remove("one", s, 60.0)
    belief.remove("one", s, 60.0)
    assert len(belief) == 0
    belief.age(s, 70.0)
    assert belief.at == 70.0


def test_a_table_grows_with_its_requests() -> None:
    s, belief = constants(A100), Belief(0.0)
    for n in range(50):
        belief.add(str(n), row(10.0, 0.0, 5.0, 1e9, 0), s, 0.0)
    assert belief.rows.shape == (64, COLUMNS)
    belief.clear(5.0)
    assert (len(belief), belief.at) == (0, 5.0)


def test_memory_of_those_who_may_have_ended_counts_less_the_longer_nothing_was_heard() -> None:
    s, table = constants(A100), np.full((1, 96), 100.0)
    ask, free = row(500.0, 0.0, 100.0, 1e9, 0), []
    for heard_at in (20.0, 18.0, 10.0):
        belief = Belief(0.0)
        for n in range(10):
            belief.add(str(n), row(1000.0, 0.0, 100.0, 1e9, 0), s, 0.0)
        belief.heard_at = heard_at
        free.append(belief.offer(ask, s, table, ask, np.inf, 10.0, 20.0)[1])
    assert free == sorted(free)
    assert free[-1] > 1.02 * free[0]
