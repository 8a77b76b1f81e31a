"""The expected work of a request is learned from those that have ended. Time is a number."""

import pytest

from tests.dispatch_world import instance, world
from tests.messages import request_end


def test_work_is_prompt_tokens_by_weight_and_the_expected_answer() -> None:
    b = world(instance(1))
    assert b.balancer.work_of(1000, None) == pytest.approx(300.0)
    assert b.balancer.work_of(1000, 50) == pytest.approx(150.0)


def test_the_expected_answer_is_learned_from_completions_with_about_the_same_limit() -> None:
    b = world(instance(1, throughput=1e6))
    for _ in range(400):
        lease = b.lease(b.balancer.work_of(0, 1000), max_tokens=1000)
        b.refill()
        b.report(1, started=(lease.request_id,), ended=(request_end(lease.request_id, output_tokens=40),))
    assert b.balancer.work_of(0, 1000) == pytest.approx(42, abs=3)
    assert b.balancer.work_of(0, 100) <= 100.0


def test_requests_that_broke_off_teach_nothing_about_length() -> None:
    b = world(instance(1, throughput=1e6))
    for _ in range(60):
        lease = b.lease(1.0, max_tokens=1000)
        b.refill()
        b.report(1, started=(lease.request_id,), ended=(request_end(lease.request_id, "aborted", 1),))
    assert b.balancer.work_of(0, 1000) == 200.0


def test_a_length_is_learned_also_when_the_client_said_first_that_it_was_done() -> None:
    b = world(instance(1))
    lease = b.lease(1.0, max_tokens=1000)
    b.end(lease)
    b.report(1, ended=(request_end(lease.request_id, output_tokens=900),))
    assert b.balancer.work_of(0, 1000) > 200.0


def test_an_expected_answer_never_exceeds_the_limit() -> None:
    b = world(instance(1))
    lease = b.lease(1.0, max_tokens=15)
    b.report(1, started=(lease.request_id,), ended=(request_end(lease.request_id, output_tokens=10_000),))
    assert b.balancer.work_of(0, 9) <= 9.0
