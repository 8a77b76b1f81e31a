"""The model server in time: hand-computed steps, and what holds for any traffic."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from errors import ConfigError
from localcloud.market import GPUS
from profiles import PROFILES
from simulation.timing import (
    PROFILE_MODELS,
    TIMINGS,
    Event,
    Kind,
    ModelServer,
    Timing,
    read_timings,
    timing_for,
)

# 10 ms a step, 1 ms a request in it, 1 ms for 1,000 tokens of context; 5 ms a prompt, 20 ms for 1,000
# tokens of it, and 2 ms for their square.
EASY = Timing("easy", a=10.0, b=1.0, c=1.0, d=5.0, e=20.0, f=2.0, kv_tokens=10_000)
SMALL = Timing("small", a=10.0, b=0.0, c=0.0, d=10.0, e=0.0, f=0.0, kv_tokens=100)


def run_dry(server: ModelServer, look: Callable[[ModelServer], float | None]) -> list[Event]:
    """All events until it is idle, looking when `look` says."""
    events = []
    while (at := look(server)) is not None:
        events += server.advance(at)
        assert server.kv_tokens_used <= server.timing.kv_tokens
    return events


def by_request(events: list[Event]) -> dict[str, tuple[int, float]]:
    """id: (tokens it got, when it ended)."""
    tokens: Counter[str] = Counter()
    ended = {}
    for e in events:
        tokens[e.id] += e.tokens
        if e.kind is Kind.FINISHED:
            ended[e.id] = e.at
    return {id: (tokens[id], ended[id]) for id in ended}


# -- by hand ---------------------------------------------------------------------------------------------


def test_one_request_takes_its_prefill_and_then_a_step_a_token() -> None:
    server = ModelServer(EASY)
    assert server.submit("r", 1000, 3, 100.0) == [Event(100.0, "r", Kind.ADMITTED)]
    first = 100.0 + 0.005 + 0.020 + 0.002
    assert server.next_event() == pytest.approx(first)
    second = first + 0.010 + 0.001 + 0.001001  # 1,001 tokens of context
    third = second + 0.010 + 0.001 + 0.001002
    events = run_dry(server, ModelServer.next_event)
    assert [(e.id, e.kind, e.tokens) for e in events] == [
        ("r", Kind.TOKENS, 1),
        ("r", Kind.TOKENS, 1),
        ("r", Kind.FINISHED, 1),
    ]
    assert [e.at for e in events] == pytest.approx([first, second, third])
    assert (server.running, server.waiting, server.kv_tokens_used) == (0, 0, 0)
    assert (server.prompt_tokens_total, server.generation_tokens_total) == (1000, 3)


def test_who_comes_during_a_step_is_read_in_the_next_one_together_with_the_tokens_of_the_others() -> None:
    server = ModelServer(EASY)
    server.submit("a", 1000, 10, 0.0)
    server.submit("b", 500, 10, 0.001)
    assert (server.running, server.waiting) == (1, 1)
    (token, admitted) = server.advance(0.027)
    assert (token.id, token.tokens) == ("a", 1)
    assert admitted == Event(token.at, "b", Kind.ADMITTED)
    # max(a, d) + b + c*1.001 + e*0.5 + f*0.25
    assert server.next_event() == pytest.approx(0.027 + 0.010 + 0.001 + 0.001001 + 0.010 + 0.0005)


def test_a_prompt_longer_than_a_step_is_read_in_parts_and_costs_the_same_square() -> None:
    server = ModelServer(EASY, max_seqs=4, step_tokens=600)
    server.submit("r", 1000, 1, 0.0)
    assert server.next_event() == pytest.approx(0.005 + 0.012 + 0.00072)
    (end,) = run_dry(server, ModelServer.next_event)
    assert end.at == pytest.approx(0.005 + 0.012 + 0.00072 + 0.005 + 0.008 + 0.00128)


def test_a_step_is_never_faster_than_its_tokens_can_be_computed() -> None:
    slow = Timing("slow", a=1.0, b=0.0, c=1.0, d=1.0, e=100.0, f=0.0, kv_tokens=10_000)
    assert slow.step_ms(50, 0) == 5.0
    assert slow.step_ms(50, 4500) == 5.5
    server = ModelServer(slow)
    for i in range(2):
        server.submit(str(i), 1, 200, 0.0)
    seldom = by_request(run_dry(server, ModelServer.next_change))
    # The second is read alone with one token of the first; then two tokens a step: 2 ms are bound to 0.2 ms
    # of computation, so it is the context that grows.
    now, made, context = 0.0, [0, 0], [0, 0]
    while made != [200, 200]:
        batch = [i for i in (0, 1) if 0 < made[i] < 200]
        reading = [i for i in (0, 1) if made[i] == 0 and (i == 0 or made[0] > 0)]
        now += slow.step_ms(len(batch), sum(context[i] for i in batch), len(reading), len(reading)) / 1e3
        for i in batch + reading:
            made[i] += 1
            context[i] = 1 + made[i]
    assert seldom["1"][1] == pytest.approx(now)


def test_a_bound_step_grows_again_once_the_context_takes_longer() -> None:
    bound = Timing("bound", a=1.0, b=0.0, c=10.0, d=1.0, e=3000.0, f=0.0, kv_tokens=10_000)
    server = ModelServer(bound)
    server.submit("r", 1, 400, 0.0)
    now = bound.prefill_ms(1) / 1e3
    for made in range(1, 400):
        now += bound.step_ms(1, 1 + made) / 1e3
    tokens, ended = by_request(run_dry(server, ModelServer.next_change))["r"]
    assert tokens == 400
    assert ended == pytest.approx(now)


# -- memory ----------------------------------------------------------------------------------------------


def test_without_memory_for_it_the_next_waits_and_nobody_overtakes_it() -> None:
    server = ModelServer(SMALL)
    server.submit("large", 60, 5, 0.0)
    server.submit("larger", 70, 5, 0.0)
    server.submit("tiny", 1, 1, 0.0)
    events = run_dry(server, ModelServer.next_event)
    admitted = [(e.id, round(e.at, 6)) for e in events if e.kind is Kind.ADMITTED]
    assert admitted == [("larger", 0.050), ("tiny", 0.050)]


def test_out_of_memory_the_last_to_come_is_put_back_and_still_gets_exactly_what_it_asked_for() -> None:
    server = ModelServer(SMALL)
    server.submit("old", 40, 50, 0.0)
    server.submit("new", 40, 50, 0.0)
    events = run_dry(server, ModelServer.next_event)
    assert [e.id for e in events if e.kind is Kind.PREEMPTED] == ["new"]
    assert [e.id for e in events if e.kind is Kind.ADMITTED] == ["new", "new"]
    ends = by_request(events)
    assert {id: tokens for id, (tokens, _) in ends.items()} == {"old": 50, "new": 50}
    assert ends["old"][1] < ends["new"][1]
    assert server.preemptions == 1
    assert server.prompt_tokens_total == 80  # reading it again is not counted again
    assert server.generation_tokens_total == 100


def test_what_was_put_back_is_admitted_before_all_who_wait() -> None:
    server = ModelServer(SMALL)
    server.submit("old", 40, 50, 0.0)
    server.submit("new", 40, 50, 0.0)
    server.submit("later", 40, 50, 0.0)
    events = run_dry(server, ModelServer.next_event)
    # "new" is put back for "old", later on "later" for "new".
    assert [e.id for e in events if e.kind is Kind.ADMITTED] == ["new", "new", "later", "later"]
    assert [e.id for e in events if e.kind is Kind.FINISHED] == ["old", "new", "later"]


def test_what_can_never_fit_or_is_under_way_already_is_refused_and_changes_nothing() -> None:
    server = ModelServer(SMALL)
    server.submit("r", 10, 10, 0.0)
    before = server.next_event()
    for id, prompt, output in (("big", 60, 41), ("r", 1, 1), ("none", 0, 1), ("mute", 1, 0)):
        with pytest.raises(ValueError, match=f"request {id}"):
            server.submit(id, prompt, output, 5.0)
    assert (server.running, server.waiting, server.next_event()) == (1, 0, before)
    with pytest.raises(ValueError, match="max_seqs"):
        ModelServer(SMALL, max_seqs=3000)


def test_no_more_requests_than_allowed_run_at_once() -> None:
    server = ModelServer(EASY, max_seqs=2)
    for i in range(5):
        server.submit(str(i), 10, 3, 0.0)
    most = 0
    while (at := server.next_event()) is not None:
        server.advance(at)
        most = max(most, server.running)
    assert most == 2


# -- cancelling ------------------------------------------------------------------------------------------


def test_a_cancelled_request_frees_its_memory_at_once_and_says_nothing_more() -> None:
    server = ModelServer(SMALL)
    server.submit("goes", 80, 10, 0.0)
    server.submit("waits", 80, 2, 0.0)
    server.submit("goes too", 10, 1, 0.0)
    server.cancel("goes too", 0.004)
    events = server.cancel("goes", 0.005)
    assert events == [Event(0.005, "waits", Kind.ADMITTED)]
    assert (server.running, server.waiting, server.kv_tokens_used) == (1, 0, 81)
    events = run_dry(server, ModelServer.next_event)
    assert {e.id for e in events} == {"waits"}
    assert server.cancel("waits", 1.0) == []
    assert server.kv_tokens_used == 0


def test_the_others_get_their_tokens_when_the_step_ends_that_was_under_way() -> None:
    server = ModelServer(EASY)
    server.submit("a", 100, 50, 0.0)
    server.submit("b", 100, 50, 0.0)
    server.advance(server.next_event() or 0.0)
    server.advance(server.next_event() or 0.0)
    due = server.next_event()
    assert due is not None
    server.cancel("b", due - 0.001)
    (token,) = server.advance(due)
    assert (token.at, token.id, token.tokens) == (due, "a", 1)


# -- whatever the traffic --------------------------------------------------------------------------------


def traffic(seed: int) -> Iterator[tuple[float, str, int, int, float | None]]:
    """(when, id, prompt, output, when it is cancelled) of 60 requests that do not fit at once."""
    rng = random.Random(seed)
    now = 0.0
    for i in range(60):
        now += rng.expovariate(20.0)
        cancelled = now + rng.random() if rng.random() < 0.2 else None
        yield now, f"r{i}", rng.randint(1, 900), rng.randint(1, 200), cancelled


def played(seed: int, look_every_s: float | None, timing: Timing) -> tuple[list[Event], ModelServer]:
    """Everything that happened; looked at every so often beside what had to be done, or not at all."""
    server = ModelServer(timing, max_seqs=16, step_tokens=512)
    acts: list[tuple[float, int, str, int, int]] = []
    for at, id, prompt, output, cancelled in traffic(seed):
        acts.append((at, 0, id, prompt, output))
        if cancelled is not None:
            acts.append((cancelled, 1, id, 0, 0))
    if look_every_s is not None:
        acts += [(k * look_every_s, 2, "", 0, 0) for k in range(int(60 / look_every_s))]
    events = []
    for at, what, id, prompt, output in sorted(acts):
        if what == 0:
            events += server.submit(id, prompt, output, at)
        elif what == 1:
            events += server.cancel(id, at)
        else:
            events += server.advance(at)
        assert 0 <= server.kv_tokens_used <= timing.kv_tokens
    return events + server.advance(1e6), server


TIGHT = Timing("tight", a=8.0, b=0.1, c=0.5, d=9.0, e=60.0, f=2.0, kv_tokens=2_500)


@pytest.mark.parametrize("seed", range(8))
def test_no_request_is_lost_and_each_gets_exactly_its_tokens(seed: int) -> None:
    events, server = played(seed, None, TIGHT)
    got = by_request(events)
    for _, id, _, output, cancelled in traffic(seed):
        if cancelled is None:
            assert got[id][0] == output
        elif id in got:
            assert got[id][0] == output
            assert got[id][1] <= cancelled
    assert (server.running, server.waiting, server.kv_tokens_used) == (0, 0, 0)
    assert server.next_event() is server.next_change() is None
    assert server.preemptions > 0
    assert sorted(e.at for e in events) == [e.at for e in events]


@pytest.mark.parametrize("seed", range(8))
def test_looking_often_or_seldom_gives_the_same_answer_to_the_last_digit(seed: int) -> None:
    seldom, a = played(seed, None, TIGHT)
    often, b = played(seed, 0.0031, TIGHT)
    assert by_request(seldom) == by_request(often)
    assert [e for e in seldom if e.kind is not Kind.TOKENS and e.kind is not Kind.FINISHED] == [
        e for e in often if e.kind is not Kind.TOKENS and e.kind is not Kind.FINISHED
    ]
    assert len(seldom) < len(often)
    assert (a.preemptions, a.generation_tokens_total, a.prompt_tokens_total) == (
        b.preemptions,
        b.generation_tokens_total,
        b.prompt_tokens_total,
    )


@pytest.mark.parametrize("seed", range(4))
def test_new_requests_are_admitted_in_the_order_they_came(seed: int) -> None:
    events, _ = played(seed, None, TIGHT)
    first = list(dict.fromkeys(e.id for e in events if e.kind is Kind.ADMITTED))
    assert first == sorted(first, key=lambda id: int(id[1:]))


def test_the_same_traffic_gives_the_same_events() -> None:
    assert played(3, None, TIGHT)[0] == played(3, None, TIGHT)[0]


def test_a_long_answer_alone_is_one_event_and_not_one_a_token() -> None:
    server = ModelServer(timing_for("vllm-13", "A100 SXM4"))
    server.submit("r", 1000, 50_000, 0.0)
    assert [e.tokens for e in server.advance(1e6)] == [1, 49_999]


# -- the constants ---------------------------------------------------------------------------------------


def test_the_rows_are_those_of_the_notes() -> None:
    t = timing_for("vllm-13", "RTX 4090")
    # 13B AWQ on a 4090 alone: 99 tokens/s by the notes' own model, 96.7 to 113.5 published.
    assert 1e3 / t.step_ms(1, 100) == pytest.approx(99, abs=1.0)
    assert timing_for("vllm-70", "RTX A6000", 2).name == "70B awq4 on 2x RTX A6000"
    assert timing_for("vllm-70", "A100 SXM4", 2).kv_tokens == 313_000
    # A server reads prompts slower than its kernels measured alone.
    assert timing_for("vllm-13", "A100 SXM4").prefill_ms(1000) == pytest.approx(12.6 + 96.9 * 1.2 + 2.27)


@pytest.mark.parametrize(
    ("profile", "gpu", "num_gpus", "taken"),
    [
        ("vllm-70", "A100 SXM4", 4, "70B awq4 on 2x A100 SXM4"),  # more than known: the most known
        ("vllm-13", "RTX 3090", 2, "13B awq4 on 1x RTX 3090"),
        ("vllm-70", "RTX 3090", 2, "70B awq4 on 1x RTX A6000"),  # fewer than known: the slowest
        ("vllm-13", "Tesla V100", 1, "13B awq4 on 1x RTX A6000"),
        ("mine", "L40S", 1, "13B awq4 on 1x L40S"),
    ],
)
def test_without_a_row_too_little_is_promised_rather_than_too_much(
    profile: str, gpu: str, num_gpus: int, taken: str
) -> None:
    assert timing_for(profile, gpu, num_gpus).name == taken


def test_each_profile_has_rows_and_each_row_holds_its_longest_request() -> None:
    for name, model in PROFILE_MODELS.items():
        p = PROFILES[name]
        rows = [t for key, t in TIMINGS.items() if key[:2] == model]
        assert rows
        assert all(t.kv_tokens >= p.max_model_len for t in rows)
    assert {key[2] for key in TIMINGS} == set(GPUS)
    assert PROFILES.keys() - PROFILE_MODELS.keys() == {"tiny"}, "that runs on a processor"


# -- what a simulator is told ----------------------------------------------------------------------------


def play(every_token: bool, seed: int) -> tuple[list[Event], ModelServer]:
    """A random life with little memory, cancels and odd looks."""
    rng = random.Random(seed)
    kv_tokens = rng.choice([1000, 2000, 5000, 50_000])
    timing = Timing("t", 10.0, 0.5, 1.0, 5.0, 20.0, 2.0, kv_tokens, max_seqs=40, step_tokens=512)
    server = ModelServer(timing, every_token=every_token)
    now = 0.0
    events: list[Event] = []
    ids: list[str] = []
    for n in range(300):
        now += rng.expovariate(8.0)
        what = rng.random()
        if what < 0.1 and ids:
            events += server.cancel(rng.choice(ids), now)
        elif what < 0.2:
            events += server.advance(now)
        else:
            prompt, output = rng.randint(1, 900), rng.randint(1, 60)
            if prompt + output <= kv_tokens:
                events += server.submit(str(n), prompt, output, now)
                ids.append(str(n))
    return events + run_dry(server, ModelServer.next_change), server


@pytest.mark.parametrize("seed", range(12))
def test_who_is_not_told_of_every_token_still_hears_of_the_first_and_of_the_end_at_the_same_time(
    seed: int,
) -> None:
    def firsts(events: list[Event]) -> dict[str, float]:
        found: dict[str, float] = {}
        for e in events:
            if e.tokens:
                found.setdefault(e.id, e.at)
        return found

    def without_tokens(events: list[Event]) -> list[tuple[float, str, Kind]]:
        return [(e.at, e.id, e.kind) for e in events if e.kind is not Kind.TOKENS]

    told, plain = play(every_token=True, seed=seed)
    brief, server = play(every_token=False, seed=seed)
    assert firsts(told) == firsts(brief)
    assert without_tokens(told) == without_tokens(brief)
    ended = {e.id for e in brief if e.kind is Kind.FINISHED}
    tokens = {id: sum(e.tokens for e in told if e.id == id) for id in ended}
    assert tokens == {id: sum(e.tokens for e in brief if e.id == id) for id in ended}
    for name in ("prompt_tokens_total", "generation_tokens_total", "preemptions", "kv_tokens_used"):
        assert getattr(server, name) == getattr(plain, name)
    assert len(brief) < len(told)


# -- constants of one's own ------------------------------------------------------------------------------

OWN: dict[str, object] = {
    "model": "13B", "quantization": "awq4", "gpu": "RTX 5090", "num_gpus": 1,
    "a": 6.0, "b": 0.05, "c": 0.6, "d": 6.0, "e": 110.0, "f": 3.5, "kv_tokens": 25_000,
}  # fmt: skip


def test_own_constants_go_before_those_of_the_table(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps([OWN, OWN | {"gpu": "L40S", "max_seqs": 64}]))
    own = read_timings(path)
    assert timing_for("vllm-13", "RTX 5090", 1, own).a == 6.0
    assert timing_for("vllm-13", "L40S", 1, own).max_seqs == 64
    assert timing_for("vllm-13", "L40S", 1).a == TIMINGS["13B", "awq4", "L40S", 1].a


@pytest.mark.parametrize(
    ("entry", "wrong"),
    [
        (OWN | {"a": "fast"}, "entry 0: a: wanted 0 to 1e6 ms, got 'fast'"),
        (OWN | {"kv_tokens": 0}, "entry 0: kv_tokens: wanted a whole number of 1 or more, got 0"),
        (OWN | {"max_seqs": 4096}, "entry 0: max_seqs: wanted at most step_tokens, 2048, got 4096"),
        (OWN | {"speed": 1}, "entry 0: unknown field 'speed'"),
        ({k: v for k, v in OWN.items() if k != "gpu"}, "entry 0: gpu: wanted text, got None"),
        (7, "entry 0: wanted an object, got 7"),
    ],
)
def test_wrong_constants_are_refused_with_file_entry_and_field(
    tmp_path: Path, entry: object, wrong: str
) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps([entry]))
    with pytest.raises(ConfigError) as refused:
        read_timings(path)
    assert str(refused.value) == f"{path}: {wrong}"
