"""An instance that lets clients wait many times longer than its peers do is held back; nobody else is."""

from collections.abc import Iterable

import pytest

from dispatch.circuit_breaker import SLOW_PROBE_S
from dispatch.client_paces import GOOD_PROBES, KEPT, LEAST, WINDOW_S
from dispatch.instance_failures import WORD_SHARE
from dispatch.lease import Lease
from engine.step_time_constants import TIMINGS, Timing
from tests.dispatch_world import DispatchWorld, instance, world
from tests.messages import load_report

FAST, SLOW_GPU = TIMINGS["13B", "awq4", "H100 SXM", 1], TIMINGS["13B", "awq4", "RTX 3090", 1]


def met(
    b: DispatchWorld,
    lease: Lease,
    first_s: float = 0.2,
    each_s: float = 0.02,
    *,
    pieces: int = 50,
    whole: bool = False,
) -> None:
    """Let a lease's request be answered at that pace, its instance report the end, and its client tell."""
    rest_s = each_s * pieces
    b.balancer.end_lease(lease.request_id, "finished", b.now)
    b.balancer.paces.hear(lease.request_id, lease.client, first_s, rest_s, 0 if whole else pieces, b.now)


def serve(
    b: DispatchWorld,
    slow: Iterable[int] = (),
    seconds: int = 40,
    clients: tuple[str, ...] = ("a", "b"),
    liars: tuple[str, ...] = (),
    *,
    first_s: float = 12.0,
    each_s: float = 0.02,
    whole: bool = False,
    max_tokens: int | None = None,
) -> dict[int, int]:
    """Let clients ask for a while; return how many leases each instance was given.

    slow: instances where all meet such a pace. liars: clients that say the same of instance 1.
    """
    given: dict[int, int] = {}
    slow = set(slow)
    for second in range(seconds):
        b.tick(1.0)
        b.refill()
        leases = [
            b.lease(client=client, prompt_tokens=100, max_tokens=max_tokens)
            for client in clients
            for _ in range(2 + second % 2)
        ]
        for lease in leases:
            given[lease.instance_id] = given.get(lease.instance_id, 0) + 1
            bad = lease.instance_id in slow or (lease.client in liars and lease.instance_id == 1)
            met(b, lease, *(first_s, each_s) if bad else (0.2, 0.02), whole=whole)
    return given


def four() -> DispatchWorld:
    return world(*(instance(n, 1000.0, timing=FAST) for n in (1, 2, 3, 4)))


def slow_ones(b: DispatchWorld) -> set[int]:
    return {row["id"] for row in b.describe()["instances"] if row["slow"]}


def test_a_machine_that_lets_clients_wait_gets_one_request_now_and_then() -> None:
    b = four()
    serve(b, {1})
    assert slow_ones(b) == {1}
    given = serve(b, {1}, seconds=60)
    assert 1 <= given.get(1, 0) <= 60 / SLOW_PROBE_S[0]
    assert min(given[n] for n in (2, 3, 4)) > 50


def test_the_autoscaler_and_the_operator_are_told_with_figures() -> None:
    b = four()
    serve(b, {1})
    why = b.balancer.usage(b.now).instances[1].slow
    assert why is not None
    assert why.startswith("its answers begin after 12.0 s, 22.9 times")
    assert why.endswith(" what is due there; those of its peers 0.4 times (9 answers, 2 clients)")
    assert b.row(1)["slow"] == why
    assert b.balancer.usage(b.now).instances[2].slow is None


def test_tokens_that_come_slowly_count_as_late_first_ones_do() -> None:
    b = four()
    serve(b, {1}, first_s=0.2, each_s=0.5)
    assert b.row(1)["slow"].startswith("its tokens come each 0.50 s")


def test_answers_in_one_piece_are_judged_by_their_whole_time() -> None:
    b = four()
    serve(b, {1}, first_s=0.2, each_s=4.0, whole=True, max_tokens=50)
    assert slow_ones(b) == {1}


def test_waits_that_were_given_up_count() -> None:
    """With 30 s until a client gives up nothing may ever come: then the wait itself is what was met."""
    b = four()
    for _ in range(40):
        leases = [b.lease(client=client, prompt_tokens=100) for client in ("a", "b") for _ in range(4)]
        b.tick(3.0)
        b.refill()
        for lease in leases:
            if lease.instance_id == 1:
                b.balancer.paces.give_up(lease.request_id, lease.client, b.now)
                b.balancer.end_lease(lease.request_id, "unused", b.now)
            else:
                met(b, lease)
        if slow_ones(b):
            break
    assert slow_ones(b) == {1}


def test_one_that_is_well_again_is_trusted_after_some_good_probes() -> None:
    b = four()
    serve(b, {1})
    given = serve(b, seconds=10 * GOOD_PROBES * int(SLOW_PROBE_S[0]))
    assert slow_ones(b) == set()
    assert given[1] > 50
    serve(b, {1})
    assert slow_ones(b) == {1}, "and judged anew"


def test_a_host_that_is_slow_for_half_of_the_requests_is_found() -> None:
    """It may know test prompts by their length, and so answers short requests well."""
    b = four()
    for _ in range(40):
        b.tick(1.0)
        b.refill()
        for client in ("a", "b"):
            for n in range(4):
                lease = b.lease(client=client, prompt_tokens=100)
                met(b, lease, 12.0 if lease.instance_id == 1 and n % 2 else 0.2)
    assert slow_ones(b) == {1}


def test_a_slow_answer_now_and_then_makes_no_machine_slow() -> None:
    b = four()
    for second in range(120):
        b.tick(1.0)
        b.refill()
        for client in ("a", "b"):
            for n in range(4):
                lease = b.lease(client=client, prompt_tokens=100)
                met(b, lease, 12.0 if lease.instance_id == 1 and (second + n) % 5 == 0 else 0.2)
    assert slow_ones(b) == set()


def test_without_a_peer_nothing_is_known() -> None:
    b = world(instance(1, 1000.0, timing=FAST))
    given = serve(b, {1})
    assert (slow_ones(b), len(given)) == (set(), 1)


def test_a_peer_that_no_client_met_is_no_peer() -> None:
    b = world(instance(1, 1000.0, timing=FAST), instance(2, 1000.0, timing=FAST, draining=True))
    serve(b, {1})
    assert slow_ones(b) == set()


def test_a_fleet_that_is_slow_as_a_whole_is_not_made_smaller() -> None:
    b = four()
    serve(b, {1, 2, 3, 4})
    assert slow_ones(b) == set()


def test_one_client_alone_says_nothing_where_there_are_others() -> None:
    b = four()
    serve(b, liars=("a",), seconds=80)
    assert slow_ones(b) == set()
    serve(b, liars=("a",), clients=("a", "b", "c"), seconds=80)
    assert slow_ones(b) == set()


def test_the_only_client_there_is_is_believed() -> None:
    b = four()
    serve(b, {1}, clients=("a",), seconds=60)
    assert slow_ones(b) == {1}


def test_clients_can_hold_back_a_share_of_the_machines_only() -> None:
    b = world(*(instance(n, 1000.0, timing=FAST) for n in range(1, 31)))
    serve(b, set(range(1, 13)), seconds=200)
    assert len(slow_ones(b)) == 30 * WORD_SHARE


def test_another_gpu_and_longer_prompts_make_no_machine_slow() -> None:
    """The older card takes 13 times as long for a prompt of 3,000 tokens, and is as it should be."""
    b = world(instance(1, 300.0, timing=SLOW_GPU), *(instance(n, 3000.0, timing=FAST) for n in (2, 3)))
    asked = {1: 0, 2: 0, 3: 0}
    for _ in range(80):
        b.tick(1.0)
        b.refill()
        for client in ("a", "b"):
            for prompt, avoid in ((3000, {2, 3}), (3000, {1}), (100, {1, 2})):
                lease = b.lease(client=client, prompt_tokens=prompt, avoid=frozenset(avoid))
                timing: Timing = SLOW_GPU if lease.instance_id == 1 else FAST
                asked[lease.instance_id] += 1
                met(b, lease, 2.0 * lease.first_token_s + 0.1, 3 * timing.a * 1e-3)
    assert min(asked.values()) >= LEAST
    assert slow_ones(b) == set()


def test_more_work_makes_no_machine_slow() -> None:
    """Where the prompts of ten requests are read first, the last of them waits for all."""
    b = world(*(instance(n, 1000.0, timing=SLOW_GPU) for n in (1, 2)))
    for _ in range(40):
        b.tick(1.0)
        b.refill()
        full = [b.ask(client="a", prompt_tokens=800, avoid=frozenset({2})) for _ in range(2)]
        idle = [b.ask(client="b", prompt_tokens=100, avoid=frozenset({1}))]
        for lease in (one for one in (*full, *idle) if one is not None):
            met(b, lease, 3.0 * lease.first_token_s, 0.09 if lease.instance_id == 1 else 0.012)
    assert slow_ones(b) == set()


def test_it_serves_as_before_while_no_other_can() -> None:
    b = four()
    serve(b, {1})
    b.hot(instance(1, 1000.0, timing=FAST))
    b.tick(1.0)
    b.refill()
    assert [b.lease(client="a").instance_id for _ in range(5)] == [1] * 5
    b.hot(*(instance(n, 1000.0, timing=FAST) for n in (1, 2)))
    b.tick(1.0)
    b.refill()
    assert {b.lease(client="a").instance_id for _ in range(5)} == {2}


def test_a_reboot_begins_anew() -> None:
    b = four()
    serve(b, {1})
    b.balancer.complete_poll(b.poll(1), load_report(boot_id="boot2"), b.now)
    b.boots[1] = "boot2"
    b.tick(1.0)
    assert slow_ones(b) == set()


def test_a_client_tells_of_its_own_requests_and_once() -> None:
    b = four()
    for _ in range(2 * KEPT):
        lease = b.lease(client="a")
        b.end(lease)
        b.balancer.paces.hear(lease.request_id, "b", 500.0, 0.0, 0, b.now)
        b.tick(0.5)
        b.refill()
        met(b, lease)
        for _ in range(20):
            b.balancer.paces.hear(lease.request_id, "a", 500.0, 0.0, 0, b.now)
            b.balancer.paces.hear("of-nobody", "a", 500.0, 0.0, 0, b.now)
    assert slow_ones(b) == set()


def test_what_was_met_long_ago_says_nothing() -> None:
    b = four()
    serve(b, {1}, seconds=2)
    assert slow_ones(b) == set(), "too few"
    b.tick(WINDOW_S)
    b.refill()
    serve(b, seconds=30)
    assert slow_ones(b) == set()


@pytest.mark.parametrize("first_s", [0.0, 1e5])
def test_the_longest_and_the_shortest_wait_do_no_harm(first_s: float) -> None:
    b = four()
    serve(b, {1}, first_s=first_s)
    assert slow_ones(b) == ({1} if first_s else set())
