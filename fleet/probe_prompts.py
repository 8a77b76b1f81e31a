"""Test prompts that look like a client's, and are never the same twice.

A host that knows our test prompts answers them and lets clients wait. So their routes, lengths, texts, limits
and headers vary as those of clients do; what is left is the address that a connection comes from.
They are short, because the smallest model reads 1,024 tokens, and a character may be one; those to a machine
that clients accuse are as long as clients' own where the model reads more.
"""

import random
from collections.abc import Mapping
from typing import Any

MOST_CHARACTERS = 600
"""Characters of a prompt with its system message."""

LEAST_TOKENS, MOST_TOKENS = 4, 40
"""Bounds of max_tokens: a machine that makes 10 tokens a second ends within a check's time."""

CHATS, STREAMS, SYSTEMS = 0.7, 0.75, 0.4
"""Shares of prompts that are chats, that are streamed, and of chats with a system message."""

HEADERS: Mapping[str, str] = {
    "Accept": "application/json",
    "User-Agent": "OpenAI/Python 2.8.1",
    "X-Stainless-Lang": "python",
    "X-Stainless-Package-Version": "2.8.1",
    "X-Stainless-OS": "Linux",
    "X-Stainless-Arch": "x64",
    "X-Stainless-Runtime": "CPython",
    "X-Stainless-Retry-Count": "0",
}
"""What the openai package sends of itself; it passes through the gateway and `fleet_client`."""

_SYSTEMS = (
    "You are a helpful assistant.",
    "Answer briefly and precisely.",
    "You are an experienced editor. Keep the tone of the author.",
    "You write code reviews for a small team.",
)
_BEGINNINGS = (
    "Explain how {a} changes when {b} {c}.",
    "Write two sentences about {a} and {b}.",
    "What should I know about {a} before {b} {c}?",
    "Give me a short list of reasons why {b} {c}.",
    "Is it true that {a} depends on {b}, and that {b} {c}?",
    "Translate into French: the {a} was late because {b} {c}.",
    "Rewrite this so that it sounds friendlier: {a} is not done until {b} {c}.",
)
_MORE = (
    "It matters for {a}.",
    "Last week {b} {c}, and nobody noticed.",
    "Please keep {a} in mind.",
    "We tried {a} first, then {b}.",
    "My colleague thinks that {b} {c} every year.",
    "The budget for {a} is {n}.",
)
_THINGS = (
    "the harbour",
    "a garden",
    "the invoice",
    "this function",
    "our team",
    "the weather in May",
    "the old bridge",
    "a database index",
    "the recipe",
    "a train timetable",
    "the second chapter",
    "a bicycle",
    "the contract",
    "this dataset",
    "the river",
    "a violin",
    "the test suite",
    "her thesis",
    "a small business",
    "the museum",
    "this shader",
    "the vaccine",
    "a savings plan",
    "the kitchen",
)
_DOES = (
    "runs out of time",
    "is renewed",
    "grows faster than planned",
    "breaks",
    "is moved to the north",
    "costs more than before",
    "returns nothing",
    "is sold",
    "has to be explained to children",
    "opens late",
    "fails twice",
    "gets a new owner",
)


LONG_CHARACTERS = 3000
"""Characters of a long test prompt, some 700 tokens: about what conversations have."""


def long_prompt(max_model_len: int) -> int:
    """Return how many characters a long prompt may have for a model that reads so many tokens."""
    return min(LONG_CHARACTERS, max_model_len // 2)


def probe(
    rng: random.Random, model: str, characters: int = 0, share_of_chats: float = CHATS
) -> dict[str, Any]:
    """Return the body of a test prompt: of a chat, or else of a completion.

    characters: how many its text has at least, as far as whole sentences allow; 0: few, any number.
    """
    chats = rng.random() < share_of_chats
    system = rng.choice(_SYSTEMS) if chats and rng.random() < SYSTEMS else ""
    text = _sentence(rng, _BEGINNINGS)
    sentences = characters or int(rng.expovariate(0.4))
    for _ in range(sentences):
        longer = f"{text} {_sentence(rng, _MORE)}"
        if len(longer) + len(system) > (characters or MOST_CHARACTERS):
            break
        text = longer
    body: dict[str, Any] = {"model": model, "max_tokens": rng.randint(LEAST_TOKENS, MOST_TOKENS)}
    if chats:
        said = [{"role": "system", "content": system}] if system else []
        body["messages"] = [*said, {"role": "user", "content": text}]
    else:
        body["prompt"] = text
    if rng.random() < 0.7:
        body["temperature"] = rng.choice((0.0, 0.2, 0.5, 0.7, 1.0))
    if rng.random() < 0.2:
        body["top_p"] = rng.choice((0.9, 0.95))
    if rng.random() < STREAMS:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def as_completion(chat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same as a completion, for a model that has no chat template."""
    body = {name: value for name, value in chat.items() if name != "messages"}
    return body | {"prompt": " ".join(one["content"] for one in chat["messages"])}


def as_embedding(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text of a test prompt as one to be embedded, for a model that makes vectors."""
    plain = as_completion(body) if "messages" in body else body
    return {"model": plain["model"], "input": plain["prompt"]}


def _sentence(rng: random.Random, shapes: tuple[str, ...]) -> str:
    a, b = rng.sample(_THINGS, 2)
    text = rng.choice(shapes).format(a=a, b=b, c=rng.choice(_DOES), n=rng.randint(200, 90_000))
    return text[:1].upper() + text[1:]
