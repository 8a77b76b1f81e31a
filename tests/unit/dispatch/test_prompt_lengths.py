"""dispatch/prompt_lengths.py: what a prompt has in tokens, by the bytes of its request."""

import pytest

from dispatch.prompt_lengths import MEMORY, PromptLengths


def test_nothing_is_said_before_one_of_our_own_was_seen() -> None:
    lengths = PromptLengths()
    assert lengths.prompt_tokens(4000) is None
    lengths.learn(0, 1000.0)  # its client did not say how long it is
    lengths.learn(4000, 0.0)
    assert lengths.prompt_tokens(4000) is None


def test_a_token_takes_what_it_takes_in_our_own_requests() -> None:
    lengths = PromptLengths()
    for tokens in (1000.0, 3000.0):
        lengths.learn(round(tokens * 5.0), tokens)
    assert lengths.prompt_tokens(10_000) == pytest.approx(2000.0, rel=1e-2)
    assert lengths.prompt_tokens(0) is None


def test_a_picture_is_not_taken_for_a_book() -> None:
    lengths = PromptLengths()
    lengths.learn(4000, 1000.0)
    assert lengths.prompt_tokens(4_000_000) == 1000.0
    assert lengths.prompt_tokens(1) == 1.0


def test_what_was_long_ago_is_forgotten() -> None:
    lengths = PromptLengths()
    for bytes_a_token in (2, 8):
        for _ in range(round(6 * MEMORY)):
            lengths.learn(1000 * bytes_a_token, 1000.0)
    assert lengths.prompt_tokens(4000) == pytest.approx(500.0, rel=0.02)
