"""Rules of others for choosing a server walk through cases computed by hand; the world loses nobody."""

import random
from collections.abc import Sequence
from itertools import count
from typing import Any

import pytest

from bench.dispatch.rules.clairvoyant import Clairvoyant, ClairvoyantHere, ClairvoyantWhole
from bench.dispatch.rules.dynamo import DynamoKv
from bench.dispatch.rules.epp import Epp
from bench.dispatch.rules.ours import Ours, hashes
from bench.dispatch.rules.plain import InstanceAware, LeastInFlight, PowerOfTwo, Random, RoundRobin
from bench.dispatch.rules.registry import RULES
from bench.dispatch.rules.rule import (
    BLOCK_TOKENS,
    DispatchRequest,
    DispatchRule,
    Index,
    ServerFleet,
    ServerReport,
)
from bench.dispatch.rules.smg import CacheAwareNew, CacheAwareOld, LeastLoad, LMetric
from bench.dispatch.rules.vast import VastQueueTime
from bench.dispatch.rules.world import Dispatcher, DispatchWorld, RuleRouter, has_room, quantiles
from engine.reference import EventKind, SteppedModelServer
from engine.step_time_constants import Timing

SLOW = Timing("slow", 20.0, 0.1, 0.5, 10.0, 100.0, 2.0, 20_000)
FAST = Timing("fast", 10.0, 0.05, 0.25, 5.0, 40.0, 1.0, 20_000, 512, 4096)


NUMBERS = count(100)


def fleet(n: int = 3, **told: Any) -> ServerFleet:
    """So many equal servers that serve one request and make 100 tokens a second."""
    return ServerFleet(
        [SLOW] * n, told.pop("requests_s", [1.0] * n), told.pop("tokens_s", [100.0] * n), **told
    )


def a_rule(kind: type[DispatchRule], n: int = 3, **told: Any) -> Any:
    return kind(fleet(n, **told), random.Random(0))


def request(
    number: int = 0, prompt: int = 1000, output: int = 100, blocks: Sequence[int] = (), at: float = 0.0
) -> DispatchRequest:
    return DispatchRequest(number, at, prompt, output, blocks)


def given(rule: DispatchRule, *servers: int, **of: Any) -> list[DispatchRequest]:
    """These servers are given a request each."""
    out = []
    for server in servers:
        one = request(next(NUMBERS), **of)
        one.server = server
        rule.sent(one, server, 0.0)
        out.append(one)
    return out


def told(rule: DispatchRule, server: int, **said: Any) -> None:
    """The server reports; what is not said is nothing."""
    usual: dict[str, Any] = dict.fromkeys(ServerReport._fields, 0)
    rule.report(server, ServerReport(**{**usual, **said}))


def choices(
    rule: DispatchRule, times: int = 60, among: Sequence[int] = (0, 1, 2), **of: Any
) -> set[int | None]:
    """All that it may answer."""
    return {rule.choose(request(**of), among, 0.0) for _ in range(times)}


# -- plain -----------------------------------------------------------------------------------------------


def test_round_robin_takes_one_after_the_other_and_passes_over_who_may_not_be_chosen() -> None:
    rule = a_rule(RoundRobin)
    assert [rule.choose(request(), (0, 1, 2), 0.0) for _ in range(4)] == [0, 1, 2, 0]
    assert [rule.choose(request(), (0, 2), 0.0) for _ in range(3)] == [2, 0, 2]


def test_random_takes_any_that_may_be_chosen() -> None:
    assert choices(a_rule(Random)) == {0, 1, 2}
    assert choices(a_rule(Random), among=(2,)) == {2}


def test_power_of_two_never_takes_the_fullest_of_three_and_sometimes_not_the_emptiest() -> None:
    rule = a_rule(PowerOfTwo)
    given(rule, 0, 1, 1)  # 1, 2, 0 in flight
    assert choices(rule) == {0, 2}
    assert choices(rule, among=(1,)) == {1}


def test_least_in_flight_counts_what_it_gave_and_goes_round_among_equals() -> None:
    rule = a_rule(LeastInFlight)
    assert [rule.choose(request(), (0, 1, 2), 0.0) for _ in range(4)] == [0, 1, 2, 0]
    first, _ = given(rule, 0, 1)
    assert choices(rule) == {2}
    given(rule, 2)
    rule.ended(first, 0, 1.0)
    assert choices(rule) == {0}


def test_instance_aware_divides_by_what_the_gpu_serves() -> None:
    rule = a_rule(InstanceAware, requests_s=[1.0, 4.0, 2.0])
    given(rule, 0, 1, 1, 1, 2)  # 1/1, 3/4, 1/2
    assert choices(rule) == {2}
    given(rule, 2)  # 2/2
    assert choices(rule) == {1}


# -- Vast ------------------------------------------------------------------------------------------------


def test_vast_takes_the_least_cost_in_flight_over_measured_tokens_and_holds_over_30_s() -> None:
    rule = a_rule(VastQueueTime, tokens_s=[100.0, 200.0, 50.0])
    given(rule, 0, 1, 2, output=1024)
    assert [rule.queue_s(server) for server in range(3)] == [10.24, 5.12, 20.48]
    assert choices(rule) == {1}
    given(rule, 1, output=1024)
    given(rule, 1, output=1024)
    assert rule.queue_s(1) == 15.36
    assert choices(rule) == {0}
    full = given(rule, 0, 1, 2, output=4096)
    assert choices(rule) == {None}
    rule.ended(full[1], 1, 1.0)
    assert choices(rule) == {1}


# -- SMG -------------------------------------------------------------------------------------------------


def test_smg_least_load_adds_what_was_sent_since_the_report_and_a_barrier_at_full_memory() -> None:
    rule = a_rule(LeastLoad)
    for server, (queued, use) in enumerate([(1000, 0.5), (0, 0.9), (3000, 0.0)]):
        told(rule, server, at=1.0, waiting_tokens=queued, kv_use=use)
    # 1000/2000 + 0.15 * 1, 0 + 0.15 * 9, 3000/2000
    assert [rule.score(server) for server in range(3)] == pytest.approx([0.65, 1.35, 1.5])
    given(rule, 0, prompt=2000)
    assert rule.score(0) == pytest.approx(1.65)
    assert choices(rule) == {1}
    told(rule, 0, at=2.0, waiting_tokens=1000, kv_use=0.5, made_total=500)
    # 500 tokens a second since the report before: 1000/500 + 0.15.
    assert rule.score(0) == pytest.approx(2.15)


def test_smg_least_load_goes_by_what_is_in_flight_until_a_report_comes() -> None:
    rule = a_rule(LeastLoad)
    given(rule, 0, 1)
    assert rule.score(0) == 1024 / 2000
    assert choices(rule) == {2}


def test_smg_least_load_takes_a_rate_over_a_second_however_often_it_is_told() -> None:
    rule = a_rule(LeastLoad)
    for tenth in range(11):
        told(rule, 0, at=tenth / 10, made_total=40 * tenth, waiting_tokens=800)
    assert rule.score(0) == pytest.approx(800 / 400)


BLOCKS = tuple(range(4))
PREFIXED: dict[str, Any] = {"prompt": 4 * BLOCK_TOKENS, "blocks": BLOCKS}


@pytest.mark.parametrize("kind", [CacheAwareOld, CacheAwareNew])
def test_cache_aware_takes_who_has_over_a_third_of_the_prompt_else_the_emptiest(
    kind: type[DispatchRule],
) -> None:
    rule = a_rule(kind)
    given(rule, 1, **PREFIXED)
    given(rule, 0, 0, 1, 1)
    assert choices(rule, **PREFIXED) == {1}
    assert choices(rule) == {2}
    # One of four blocks is a quarter, which is less than 0.3.
    assert choices(rule, prompt=4 * BLOCK_TOKENS, blocks=(0, 7, 8, 9)) == {2}
    assert choices(rule, among=(0, 2), **PREFIXED) == {2}


def test_old_cache_aware_balances_first_once_the_fullest_has_64_more_and_half_as_many_again() -> None:
    rule = a_rule(CacheAwareOld)
    given(rule, 1, **PREFIXED)
    given(rule, *[1] * 63)
    assert choices(rule, **PREFIXED) == {1}  # 64 against 0
    given(rule, 1)
    assert choices(rule, **PREFIXED) == {0}  # 65
    given(rule, *[0] * 130, *[1] * 130, *[2] * 130)
    assert choices(rule, **PREFIXED) == {1}  # 195 is not over 1.5 * 130


def test_new_cache_aware_spills_only_from_a_holder_far_above_the_mean() -> None:
    rule = a_rule(CacheAwareNew)
    given(rule, 1, **PREFIXED)
    given(rule, *[1] * 95)
    assert choices(rule, **PREFIXED) == {1}  # 96: the mean is 32, and 32 + 64 is not exceeded
    given(rule, 1, 1)
    assert choices(rule, **PREFIXED) == {0, 2}  # 98 > 32.7 + 64


def test_new_cache_aware_takes_the_emptiest_of_those_who_have_the_longest_prefix() -> None:
    rule = a_rule(CacheAwareNew)
    given(rule, 0, 1, **PREFIXED)
    given(rule, 0)
    assert choices(rule, **PREFIXED) == {1}


def test_lmetric_multiplies_new_tokens_by_the_batch() -> None:
    rule = a_rule(LMetric)
    given(rule, 1, prompt=2 * BLOCK_TOKENS, blocks=BLOCKS[:2])
    given(rule, 0, 1, 2)
    # 2048 * 2, 1024 * 3, 2048 * 2
    assert choices(rule, **PREFIXED) == {1}
    given(rule, 1)  # 1024 * 4: a tie, and the others have the lesser load
    assert choices(rule, **PREFIXED) == {0, 2}


# -- Dynamo, llm-d ---------------------------------------------------------------------------------------


def test_dynamo_adds_blocks_to_read_and_blocks_that_are_held() -> None:
    rule = a_rule(DynamoKv)
    (one,) = given(rule, 0, prompt=1600)
    given(rule, 1, prompt=800)
    # (unread + 800) / 16 + blocks of those active
    assert [rule.cost(request(prompt=800), server) for server in range(3)] == [250.0, 150.0, 50.0]
    rule.first_token(one, 0, 1.0)
    assert rule.cost(request(prompt=800), 0) == 150.0
    rule.ended(one, 0, 2.0)
    assert rule.cost(request(prompt=800), 0) == 50.0
    assert choices(rule, prompt=800) == {0, 2}


def test_dynamo_knows_what_a_server_has_cached() -> None:
    rule = a_rule(DynamoKv)
    rule.fleet.live.extend(SteppedModelServer(SLOW) for _ in range(3))
    rule.fleet.live[1].submit("x", 1024, 1, 0.0, (0, 1), BLOCK_TOKENS)
    rule.fleet.live[1].advance(10.0)
    # 2048 tokens are 128 blocks, 64 of them cached.
    assert [rule.cost(request(**PREFIXED), server) for server in range(3)] == [128.0, 64.0, 128.0]
    given(rule, 1, **PREFIXED)
    assert rule.cost(request(**PREFIXED), 1) == 64.0 + 64.0 + 128.0


def test_dynamo_holds_while_all_have_sixteen_batches_to_read() -> None:
    rule = a_rule(DynamoKv, 2)
    given(rule, 0, 1, prompt=16 * 2048)
    assert choices(rule, among=(0, 1)) == {0, 1}
    (last,) = given(rule, 0, prompt=1)
    given(rule, 1, prompt=1)
    assert choices(rule, among=(0, 1)) == {None}
    rule.first_token(last, 0, 1.0)
    assert 0 in choices(rule, among=(0, 1))


def test_epp_weighs_queue_memory_and_prefix_two_two_three() -> None:
    rule = a_rule(Epp)
    told(rule, 0, waiting=4, kv_use=0.2)
    told(rule, 1, waiting=1, kv_use=0.9)
    told(rule, 2, waiting=0, kv_use=0.5)
    # 2*0 + 2*0.8, 2*0.75 + 2*0.1, 2*1 + 2*0.5
    assert choices(rule) == {2}
    given(rule, 0, prompt=2 * BLOCK_TOKENS, blocks=BLOCKS[:2])
    assert choices(rule, **PREFIXED) == {0}  # 1.6 + 1.5 against 1.7 and 3.0
    told(rule, 0, waiting=4, kv_use=0.3)
    assert choices(rule, **PREFIXED) == {2}  # 2.9


def test_an_index_knows_the_longest_prefix_that_each_was_sent() -> None:
    index = Index(3)
    index.sent((1, 2, 3), 0)
    index.sent((1, 2), 2)
    assert index.matched((1, 2, 3, 4)) == [3, 0, 2]
    assert index.matched(()) == [0, 0, 0]


# -- the clairvoyant -------------------------------------------------------------------------------------


@pytest.mark.parametrize("timing", [SLOW, FAST], ids=lambda t: str(t.name))
@pytest.mark.parametrize("seed", range(8))
def test_the_clairvoyant_knows_to_the_microsecond_when_a_request_would_be_served(
    timing: Timing, seed: int
) -> None:
    """If nobody came after it: in queues, steps under way, prompts half read, and with too little memory."""
    rng = random.Random(seed)
    live = SteppedModelServer(timing, every_token=False)
    rule = ClairvoyantHere(ServerFleet([timing], [1.0], [100.0], live=[live]), rng)
    now, asked = 0.0, request(prompt=1500, output=200)
    for n in range(rng.randint(1, 60)):
        now += rng.expovariate(2.5)
        live.advance(now)
        rule.price(asked, 0, now)
        live.submit(str(n), rng.randint(1, 3000), rng.randint(1, 500), now)
    now += rng.random()
    live.advance(now)
    rule.weight, rule.others = 10.0, 0.0
    own = rule.price(asked, 0, now)
    live.submit("asked", 1500, 200, now)
    first = end = 0.0
    while (at := live.next_change()) is not None:
        for event in live.advance(at):
            if event.id == "asked" and event.kind in (EventKind.TOKENS, EventKind.FINISHED):
                first, end = (first, event.at) if event.kind is EventKind.FINISHED else (event.at, end)
    assert own == pytest.approx(end - now + 10.0 * (first - now), abs=1e-6)


def test_the_clairvoyant_goes_where_the_prompt_is_cached_and_counts_what_the_others_lose() -> None:
    live = [SteppedModelServer(SLOW, every_token=False) for _ in range(2)]
    rule = Clairvoyant(ServerFleet([SLOW] * 2, [1.0] * 2, [100.0] * 2, live=live), random.Random(0))
    live[1].submit("x", 2048, 1, 0.0, BLOCKS, BLOCK_TOKENS)
    live[1].advance(10.0)
    assert rule.choose(request(**PREFIXED), (0, 1), 10.0) == 1
    alone = rule.price(request(), 0, 10.0)
    for n in range(5):
        live[0].submit(str(n), 10, 500, 10.0)
    live[0].advance(11.0)
    beside = rule.price(request(), 0, 11.0)
    rule.others = 0.0
    assert alone < rule.price(request(), 0, 11.0) < beside


def test_those_who_usually_come_count_too() -> None:
    live = [SteppedModelServer(SLOW)]
    many = ServerFleet([SLOW], [1.0], [100.0], 1000.0, 100.0, arrivals_s=1.0, live=live)
    prices = [
        kind(many, random.Random(0)).price(request(), 0, 0.0)
        for kind in (Clairvoyant, ClairvoyantHere, ClairvoyantWhole)
    ]
    assert prices[0] > prices[1] > prices[2]


# -- the world -------------------------------------------------------------------------------------------


def a_run(
    name: str, *, balancers: int = 1, fresh: bool = False, holds: bool = False, load: float = 0.5
) -> Any:
    """300 requests of ten sessions on two slow servers and a fast one: they, by number, and the score."""
    rng = random.Random(7)
    timings, rates = [SLOW, FAST, SLOW], [1.5, 4.0, 1.5]
    at, come = 0.0, []
    for n in range(300):
        at += rng.expovariate(load * sum(rates))
        prompt, output, session = rng.randint(1, 3000), rng.randint(1, 200), rng.randint(0, 9)
        blocks = [(session, i) for i in range((prompt + output) // BLOCK_TOKENS)]
        come.append(DispatchRequest(n, at, prompt, output, blocks))
    servers = ServerFleet(timings, rates, [150.0, 400.0, 150.0], 1500.0, 100.0, load * sum(rates))
    world = DispatchWorld(servers, come, random.Random(1), fresh=fresh)
    for number in range(balancers):
        entry, chance = RULES[name], random.Random(number)
        router: Dispatcher
        if entry.make is None:
            router = Ours(servers, chance, world.send, world.later, number, holds=holds, **entry.options)
        else:
            router = RuleRouter(entry.make(servers, chance), world.send, holds=holds)
        world.routers.append(router)
    world.run()
    return come, world.score(first=30)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "how",
    [{}, {"fresh": True}, {"balancers": 3}, {"holds": True, "load": 1.3}],
    ids=["1 s old", "fresh", "three", "held"],
)
def test_everybody_is_served_once_and_the_same_seed_gives_the_same_run(
    name: str, how: dict[str, Any]
) -> None:
    come, score = a_run(name, **how)
    for one in come:
        assert 0 <= one.server < 3
        assert one.at <= one.given_at < one.first_at <= one.ended_at
        assert (one.first_at == one.ended_at) == (one.output == 1)
    assert score.requests == 270
    assert score.first_p50 <= score.first_p95 <= score.first_p99
    assert score.j == pytest.approx(score.whole_mean + 10 * score.first_mean)
    again, same = a_run(name, **how)
    assert same == score
    assert [one.server for one in again] == [one.server for one in come]


def test_who_is_held_waits_in_the_order_of_coming_and_never_inside_a_server() -> None:
    come, score = a_run("round-robin", holds=True, load=4.0)
    assert score.held_most > 10
    assert [one.given_at for one in come] == sorted(one.given_at for one in come)


def test_a_server_has_room_while_nobody_waits_there_and_the_prompt_fits() -> None:
    live = SteppedModelServer(SLOW)
    assert has_room(live, 50_000)  # an empty one takes anybody
    live.submit("a", 12_000, 5, 0.0)
    assert has_room(live, 7_000)
    assert not has_room(live, 8_000)
    live.submit("b", 9_000, 5, 0.0)
    assert live.waiting == 1
    assert not has_room(live, 10)


class NeverSends(DispatchRule):
    """Holds everybody for ever."""

    def choose(self, request: DispatchRequest, among: Sequence[int], now: float) -> None:
        """Nobody."""


def test_a_rule_that_holds_for_ever_is_found_out() -> None:
    servers = fleet()
    world = DispatchWorld(servers, [request()], random.Random(0))
    world.routers.append(RuleRouter(NeverSends(servers, random.Random(0)), world.send, holds=False))
    with pytest.raises(RuntimeError, match="1 requests have no answer"):
        world.run()


def test_reports_come_once_a_second_and_spread_or_before_every_decision() -> None:
    class Listens(RoundRobin):
        """Remembers when whom reported."""

        heard: list[tuple[float, int]] = []  # noqa: RUF012 one test, one rule

        def report(self, server: int, report: ServerReport) -> None:
            self.heard.append((report.at, server))

    for fresh, wanted in (
        (False, [(0.5, 0), (1.0, 1), (1.5, 0), (2.0, 1)]),
        (True, [(0.25, 0), (0.25, 1), (2.1, 0), (2.1, 1)]),
    ):
        servers = fleet(2)
        come = [request(0, at=0.25, output=2), request(1, at=2.1, output=2)]
        world = DispatchWorld(servers, come, random.Random(0), fresh=fresh)
        Listens.heard = []
        world.routers.append(RuleRouter(Listens(servers, random.Random(0)), world.send, holds=False))
        world.run()
        assert Listens.heard[:4] == wanted


class Watched(LeastInFlight):
    """Counts what it sends and sees ended."""

    sends = ends = 0

    def sent(self, request: DispatchRequest, server: int, now: float) -> None:
        super().sent(request, server, now)
        self.sends += 1

    def ended(self, request: DispatchRequest, server: int, now: float) -> None:
        super().ended(request, server, now)
        self.ends += 1


def test_several_loadbalancers_know_of_their_own_only() -> None:
    servers = fleet(2)
    world = DispatchWorld(servers, [request(n, at=0.01 * n) for n in range(40)], random.Random(3))
    rules = [Watched(servers, random.Random(n)) for n in range(2)]
    world.routers.extend(RuleRouter(rule, world.send, holds=False) for rule in rules)
    world.run()
    assert sum(rule.sends for rule in rules) == 40
    assert all(rule.sends == rule.ends > 10 for rule in rules)
    assert [rule.in_flight for rule in rules] == [[0, 0], [0, 0]]


def test_ours_gets_a_hash_for_each_of_its_own_blocks() -> None:
    assert hashes(request(prompt=1100, blocks=(7, 8, 9))) == ["7.0", "7.1", "8.0", "8.1"]


def test_a_quantile_is_the_least_value_that_so_many_are_not_above() -> None:
    values = [float(n) for n in range(1, 101)]
    assert quantiles(values) == [50.0, 95.0, 99.0]
    assert quantiles([3.0]) == [3.0, 3.0, 3.0]
