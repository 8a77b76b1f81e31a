"""What one instance lies about lengths changes nothing for the others; honest ones are believed."""

import math
import random

import pytest

from dispatch.agreement import MOST_KEPT, WAITING, Agreement
from dispatch.request_estimates import RequestEstimates
from engine.forward import LEFT
from tests.dispatch_world import DispatchWorld, instance, world
from tests.messages import request_end


def served(liar: int | None, tokens: int = 10_000_000, answers: int = 400, start: int = 0) -> DispatchWorld:
    """Four instances that answer with 100 tokens or so, of which one may say something else."""
    b = world(*(instance(n, 10_000.0) for n in (1, 2, 3, 4)))
    rng = random.Random(1)
    for n in range(answers):
        if n % 20 == 0:
            b.tick(1.0)
            b.refill()
        honest = max(1, round(100.0 * math.exp(rng.gauss(0.0, 0.8))))
        id = 1 + n % 4
        lease = b.lease(100.0, prompt_tokens=250, avoid={1, 2, 3, 4} - {id})
        said = tokens if id == liar and n >= start else honest
        end = request_end(lease.request_id, output_tokens=said)
        b.report(
            id, started=(lease.request_id,), started_bytes=(2**31 if id == liar else 1000,), ended=(end,)
        )
    return b


def expected(b: DispatchWorld) -> float:
    """What the loadbalancer expects of the next request like these."""
    return b.balancer.work_of(250, None) - 25.0


@pytest.mark.parametrize("tokens", [10_000_000, 1])
@pytest.mark.parametrize("start", [0, 150, 390])
def test_a_liar_among_four_teaches_nothing(tokens: int, start: int) -> None:
    honest = expected(served(None))
    assert 100.0 < honest < 190.0
    assert expected(served(1, tokens, start=start)) == pytest.approx(honest, rel=0.15)


def test_nor_how_many_bytes_a_token_has() -> None:
    works = []
    for liar in (None, 1):
        b = served(liar)
        b.report(2, started=("stranger",), started_bytes=(20_000,), running=1)
        works.append(b.work(2))
    assert works[1] == pytest.approx(works[0], rel=0.1)


def test_what_others_expect_of_their_requests_is_as_without_the_liar() -> None:
    rows = [served(liar).lease(100.0, prompt_tokens=250).row[LEFT] for liar in (None, 2)]
    assert rows[1] == pytest.approx(rows[0], rel=0.15)


def learned(lengths: dict[int, float], hot: int, answers: int = 50) -> float:
    """What is expected after instances said such lengths in turn."""
    estimates = RequestEstimates()
    kind = estimates.output_lengths.kind(100, None)
    for _ in range(answers):
        for instance_id, tokens in lengths.items():
            estimates.finished(kind, round(tokens), math.inf, instance_id, hot)
    return estimates.expected_output(100, None)


def test_one_or_two_instances_have_no_majority_and_are_believed() -> None:
    assert learned({1: 600.0}, hot=1) > 500.0
    assert learned({1: 600.0, 2: 100.0}, hot=2) == pytest.approx(350.0, rel=0.1)


def test_a_fleet_of_which_one_instance_answers_is_learned_from_too() -> None:
    assert learned({1: 600.0}, hot=3, answers=200) > 400.0


def test_honest_instances_that_differ_somewhat_are_all_believed() -> None:
    rng = random.Random(2)
    agreement: Agreement[None] = Agreement()
    wrong = 0
    for _ in range(300):
        for instance_id in range(6):
            agreement.note(instance_id, rng.gauss(0.3 * (instance_id % 2), 1.0), None, hot=6)
            wrong += agreement.believes(instance_id) is False
    assert wrong < 10


def test_who_lied_and_says_what_others_say_again_is_believed_again() -> None:
    agreement: Agreement[int] = Agreement()
    learned_of: dict[int, list[int]] = {1: [], 2: [], 3: []}
    for n in range(300):
        for instance_id, learns in learned_of.items():
            learns += agreement.note(instance_id, 3.5 if instance_id == 1 and n < 50 else 0.0, n, hot=3)
    assert learned_of[2] == list(range(300 - WAITING))
    assert 50 <= learned_of[1][0] < 100
    assert learned_of[1][-1] == 299 - WAITING


def test_instances_without_number_are_forgotten() -> None:
    agreement: Agreement[None] = Agreement()
    for instance_id in range(3 * MOST_KEPT):
        for _ in range(4):
            agreement.note(instance_id, 0.0, None, hot=3)
    assert agreement.believes(0) is None
    assert agreement.believes(3 * MOST_KEPT - 1)
