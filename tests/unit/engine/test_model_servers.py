"""The compiled servers do what the reference's do, to the last digit, and tell of it in the order of time."""

import random

import pytest

from engine.model_servers import ROWS, ModelServers
from engine.reference import EventKind, ServerEvent, SteppedModelServer
from engine.step_time_constants import Timing

SMALL = Timing("small", 10.0, 0.5, 1.0, 5.0, 20.0, 2.0, 900, max_seqs=12, step_tokens=256)
LARGE = Timing("large", 8.0, 0.1, 0.5, 12.0, 97.0, 2.3, 20_000, max_seqs=256, step_tokens=2048)
BOUND = Timing("bound", 15.6, 0.0, 30.5, 7.8, 15_625.0, 0.0, 300, max_seqs=6, step_tokens=128)

Told = list[tuple[str, float, float]]
"""(request, first token, end), as they ended."""


class Both:
    """A fleet of servers twice, given the same."""

    def __init__(self, timings: list[Timing]) -> None:
        self.plain = [SteppedModelServer(t, every_token=False) for t in timings]
        self.engines = ModelServers()
        self.numbers = [self.engines.add(t) for t in timings]
        self.names: dict[int, str] = {}  # who is where in the compiled one
        self.place: dict[str, tuple[int, int]] = {}
        self.firsts: dict[str, float] = {}
        self.plain_told: list[Told] = [[] for _ in timings]
        self.told: list[Told] = [[] for _ in timings]

    def hear_plain(self, server: int, events: list[ServerEvent]) -> None:
        for e in events:
            if e.kind is EventKind.TOKENS:
                self.firsts[e.id] = e.at
            elif e.kind is EventKind.FINISHED:
                self.plain_told[server].append((e.id, self.firsts.get(e.id, e.at), e.at))

    def hear(self, server: int, ended: int) -> None:
        while ended:
            name = self.names.pop(ended)
            first_at, at, following = self.engines.after(ended)
            self.told[server].append((name, first_at, at))
            self.engines.release(ended)
            del self.place[name]
            ended = following

    def play(self, until_s: float, *, every_change: bool = False) -> None:
        """Up to then, changes at that very time excepted."""
        before = float("-inf")
        while True:
            number, at, ended = self.engines.play(until_s, every_change)
            if not number:
                break
            assert at >= before
            before = at
            self.hear(self.numbers.index(number), ended)
        for server, plain in enumerate(self.plain):
            while (change := plain.next_change()) is not None and change < until_s:
                self.hear_plain(server, plain.advance(change))

    def submit(self, name: str, server: int, prompt: int, output: int, now: float) -> None:
        request, ended = self.engines.submit(self.numbers[server], prompt, output, now)
        self.hear(server, ended)
        self.names[request], self.place[name] = name, (server, request)
        self.hear_plain(server, self.plain[server].submit(name, prompt, output, now))

    def cancel(self, name: str, now: float) -> None:
        server, request = self.place[name]
        self.hear(server, self.engines.look(self.numbers[server], now)[0])
        self.hear_plain(server, self.plain[server].advance(now))
        if name in self.place:
            self.engines.cancel(request, self.numbers[server], now)
            del self.place[name], self.names[request]
        self.plain[server].cancel(name, now)

    def look(self, server: int, now: float) -> None:
        ended, *says = self.engines.look(self.numbers[server], now)
        self.hear(server, ended)
        plain = self.plain[server]
        self.hear_plain(server, plain.advance(now))
        assert says == [
            plain.running,
            plain.waiting,
            plain.prompt_tokens_total,
            plain.generation_tokens_total,
        ]
        assert self.engines.kv_tokens_used(self.numbers[server]) == plain.kv_tokens_used
        assert self.engines.made_tokens(self.numbers[server]) == plain.generation_tokens_total


@pytest.mark.parametrize("seed", range(30))
def test_first_tokens_and_ends_are_those_of_the_plain_server(seed: int) -> None:
    rng = random.Random(seed)
    timings = [rng.choice([SMALL, LARGE, BOUND]) for _ in range(3)]
    both = Both(timings)
    rate = rng.choice([0.5, 8.0, 60.0])
    now = 0.0
    for n in range(400):
        now += rng.expovariate(rate) if rng.random() < 0.9 else 0.0
        both.play(now, every_change=seed % 2 == 0)
        what = rng.random()
        server = rng.randrange(3)
        if what < 0.1 and both.place:
            both.cancel(rng.choice(list(both.place)), now)
        elif what < 0.3:
            both.look(server, now)
        else:
            prompt = rng.randint(1, rng.choice([20, timings[server].kv_tokens - 70]))
            output = rng.choice([1, 2, rng.randint(3, 70), rng.randint(40, 70)])
            both.submit(str(n), server, prompt, output, now)
        assert both.told == both.plain_told
    both.play(1e9)
    assert both.told == both.plain_told
    assert not both.names
    if SMALL in timings and rate > 1.0:
        assert sum(server.preemptions for server in both.plain) > 0


def test_of_changes_at_once_the_one_known_first_goes_first() -> None:
    engines = ModelServers()
    one, other = engines.add(SMALL), engines.add(SMALL)
    engines.submit(other, 10, 1, 0.0)
    engines.submit(one, 10, 1, 0.0)
    assert [engines.play(1.0, every_change=False)[0] for _ in range(2)] == [other, one]


def test_what_would_not_fit_is_refused_and_changes_nothing() -> None:
    engines = ModelServers()
    server = engines.add(BOUND)
    for prompt, output in ((0, 1), (1, 0), (300, 1)):
        with pytest.raises(ValueError, match="fit the KV memory"):
            engines.submit(server, prompt, output, 0.0)
    assert engines.look(server, 0.0) == (0, 0, 0, 0, 0)


def test_nothing_comes_from_a_frozen_server_until_it_thaws() -> None:
    engines = ModelServers()
    server = engines.add(SMALL)
    request, _ = engines.submit(server, 10, 1, 0.0)
    engines.freeze(server, frozen=True)
    assert engines.play(10.0, every_change=False) == (0, 10.0, 0)
    engines.freeze(server, frozen=False)
    where, at, ended = engines.play(10.0, every_change=False)
    assert (where, ended) == (server, request)
    assert at == engines.after(ended)[1] < 1.0


def test_tables_grow_and_rows_are_used_again() -> None:
    engines = ModelServers()
    servers = [engines.add(SMALL) for _ in range(2 * ROWS)]
    for server in servers:
        engines.submit(server, 10, 2, 0.0)
    ends = 0
    while (played := engines.play(100.0, every_change=False))[0]:
        engines.release(played[2])
        ends += 1
    assert ends == 2 * ROWS
    gone = servers.pop()
    engines.remove(gone)
    assert engines.add(LARGE) == gone
    assert engines.look(gone, 100.0) == (0, 0, 0, 0, 0)
