"""A model server run forward is the model server: the same first tokens and ends, compiled or not."""

import random

import numpy as np
import pytest

from dispatch.output_lengths import BINS, expect
from dispatch.predicted_load import LoadTable, PredictedLoad, request_row
from engine import forward
from engine.forward import COL_MAX_SEQS, HELD, MADE, PROMPT, UNREAD, constants, price, run, scratch_for
from engine.reference import EventKind, SteppedModelServer
from engine.step_time_constants import TIMINGS, Timing

A100 = TIMINGS["13B", "awq4", "A100 SXM4", 1]


def small(kv_tokens: int) -> Timing:
    """An A100 with less memory, so that it is full now and then."""
    return Timing("small", A100.a, A100.b, A100.c, A100.d, A100.e, A100.f, kv_tokens)


def served(
    timing: Timing, asked: list[tuple[float, int, int]]
) -> tuple[dict[str, float], dict[str, float], int]:
    """(first tokens, ends, how often one was put back) of requests (when, prompt, answer) on the server."""
    server = SteppedModelServer(timing, every_token=False)
    events = []
    for n, (at, prompt, output) in enumerate(asked):
        events += server.submit(str(n), prompt, output, at)
    while (change := server.next_change()) is not None:
        events += server.advance(change)
    first: dict[str, float] = {}
    for e in events:
        if e.kind in (EventKind.TOKENS, EventKind.FINISHED):
            first.setdefault(e.id, e.at)
    return first, {e.id: e.at for e in events if e.kind is EventKind.FINISHED}, server.preemptions


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
    rows = np.stack([request_row(p, o, 1e9, 0) for _, p, o in asked])
    got_first, got_end = np.zeros(len(asked)), np.zeros(len(asked))
    come = np.array([at for at, _, _ in asked])
    run(rows, come, constants(timing), 0.0, np.inf, got_first, got_end, scratch_for(len(asked)))
    assert got_first == pytest.approx([first[str(n)] for n in range(len(asked))], abs=1e-6)
    assert got_end == pytest.approx([ends[str(n)] for n in range(len(asked))], abs=1e-6)


def test_among_the_cases_are_some_in_which_memory_ran_out() -> None:
    assert sum(served(small(12_000), some(seed))[2] for seed in range(40)) > 20


@pytest.mark.parametrize("seed", range(5))
def test_what_is_compiled_is_what_stands_there(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain Python function, without numba, gives the same numbers."""
    asked = some(seed)
    rows = np.stack([request_row(p, o, 1e9, 0) for _, p, o in asked])
    come = np.array([at for at, _, _ in asked])
    compiled, s, scratch = np.zeros((2, len(asked))), constants(small(9_000)), scratch_for(len(asked))
    took = run(rows.copy(), come, s, 0.0, np.inf, compiled[0], compiled[1], scratch)
    for name in ("_step_s", "_steps_until", "_settle", "_insert", "_take_out"):
        monkeypatch.setattr(forward, name, getattr(forward, name).py_func)
    plain = np.zeros((2, len(asked)))
    in_python = run.py_func  # type: ignore[attr-defined]
    again = in_python(rows.copy(), come, s, 0.0, np.inf, plain[0], plain[1], scratch)
    assert again == pytest.approx(took, rel=1e-12)
    assert plain == pytest.approx(compiled, rel=1e-12)


def test_a_request_that_never_fits_ends_never_and_stops_nobody() -> None:
    rows = np.stack([request_row(20_000.0, 10.0, 1e9, 0), request_row(100.0, 10.0, 1e9, 0)])
    first, end = np.zeros(2), np.zeros(2)
    run(rows, np.zeros(2), constants(small(9_000)), 0.0, np.inf, first, end, scratch_for(2))
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
    rows = np.stack([request_row(p, o, 1e9, 0) for _, p, o in there])
    ask = request_row(new[1], new[2], 1e9, 0)
    got, own_first, own_end = price(rows, constants(timing), 0.0, ask, np.inf, ask, 10.0)
    # On the server the first began alone, here all three are there: part of a step.
    assert got == pytest.approx(wanted, rel=0.03)
    assert own_first == pytest.approx(first_with["3"], abs=0.15)
    assert own_end == pytest.approx(ends_with["3"], abs=0.15)


def test_who_is_expected_to_come_makes_a_crowded_server_dearer_and_not_an_idle_one_cheaper() -> None:
    ask = request_row(1000.0, 200.0, 1e9, 0)
    s = constants(A100)
    rows = np.stack([ask] * 20)
    alone, _, _ = price(rows, s, 0.0, ask, np.inf, ask, 10.0)
    crowd, _, _ = price(rows, s, 0.0, ask, 0.3, ask, 10.0)
    assert crowd > alone
    assert price(rows[:0], s, 0.0, ask, 0.3, ask, 10.0)[0] < price(rows, s, 0.0, ask, 0.3, ask, 10.0)[0]


# -- the load ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_a_load_that_is_told_everything_is_the_server(seed: int) -> None:
    """Requests and ends are told at once: after each, tokens made and memory held are the server's."""
    rng, timing = random.Random(seed), A100
    server, load, now = (
        SteppedModelServer(timing, every_token=False),
        PredictedLoad(LoadTable(), constants(A100), 1.0, 0.0),
        0.0,
    )
    for n in range(60):
        until = now + rng.expovariate(3.0)
        while (change := server.next_change()) is not None and change <= until:
            now = change
            for e in server.advance(now):
                if e.kind is EventKind.FINISHED:
                    load.remove(e.id, now)
        now = until
        prompt, output = rng.randint(10, 2000), rng.randint(2, 300)
        for e in server.submit(str(n), prompt, output, now):
            if e.kind is EventKind.FINISHED:
                load.remove(e.id, now)
        load.add(str(n), request_row(prompt, 1e9, 1e9, 0), now)
        load.age(now)
        assert len(load.ids) == server.running + server.waiting
        assert load.in_memory(now)[1] == pytest.approx(server.kv_tokens_used, abs=3.0 * len(load.ids) + 4200)


def predicted(now: float) -> PredictedLoad:
    """An A100 where nothing goes on."""
    return PredictedLoad(LoadTable(), constants(A100), 1.0, now)


def test_a_load_is_as_new_as_the_question_and_never_before_the_step_under_way() -> None:
    load = predicted(10.0)
    load.add("one", request_row(1500.0, 100.0, 1e9, 0), 10.0)
    load.age(10.0001)
    assert load.at > 10.1, "reading 1,500 tokens is one step"
    assert load.rows[0, UNREAD] == 0.0
    load.age(12.0)
    assert 12.0 <= load.at < 12.1
    assert load.rows[0, MADE] == pytest.approx((12.0 - 10.15) / 0.0088, rel=0.1)
    assert load.rows[0, HELD] == load.rows[0, MADE] + 1500.0


def test_nobody_ends_in_a_load_until_it_is_told() -> None:
    load = predicted(0.0)
    load.add("one", request_row(100.0, 5.0, 1e9, 0), 0.0)
    load.age(60.0)
    assert "one" in load.ids
    load.remove("one", 60.0)
    load.remove("one", 60.0)
    assert len(load.ids) == 0
    load.age(70.0)
    assert load.at == 70.0


def test_a_table_grows_with_its_requests_and_those_of_others_stay_what_they_are() -> None:
    loads = LoadTable()
    one, other = (PredictedLoad(loads, constants(A100), 1.0, 0.0) for _ in range(2))
    for n in range(500):
        for load, prompt in ((one, 10.0), (other, 20.0)):
            load.add(str(n), request_row(prompt + n, 5.0, 1e9, 0), 0.0)
    assert one.rows[:, PROMPT].tolist() == [10.0 + n for n in range(500)]
    assert other.rows[:, PROMPT].tolist() == [20.0 + n for n in range(500)]
    one.clear(5.0)
    assert (len(one.ids), one.at, len(other.ids)) == (0, 5.0, 500)


def test_the_place_of_an_instance_that_is_gone_is_given_to_another() -> None:
    """Ten thousand come and go in the memory of ten."""
    loads = LoadTable()
    for _ in range(1000):
        some = [PredictedLoad(loads, constants(A100), 1.0, 0.0) for _ in range(10)]
        for load in some:
            for n in range(40):
                load.add(str(n), request_row(10.0, 5.0, 1e9, 0), 0.0)
        for load in some:
            load.close()
    assert len(loads.servers) == 64
    assert len(loads.rows) <= 10 * 64 * 4


def test_the_best_is_the_one_with_the_least_price() -> None:
    """Whatever was dismissed at half the cost: in any order the same as by all prices."""
    rng, table = random.Random(5), np.full((1, BINS), 150.0)
    loads, usual, ask = LoadTable(), request_row(400.0, 100.0, 1e9, 0), request_row(700.0, 150.0, 1e9, 0)
    some = [PredictedLoad(loads, constants(rng.choice((A100, small(9_000)))), 1.0, 0.0) for _ in range(8)]
    for n in range(120):
        rng.choice(some).add(str(n), request_row(rng.randint(10, 1500), 100.0, 1e9, 0), 0.02 * n)
    for gap_s in (np.inf, 0.5):
        prices = []
        for load in some:
            load.age(5.0)
            expect(load.rows, table)
            here = loads.servers[load.place]
            prices.append(price(load.rows, here, load.at - 5.0, ask, gap_s, usual, 10.0)[0])
        for _ in range(20):
            order = rng.sample(range(8), 8)
            places = [some[i].place for i in order]
            best = loads.best(places, ask, None, usual, 1.0 / gap_s, table, 10.0, 512, 5.0)
            assert prices[order[best]] == pytest.approx(min(prices), rel=1e-9)


def test_of_many_requests_only_the_first_instances_are_run_forward_and_two_at_least() -> None:
    """The last is idle and would be the best."""
    loads, ask, lengths = LoadTable(), request_row(100.0, 50.0, 1e9, 0), np.full((1, BINS), 50.0)
    some = [PredictedLoad(loads, constants(A100), 1.0, 0.0) for _ in range(3)]
    for n in range(40):
        some[n % 2].add(str(n), request_row(1000.0, 100.0, 1e9, 0), 0.0)
    places = [load.place for load in some]
    for most, best in ((60, 2), (59, 1), (1, 1)):
        some[1].remove("1", 1.0)  # the second is better than the first
        assert loads.best(places, ask, None, ask, 0.0, lengths, 10.0, most, 1.0) == best


def test_where_as_many_run_as_may_no_memory_is_free() -> None:
    table = np.full((1, BINS), 100.0)
    for seqs, free in ((3.0, True), (2.0, False)):
        some = constants(A100)
        some[COL_MAX_SEQS] = seqs
        load = PredictedLoad(LoadTable(), some, 1.0, 0.0)
        for n in range(2):
            load.add(str(n), request_row(10.0, 100.0, 1e9, 0), 0.0)
        assert (load.room(table, 1.0, 0.0)[0] > 0.0) is free


def test_what_need_not_be_read_makes_an_instance_the_best() -> None:
    loads, ask = LoadTable(), request_row(3000.0, 50.0, 1e9, 0)
    some = [PredictedLoad(loads, constants(A100), 1.0, 0.0) for _ in range(3)]
    places, lengths = [load.place for load in some], np.full((1, BINS), 50.0)
    for n in range(3):
        cached = [2900.0 if i == n else 0.0 for i in range(3)]
        assert loads.best(places, ask, cached, ask, 0.0, lengths, 10.0, 512, 1.0) == n


def test_memory_of_those_who_may_have_ended_counts_less_the_longer_nothing_was_heard() -> None:
    table, free = np.full((1, BINS), 100.0), []
    for heard_at in (20.0, 18.0, 10.0):
        load = predicted(0.0)
        for n in range(10):
            load.add(str(n), request_row(1000.0, 100.0, 1e9, 0), 0.0)
        load.mark_reported(heard_at)
        free.append(load.room(table, 1.0, 20.0)[0])
    assert free == sorted(free)
    assert free[-1] > 1.02 * free[0]
