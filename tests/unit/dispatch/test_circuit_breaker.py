"""An instance that fails is avoided at once, tried again one by one, and never stormed. Time is a number."""

import math
from collections import Counter

import pytest

from dispatch.circuit_breaker import (
    ALONE,
    CALM_S,
    DOUBT_S,
    MEMORY_S,
    PROBE_S,
    WHOLE,
    CircuitBreaker,
    CircuitState,
)
from dispatch.client_votes import FALSE_MOST, UNHEARD_S, ClientVotes
from dispatch.lease import Lease
from dispatch.load_reports import Poll
from tests.dispatch_world import T0, DispatchWorld, instance, world
from tests.messages import load_report, request_end
from web.messages.reports import PushedReport

# -- the circuit by itself -------------------------------------------------------------------------------


def opened() -> CircuitBreaker:
    """One that has just been seen to fail."""
    circuit = CircuitBreaker()
    circuit.trip(T0)
    return circuit


def probing() -> tuple[CircuitBreaker, float]:
    """One that may be tried again, and now."""
    circuit, now = opened(), T0 + 1.0
    circuit.record_healthy_report(now, now)
    assert circuit.state is CircuitState.PROBING
    return circuit, now


def test_what_was_seen_to_fail_gets_nothing_at_once() -> None:
    assert CircuitBreaker().left == math.inf
    assert opened().left == 0


def test_it_is_tried_again_when_its_pause_is_over_and_its_report_is_good_and_not_before() -> None:
    circuit = opened()
    circuit.record_healthy_report(T0 + 0.9, T0 + 0.9)
    assert circuit.state is CircuitState.OPEN
    assert not circuit.tick(T0 + 100.0)
    assert circuit.state is CircuitState.OPEN, "time alone does not say that it is well"
    circuit.record_healthy_report(T0 + 100.0, T0 + 100.0)
    assert (circuit.state, circuit.left) == (CircuitState.PROBING, 1)


def test_it_gets_one_lease_at_a_time_and_twice_as_many_with_each_that_is_finished() -> None:
    circuit, now = probing()
    most: list[int] = []
    out: list[str] = []
    while circuit.state is CircuitState.PROBING:
        while circuit.left:
            out.append(f"r{len(out)}")
            circuit.given(out[-1], now)
        most.append(len(out) - len(most))
        circuit.finished(out[len(most) - 1])
        circuit.over(out[len(most) - 1])
    assert most == [1, 2, 4, 8, 16, WHOLE]
    assert circuit.left == math.inf


def test_a_probe_that_fails_opens_it_for_twice_as_long() -> None:
    circuit, now = probing()
    pauses = []
    for n in range(8):
        circuit.given(f"r{n}", now)
        circuit.record_client_failure("a", now, on_word=True, probe=f"r{n}")
        assert circuit.state is CircuitState.OPEN
        pauses.append(circuit.until - now)
        now = circuit.until
        circuit.record_healthy_report(now, now)
    assert pauses == [2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0]


def test_when_it_is_trusted_again_the_pause_is_short_again() -> None:
    circuit, now = probing()
    for n in range(6):
        circuit.given(f"r{n}", now)
        circuit.finished(f"r{n}")
        circuit.over(f"r{n}")
    assert circuit.state is CircuitState.CLOSED
    circuit.trip(now)
    assert circuit.until - now == 1.0


def test_a_failure_of_a_request_from_before_says_nothing_about_a_probe() -> None:
    circuit, now = probing()
    circuit.given("probe", now)
    circuit.record_client_failure("a", now, on_word=True, probe="from before")
    assert circuit.state is CircuitState.PROBING
    circuit.finished("from before")
    assert circuit.left == 0


def test_a_probe_whose_client_does_not_use_it_makes_room_for_another_and_one_that_runs_does_not() -> None:
    circuit, now = probing()
    circuit.given("unused", now)
    assert not circuit.tick(now + PROBE_S - 0.1)
    assert circuit.tick(now + PROBE_S)
    assert circuit.left == 1
    circuit.given("used", now)
    circuit.started("used")
    assert not circuit.tick(now + 1000.0)
    assert circuit.left == 0


def test_one_word_makes_it_doubted_with_single_leases_and_a_report_asked_for() -> None:
    circuit = CircuitBreaker()
    circuit.record_client_failure("a", T0, on_word=True)
    assert (circuit.state, circuit.left, circuit.to_ask) == (CircuitState.DOUBTED, 1, True)
    circuit.given("r", T0)
    assert circuit.left == 0
    circuit.asked(T0)
    assert not circuit.to_ask


def test_a_good_report_ends_the_doubt_but_not_one_that_was_asked_for_before() -> None:
    circuit = CircuitBreaker()
    circuit.record_client_failure("a", T0, on_word=True)
    states = []
    for asked_at in (T0 - 0.1, T0 + 0.02):
        circuit.record_healthy_report(asked_at, T0 + 0.1)
        states.append(circuit.state)
    assert states == [CircuitState.DOUBTED, CircuitState.CLOSED]


def test_a_report_that_does_not_come_within_a_second_confirms_the_doubt() -> None:
    circuit = CircuitBreaker()
    circuit.record_client_failure("a", T0, on_word=True)
    assert not circuit.tick(T0 + 60.0), "the instance was not asked yet"
    circuit.asked(T0 + 60.0)
    assert not circuit.tick(T0 + 60.0 + DOUBT_S)
    assert circuit.tick(T0 + 60.1 + DOUBT_S)
    assert circuit.state is CircuitState.OPEN


def test_a_request_that_is_finished_ends_the_doubt_and_all_words() -> None:
    circuit = CircuitBreaker()
    for _ in range(5):
        for _ in range(ALONE - 1):
            circuit.record_client_failure("a", T0, on_word=True)
        circuit.finished("any")
        assert circuit.state is CircuitState.CLOSED


def test_whose_word_was_wrong_is_not_believed_for_a_while_but_counted() -> None:
    circuit = CircuitBreaker()
    circuit.record_client_failure("liar", T0, on_word=False)
    circuit.record_healthy_report(T0, T0)
    states = []
    for client, at in (("liar", 1.0), ("liar", CALM_S + 0.1), ("honest", CALM_S + 0.2)):
        circuit.record_client_failure(client, T0 + at, on_word=client == "honest")
        states.append(circuit.state)
    assert states == [CircuitState.CLOSED, CircuitState.DOUBTED, CircuitState.OPEN]


def test_the_third_word_in_a_row_of_one_client_is_believed_where_the_caller_lets_it() -> None:
    for alone, state in ((True, CircuitState.OPEN), (False, CircuitState.CLOSED)):
        circuit = CircuitBreaker()
        for _ in range(ALONE):
            circuit.record_client_failure("a", T0, on_word=alone)
            if circuit.state is CircuitState.DOUBTED:
                circuit.record_healthy_report(T0, T0)
        assert circuit.state is state


def test_words_are_forgotten() -> None:
    circuit = CircuitBreaker()
    circuit.record_client_failure("a", T0, on_word=True)
    circuit.record_healthy_report(T0, T0)
    circuit.record_client_failure("b", T0 + MEMORY_S + 0.1, on_word=True)
    assert circuit.state is CircuitState.DOUBTED


# -- within the loadbalancer -----------------------------------------------------------------------------


def state(b: DispatchWorld, id: int) -> object:
    """Of that instance's circuit."""
    return b.row(id)["circuit"]


def only(id: int, of: int = 3) -> tuple[int, ...]:
    """All but that one, to be avoided."""
    return tuple(i for i in range(1, of + 1) if i != id)


def failed(b: DispatchWorld, id: int, client: str = "", of: int = 3, **more: bool) -> None:
    """Let a client say that its request to that instance failed."""
    lease = b.lease(1.0, avoid=only(id, of), client=client)
    b.end(lease, "failed", **more)


def answer_polls(
    b: DispatchWorld, *silent: int, down: tuple[int, ...] = (), unreached: tuple[int, ...] = ()
) -> list[int]:
    """Ask for the reports that are due; those instances say nothing, or that their engine is down.

    unreached: those whose address for clients does not answer.
    """
    asked = []
    for poll in b.balancer.polls(b.now):
        asked.append(poll.instance_id)
        if poll.instance_id in silent:
            b.balancer.complete_poll(poll, None, b.now)
        else:
            report = load_report(model_up=poll.instance_id not in down)
            reached = poll.instance_id not in unreached if poll.address_too else None
            b.balancer.complete_poll(poll, report, b.now, reached=reached)
    return asked


def test_a_report_that_does_not_come_takes_the_instance_out_at_once() -> None:
    b = world(*(instance(i) for i in (1, 2, 3)))
    b.fail_poll(1)
    assert state(b, 1) == "open"
    assert {b.lease(1.0).instance_id for _ in range(20)} == {2, 3}


@pytest.mark.parametrize("pushed", [False, True])
def test_an_engine_that_is_down_takes_the_instance_out_at_once(*, pushed: bool) -> None:
    b = world(*(instance(i) for i in (1, 2, 3)))
    if pushed:
        b.balancer.pushed(1, PushedReport("boot1", 1, 0, 0, False, (), (), False), b.now)
    else:
        b.report(1, model_up=False)
    assert {b.lease(1.0).instance_id for _ in range(20)} == {2, 3}


def test_a_clients_word_is_checked_at_once_and_meanwhile_only_single_probes_go_there() -> None:
    b = world(*(instance(i) for i in (1, 2, 3)))
    failed(b, 1)
    assert state(b, 1) == "doubted"
    assert b.lease(1.0, avoid=only(1))
    assert b.ask(1.0, avoid=only(1)) is None
    assert answer_polls(b) == [1]
    assert state(b, 1) == "closed"
    assert b.lease(1.0, avoid=only(1))


def test_a_word_that_the_report_confirms_opens_it() -> None:
    for silent, down in (((1,), ()), ((), (1,))):
        b = world(*(instance(i) for i in (1, 2, 3)))
        failed(b, 1)
        answer_polls(b, *silent, down=down)
        assert state(b, 1) == "open"


def test_a_report_that_hangs_opens_it_within_two_seconds() -> None:
    b = world(*(instance(i) for i in (1, 2, 3)))
    failed(b, 1)
    assert [p.instance_id for p in b.balancer.polls(b.now)] == [1]
    b.tick(2.0)
    assert state(b, 1) == "open"


def test_a_report_asked_for_before_the_word_does_not_answer_it() -> None:
    b = world(instance(1), instance(2), instance(3))
    b.now += 6.0
    polls = {poll.instance_id: poll for _ in range(10) for poll in b.balancer.polls(b.now)}
    b.now += 0.1
    failed(b, 1)
    assert 1 not in [p.instance_id for p in b.balancer.polls(b.now)], "one is under way"
    b.balancer.complete_poll(polls[1], load_report(), b.now)
    assert state(b, 1) == "doubted"
    assert 1 in answer_polls(b)
    assert state(b, 1) == "closed"


def test_a_claim_that_nobody_is_there_is_true_where_we_meet_nobody_either() -> None:
    """Also where the port is closed for clients only, or somebody else answers there."""
    b = world(*(instance(i) for i in (1, 2, 3)))
    failed(b, 1, "a", missed=True)
    assert answer_polls(b, unreached=(1,)) == [1]
    assert state(b, 1) == "open"
    b.now += 1.5
    b.balancer.complete_poll(Poll(instance(1), 0, address_too=True), load_report(), b.now, reached=False)
    assert state(b, 1) == "open", "its report alone does not open it again"
    b.now += 3.0
    b.balancer.complete_poll(Poll(instance(1), 0, address_too=True), load_report(), b.now, reached=True)
    assert state(b, 1) == "probing"


def test_however_many_say_that_nobody_is_there_our_own_contact_counts() -> None:
    """Two keys said 17 times wrong_certificate, and the circuits of all instances were open."""
    b = world(*(instance(i) for i in (1, 2)))
    seen: Counter[object] = Counter()
    doubts = 0
    for n in range(17 * 2):
        b.now += 0.5
        lease = b.ask(1.0, client=f"key {n % 2}")
        if lease is not None:
            b.end(lease, "failed", missed=True)
        seen.update(state(b, id) for id in (1, 2))
        doubts += sum(state(b, id) == "doubted" for id in (1, 2))
        b.now += 0.02
        answer_polls(b)
        b.balancer.tick(b.now)
        assert [state(b, id) for id in (1, 2)] == ["closed", "closed"]
    assert seen["open"] == 0
    assert doubts <= 2 * FALSE_MOST, "then they are not believed"
    assert b.describe()["unheard_clients"] == 2


def test_claims_that_prove_false_take_a_clients_vote_away_and_true_ones_do_not() -> None:
    for unreached in (False, True):
        b = world(*(instance(i) for i in range(1, 9)))
        for id in range(1, 2 + FALSE_MOST):
            failed(b, id, "a", of=8, missed=True)
            answer_polls(b, unreached=(id,) if unreached else ())
        states = [state(b, id) for id in range(1, 2 + FALSE_MOST)]
        assert states == ["open" if unreached else "closed"] * (1 + FALSE_MOST)
        failed(b, 8, "a", of=8, missed=True)
        assert state(b, 8) == ("doubted" if unreached else "closed"), "it is heard, or not"
        if not unreached:
            b.tick(UNHEARD_S[0] + 1.0)
            failed(b, 8, "a", of=8, missed=True)
            assert state(b, 8) == "doubted", "a minute later it is"


def test_a_client_that_is_not_believed_is_so_for_longer_each_time() -> None:
    votes, now, pauses = ClientVotes(), T0, []
    for _ in range(3):
        for _ in range(FALSE_MOST):
            assert votes.counts("a", now)
            votes.contradict("a", now)
        since = now
        while not votes.counts("a", now):
            now += 1.0
        pauses.append(now - since)
    assert pauses == [UNHEARD_S[0], 2 * UNHEARD_S[0], 4 * UNHEARD_S[0]]
    assert votes.counts("b", now)
    for n in range(3000):
        votes.contradict(f"{n}", now)
    votes.contradict("a", now)
    assert votes.unheard == 3


def test_two_clients_whose_answers_failed_are_believed_although_our_contact_finds_nothing() -> None:
    b = world(*(instance(i) for i in (1, 2, 3)))
    failed(b, 1, "a")
    answer_polls(b)
    failed(b, 1, "b")
    assert state(b, 1) == "open"


def test_clients_words_take_out_a_tenth_of_the_fleet_and_never_the_only_instance() -> None:
    for hot, most in ((1, 0), (2, 1), (5, 1), (30, 3)):
        b = world(*(instance(i) for i in range(1, hot + 1)))
        for id in range(1, hot + 1):
            for client in ("a", "b"):
                failed(b, id, client, of=hot)
                answer_polls(b)
        assert sum(state(b, id) == "open" for id in range(1, hot + 1)) == most


def test_who_opened_a_circuit_by_its_word_alone_loses_its_vote_where_the_first_probe_is_fine() -> None:
    b = world(instance(1), instance(2))
    for n in range(FALSE_MOST):
        for client in ("liar", "other liar"):
            failed(b, 1, client, of=2)
            answer_polls(b)
        assert state(b, 1) == "open", n
        while state(b, 1) != "closed":
            b.now += 0.5
            b.report(1)
            if (lease := b.ask(1.0, avoid=(2,), client="honest")) is not None:
                b.end(lease)
            b.refill()
    for client in ("liar", "other liar"):
        failed(b, 1, client, of=2)
    assert state(b, 1) == "closed"
    assert b.describe()["unheard_clients"] == 2


def test_a_client_that_says_of_a_probe_that_nobody_is_there_does_not_decide_that() -> None:
    b = world(instance(1), instance(2))
    b.fail_poll(1)
    b.now += 1.5
    b.report(1)
    probe = b.lease(1.0, avoid=(2,), client="liar")
    b.end(probe, "failed", missed=True)
    assert state(b, 1) == "probing"
    assert b.lease(1.0, avoid=(2,), client="honest")


def test_answers_of_500_are_as_words_of_their_clients() -> None:
    b = world(*(instance(i) for i in (1, 2, 3)))
    for client in ("a", "b"):
        lease = b.lease(1.0, avoid=only(1), client=client)
        b.report(1, started=(lease.request_id,), ended=(request_end(lease.request_id, "failed"),))
    assert state(b, 1) == "open"


def test_a_failure_that_may_be_the_clients_own_fault_only_counts() -> None:
    b = world(*(instance(i) for i in (1, 2, 3)))
    for client in ("a", "b", "c"):
        failed(b, 1, client, blame=False)
    assert state(b, 1) == "closed"
    assert b.row(1)["failures"] == 3


def test_a_client_that_lies_about_all_cannot_take_out_the_fleet() -> None:
    """It takes every lease it can get for a minute and says of each that it failed; no one else asks."""
    b = world(*(instance(i) for i in range(1, 21)))
    away: list[int] = []
    for _ in range(60 * 50):
        b.now += 0.02
        for _ in range(5):
            lease = b.ask(1.0, client="liar")
            if lease is not None:
                b.end(lease, "failed")
        answer_polls(b)
        if round(b.now * 50) % 50 == 0:
            b.balancer.tick(b.now)
        b.refill()
        away.append(sum(r["circuit"] != "closed" for r in b.describe()["instances"]))
    assert max(away) <= 2 + 5, "a tenth by its reports alone, and those whose report is on its way"
    assert sum(away) / len(away) < 4.0
    assert b.lease(1.0, client="honest")


def test_a_refill_that_fails_is_no_failure_yet_but_looked_into_at_once() -> None:
    b = world(instance(1))
    for _ in range(250):
        b.lease(1.0)
    (refill,) = b.balancer.refills(b.now)
    b.fail_refill(refill)
    assert state(b, 1) == "doubted"
    assert answer_polls(b) == [1]
    assert state(b, 1) == "closed"


def grow(b: DispatchWorld, seconds: float) -> list[int]:
    """The most requests instance 1 had at a time in each second, when all want to go there.

    Each takes half a second.
    """
    running: list[tuple[float, Lease]] = []
    most = []
    for n in range(round(seconds * 50)):
        b.now += 0.02
        done = [x for at, x in running if at <= b.now]
        running = [(at, x) for at, x in running if at > b.now]
        here = [x for x in done if x.instance_id == 1]
        if here:
            ids = tuple(x.request_id for x in here)
            b.report(1, started=ids, ended=tuple(request_end(i) for i in ids), running=len(running))
        while (lease := b.ask(10.0, avoid=(2,))) is not None:
            running.append((b.now + 0.5, lease))
        if n % 50 == 0:
            b.balancer.tick(b.now)
            most.append(0)
        b.refill()
        most[-1] = max(most[-1], sum(x.instance_id == 1 for _, x in running))
    return most


def test_an_instance_that_comes_back_is_not_stormed() -> None:
    b = world(instance(1), instance(2))
    b.fail_poll(1)
    assert grow(b, 1.0) == [0]
    b.now += 0.1
    b.report(1)
    steps = grow(b, 4.0)
    assert steps[0] <= 2
    assert steps == sorted(steps)
    assert steps[-1] >= 100, "all it holds"


def test_requests_of_an_instance_that_says_nothing_any_more_are_released() -> None:
    b = world(instance(1), instance(2))
    for _ in range(5):
        b.lease(100.0, avoid=(2,))
    for n in range(3):
        assert b.row(1)["unfinished"] == 5, n
        b.fail_poll(1)
    assert (b.row(1)["unfinished"], b.work(1)) == (0, 0.0)
    assert b.describe()["ends"] == {"lost": 5}


def test_requests_that_died_with_the_engine_are_released_and_those_on_their_way_are_not() -> None:
    b = world(instance(1), instance(2))
    leases = [b.lease(100.0, avoid=(2,)) for _ in range(5)]
    b.report(1, started=tuple(x.request_id for x in leases[:3]), running=3)
    for unfinished in (5, 2, 2):
        b.report(1, model_up=False)
        assert b.row(1)["unfinished"] == unfinished


def test_a_retry_never_goes_to_an_instance_that_it_avoids() -> None:
    """Not with the best place there, nor as a probe, nor from the line, in a batch, or for its prefix."""
    b = world(*(instance(i) for i in (1, 2, 3)), max_held=50)
    hashes = ("0123456789abcdef",)
    first = b.lease(500.0, affinity=hashes)
    bad = first.instance_id
    b.end(first, "failed")
    found: Counter[int] = Counter()
    for n in range(40):
        lease = b.ask(10.0, avoid=(bad,), affinity=hashes)
        if lease is None:
            break
        found[lease.instance_id] += 1
        if n == 20:
            answer_polls(b)
    for lease in b.batch(10.0, 64, avoid=(bad,), affinity=hashes):
        found[lease.instance_id] += 1
    for _ in range(4):
        b.hold(900.0, 60.0, avoid=(bad,))
    b.grant()
    b.now += 30.0
    for id in (1, 2, 3):
        b.report(id)
    for _, lease in b.grant():
        found[lease.instance_id] += 1
    b.fail_poll(bad)
    b.now += 2.0
    b.report(bad)
    assert state(b, bad) == "probing"
    for _, lease in b.grant():
        found[lease.instance_id] += 1
    assert found.total() > 60
    assert bad not in found
    assert b.ask(1.0, avoid=(1, 2, 3)) is None
    assert b.batch(1.0, 5, avoid=(1, 2, 3)) == []


def test_a_batch_is_no_more_than_the_probes_there_may_be() -> None:
    b = world(instance(1))
    b.fail_poll(1)
    b.now += 1.5
    b.report(1)
    assert len(b.batch(1.0, 32)) == 1
    assert b.batch(1.0, 32) == []


def fail(b: DispatchWorld, times: int, id: int = 1) -> None:
    """That many clients say that their request to it failed."""
    for _ in range(times):
        lease = b.lease(1.0, avoid=tuple(i for i in (1, 2) if i != id))
        b.end(lease, "failed")


def test_an_instance_that_fails_three_times_in_a_row_is_avoided_until_it_reports_again() -> None:
    b = world(instance(1), instance(2))
    fail(b, 3)
    assert {b.lease(1.0).instance_id for _ in range(10)} == {2}
    b.now += 1.5
    assert {b.lease(1.0).instance_id for _ in range(10)} == {2}
    b.report(1)
    assert 1 in {b.lease(1.0).instance_id for _ in range(10)}


def test_a_success_between_failures_is_a_new_beginning() -> None:
    b = world(instance(1), instance(2))
    fail(b, 2)
    good = b.lease(1.0, avoid=(2,))
    b.end(good)
    fail(b, 2)
    assert b.lease(1.0, avoid=(2,))


def test_an_instance_that_fails_again_and_again_is_avoided_longer_each_time() -> None:
    b = world(instance(1), instance(2))
    avoided = []
    for n in range(4):
        fail(b, 3 if n == 0 else 1)  # then one probe is enough
        since = b.now
        while b.row(1)["avoided"]:
            b.now += 0.25
            b.report(1)
            b.refill()
        avoided.append(b.now - since)
    assert avoided == pytest.approx([1.0, 2.0, 4.0, 8.0], abs=0.3)


def test_reports_that_do_not_come_count_as_failures() -> None:
    b = world(instance(1), instance(2))
    for _ in range(3):
        b.fail_poll(1)
    assert b.row(1)["avoided"]
    assert not b.row(2)["avoided"]


def test_a_model_server_that_is_down_counts_as_a_failure_although_the_report_came() -> None:
    b = world(instance(1), instance(2))
    for _ in range(3):
        b.report(1, model_up=False)
    assert {b.lease(1.0).instance_id for _ in range(10)} == {2}
