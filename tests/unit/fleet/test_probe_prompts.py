"""Test prompts look like what clients send."""

import json
import random
from collections import Counter

import msgspec

from fleet.probe_prompts import (
    LEAST_TOKENS,
    LONG_CHARACTERS,
    MOST_CHARACTERS,
    MOST_TOKENS,
    as_completion,
    long_prompt,
    probe,
)


def test_no_two_are_the_same_and_all_are_short() -> None:
    rng = random.Random(1)
    bodies = [probe(rng, "m") for _ in range(2000)]
    texts = [as_completion(b)["prompt"] if "messages" in b else b["prompt"] for b in bodies]
    assert len(set(texts)) > 1950
    assert min(map(len, texts)) > 20
    assert 400 < max(map(len, texts)) <= MOST_CHARACTERS + 1
    assert all(LEAST_TOKENS <= b["max_tokens"] <= MOST_TOKENS for b in bodies)
    assert "{" not in "".join(texts)


def test_long_ones_are_as_long_as_the_model_allows() -> None:
    assert (long_prompt(1024), long_prompt(131_072)) == (512, LONG_CHARACTERS)
    rng = random.Random(4)
    bodies = [probe(rng, "m", 2000) for _ in range(200)]
    texts = [as_completion(b)["prompt"] if "messages" in b else b["prompt"] for b in bodies]
    assert min(map(len, texts)) > 1850
    assert max(map(len, texts)) <= 2001
    assert len(set(texts)) == 200


def test_they_vary_in_all_that_a_host_sees_at_once() -> None:
    """Route, size, shape: nothing that all have, and few others, tells them from a client's."""
    rng = random.Random(2)
    bodies = [probe(rng, "m") for _ in range(2000)]
    shapes = Counter(tuple(sorted(b)) for b in bodies)
    assert len(shapes) >= 12
    assert shapes.most_common(1)[0][1] < 1000
    assert 0.6 < sum("messages" in b for b in bodies) / 2000 < 0.8
    assert 0.65 < sum(b.get("stream", False) for b in bodies) / 2000 < 0.85
    sizes = [len(json.dumps(b)) for b in bodies]
    assert max(sizes) > 4 * min(sizes)
    assert max(Counter(sizes).values()) < 100


def test_a_seed_gives_the_same_prompts() -> None:
    first, second = ([probe(random.Random(3), "m") for _ in range(3)] for _ in range(2))
    assert msgspec.json.encode(first) == msgspec.json.encode(second)


def test_a_chat_as_a_completion_says_the_same() -> None:
    chat = {
        "model": "m",
        "max_tokens": 5,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    }
    assert as_completion(chat) == {"model": "m", "max_tokens": 5, "prompt": "Be brief. Why?"}
