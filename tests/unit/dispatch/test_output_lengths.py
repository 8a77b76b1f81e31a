"""What is expected of an answer: by what is known of requests like it, and by how far it has come."""

import random

import numpy as np
import pytest

from dispatch.output_lengths import KINDS, OutputLengths, expect
from dispatch.predicted_load import request_row
from engine.forward import LEFT, MADE


def left(lengths: OutputLengths, kind: int, made: float, most: float = 1e9) -> float:
    """Tokens to come of one that has made so many."""
    rows = np.stack([request_row(100.0, 0.0, most, kind)])
    rows[0, MADE] = made
    expect(rows, lengths.table)
    return float(rows[0, LEFT])


def test_before_anything_has_ended_it_is_what_was_told_however_far_one_has_come() -> None:
    lengths = OutputLengths(180.0)
    assert lengths.mean(0) == 180.0
    assert [left(lengths, 0, made) for made in (0, 100, 1000)] == pytest.approx([180.0] * 3, rel=0.01)


def test_what_has_ended_outweighs_what_was_told() -> None:
    lengths = OutputLengths(180.0)
    for _ in range(1000):
        lengths.ended(40, 0)
    assert lengths.mean(0) == pytest.approx(42.2, abs=0.5)
    assert left(lengths, 0, 0) == pytest.approx(41.0, abs=3.0)


def test_who_has_outlived_the_short_ones_will_be_long() -> None:
    """Nine of ten answers have 20 tokens, one has 1,000: at 50 there are 950 to come."""
    lengths, rng = OutputLengths(100.0), random.Random(1)
    for _ in range(2000):
        lengths.ended(20 if rng.random() < 0.9 else 1000, 0)
    assert left(lengths, 0, 0) == pytest.approx(118.0, rel=0.15)
    assert left(lengths, 0, 50) == pytest.approx(950.0, rel=0.1)
    assert left(lengths, 0, 500) == pytest.approx(500.0, rel=0.25)


def test_the_conditional_mean_is_that_of_the_sample() -> None:
    lengths, rng = OutputLengths(200.0), random.Random(2)
    sample = [1 + int(rng.lognormvariate(5.0, 1.0)) for _ in range(900)]
    for tokens in sample:
        lengths.ended(tokens, 0)
    for made in (10, 100, 300, 600):
        longer = [tokens - made for tokens in sample if tokens > made]
        assert left(lengths, 0, made) == pytest.approx(sum(longer) / len(longer), rel=0.2)


def test_prompts_of_one_length_are_a_kind_of_their_own() -> None:
    lengths = OutputLengths(200.0)
    short, long = lengths.kind(100, None), lengths.kind(4000, None)
    for _ in range(200):
        lengths.ended(20, short)
        lengths.ended(800, long)
    assert lengths.mean(short) == pytest.approx(40.0, abs=10.0)
    assert lengths.mean(long) == pytest.approx(780.0, abs=30.0)
    assert lengths.kind(101, None) == short
    assert lengths.kind(130, None) != short


def test_a_kind_of_which_nothing_is_known_is_expected_to_be_like_all() -> None:
    lengths = OutputLengths(200.0)
    known = lengths.kind(100, None)
    for _ in range(300):
        lengths.ended(60, known)
    assert lengths.mean(lengths.kind(4000, None)) == pytest.approx(lengths.mean(0), rel=0.05)
    assert left(lengths, lengths.kind(4000, None), 0) == pytest.approx(left(lengths, 0, 0), rel=0.05)


def test_no_more_is_expected_than_was_allowed() -> None:
    lengths = OutputLengths(200.0)
    kind = lengths.kind(100, 50)
    assert lengths.mean(kind, 50) == 50.0
    assert left(lengths, kind, 30.0, most=50.0) == 20.0
    assert left(lengths, kind, 50.0, most=50.0) == 1.0


def test_another_told_mean_counts_where_nothing_is_known() -> None:
    lengths = OutputLengths(200.0)
    lengths.tell(50.0)
    assert lengths.mean(lengths.kind(10, None)) == 50.0


def test_kinds_are_bounded_whatever_clients_send() -> None:
    lengths = OutputLengths(200.0)
    kinds = {lengths.kind(2 ** (n % 20), 1 + n) for n in range(5000)}
    kinds |= {lengths.kind(int(1.19**n), 2**m) for n in range(80) for m in range(24)}
    assert max(kinds) < KINDS
    assert lengths.kind(10**7, 10**7) < KINDS
