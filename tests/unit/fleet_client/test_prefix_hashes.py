"""Salted hashes of prompts' beginnings: equal where prompts begin alike, and nothing else is in them."""

import hashlib
import json
import random
import re
from typing import Any

import pytest

from fleet_client.prefix_hashes import BLOCK, MOST_BLOCKS, Hasher, Served, canonical
from fleet_client.token_estimate import estimate_body, read_body

SALT = b"a salt of the test's own"
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def hashes(body: object, target: str = CHAT, salt: bytes = SALT) -> tuple[str, ...]:
    """Those of a request, as it comes from a client."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    said = read_body("POST", raw)
    return Hasher(salt).hashes(target, said, estimate_body("POST", target, raw, said))


def text(seed: int, size: int) -> str:
    """So many letters that no other seed has."""
    rng = random.Random(seed)
    return "".join(rng.choice("abcdefgh ") for _ in range(size))


def message(role: str, content: object, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": list(messages), **more}


SYSTEM = message("system", text(1, 5000))
QUESTION = message("user", text(2, 3000))
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": text(3, 3000),
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def common(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """How many of the first hashes are the same; the others have nothing to do with each other."""
    n = 0
    while n < min(len(one), len(other)) and one[n] == other[n]:
        n += 1
    assert not set(one[n:]) & set(other[n:])
    return n


def test_there_is_one_hash_for_each_whole_block_and_none_for_the_rest() -> None:
    for size in (0, 10, 1000, 1022, 1024, 2046, 2048, 10_000):
        made = hashes({"prompt": text(1, size)}, COMPLETIONS)
        assert len(made) == size // BLOCK
        assert all(re.fullmatch("[0-9a-f]{16}", one) for one in made)
        assert len(set(made)) == len(made)


def test_the_same_prompt_has_the_same_hashes_however_it_is_written() -> None:
    plain = hashes(chat(SYSTEM, QUESTION))
    assert len(plain) == 7
    said = {"stream": True, "messages": [dict(reversed(m.items())) for m in (SYSTEM, QUESTION)], "n": 2}
    assert hashes(json.dumps(said, indent=3).encode()) == plain
    parts = [message(m["role"], [{"type": "text", "text": m["content"]}]) for m in (SYSTEM, QUESTION)]
    assert hashes(chat(*parts)) == plain
    assert hashes(chat(SYSTEM | {"name": None, "tool_calls": []}, QUESTION)) == plain
    assert hashes(chat(SYSTEM, QUESTION, tools=[], temperature=0.3, user="somebody")) == plain
    turned = {"function": dict(reversed(TOOL["function"].items())), "type": "function"}
    assert hashes(chat(SYSTEM, tools=[turned])) == hashes(chat(SYSTEM, tools=[TOOL]))


def test_a_mark_that_moves_from_turn_to_turn_is_no_part_of_the_prompt() -> None:
    def turn(marked: int) -> tuple[str, ...]:
        parts: list[dict[str, Any]] = [{"type": "text", "text": text(n, 2000)} for n in range(3)]
        parts[marked]["cache_control"] = {"type": "ephemeral"}
        return hashes(chat(message("user", parts)))

    assert turn(0) == turn(2)


@pytest.mark.parametrize("seed", range(5))
def test_a_conversation_that_grows_by_a_turn_keeps_all_its_hashes(seed: int) -> None:
    rng = random.Random(seed)
    messages = [message("system", text(seed, rng.randrange(4000)))]
    before: tuple[str, ...] = ()
    for n in range(30):
        role = ("user", "assistant", "tool")[n % 3]
        more = {"tool_call_id": f"c{n}"} if role == "tool" else {}
        messages.append(message(role, text(1000 * seed + n, rng.randrange(3000)), **more))
        now = hashes(chat(*messages, tools=[TOOL]))
        assert now[: len(before)] == before
        before = now
    assert len(before) > 20


def test_conversations_share_their_tools_and_system_prompt_and_no_more() -> None:
    one = hashes(chat(SYSTEM, QUESTION, tools=[TOOL]))
    other = hashes(chat(SYSTEM, message("user", text(9, 3000)), tools=[TOOL]))
    assert common(one, other) == (len(text(1, 5000)) + len(text(3, 3000))) // BLOCK
    assert common(one, hashes(chat(SYSTEM, QUESTION))) == 0  # tools come first where there are any
    assert common(one, hashes(chat(QUESTION, SYSTEM, tools=[TOOL]))) == 3  # only the tools


def test_a_hash_is_of_all_that_stands_before_it() -> None:
    prompt = text(1, 10 * BLOCK)
    whole = hashes({"prompt": prompt}, COMPLETIONS)
    for at in (0, 3, 9):
        changed = prompt[: at * BLOCK + 500] + "X" + prompt[at * BLOCK + 501 :]
        assert common(whole, hashes({"prompt": changed}, COMPLETIONS)) == at
    swapped = prompt[BLOCK : 2 * BLOCK] + prompt[:BLOCK] + prompt[2 * BLOCK :]
    assert common(whole, hashes({"prompt": swapped}, COMPLETIONS)) == 0


def test_the_role_of_a_message_counts() -> None:
    assert common(hashes(chat(SYSTEM, QUESTION)), hashes(chat(SYSTEM | {"role": "user"}, QUESTION))) == 0


def test_another_salt_makes_other_hashes_of_the_same_prompt() -> None:
    body = chat(SYSTEM, QUESTION)
    seen: set[str] = set()
    for n in range(20):
        made = set(hashes(body, salt=SALT + bytes([n])))
        assert not made & seen
        seen |= made
    assert not seen & set(hashes(body))


def test_no_hash_is_one_that_can_be_made_without_the_salt() -> None:
    """Of any block, prefix or whole prompt, by any usual hash, of any length, with the salt left out."""
    body = chat(message("user", "a" * 20_000))
    made = hashes(body)
    assert len(made) == 19
    raw = canonical(body, 10**6, b"")
    known: set[str] = set()
    texts = [raw, *(raw[n : n + BLOCK] for n in range(0, len(raw), BLOCK))]
    texts += [raw[:n] for n in range(BLOCK, len(raw), BLOCK)] + [b"a" * n for n in range(900, 1100)]
    for data in texts:
        for size in (8, 16, 32, 64):
            known.add(hashlib.blake2b(data, digest_size=size).hexdigest()[:16])
            known.add(hashlib.blake2b(data, digest_size=size, key=b"\0" * 32).hexdigest()[:16])
        for name in ("md5", "sha1", "sha256", "sha512", "blake2s", "sha3_256"):
            known.add(hashlib.new(name, data).hexdigest()[:16])
    assert not known & set(made)
    assert not any(one in repr(Hasher(SALT).__dict__) for one in made)
    assert SALT.decode() not in repr(Hasher(SALT).__dict__)


def test_hashes_say_nothing_of_what_is_within_a_block() -> None:
    """A prompt of one letter and one of noise look alike: all hashes differ, and no bit is more often set."""
    made = [
        one for n in range(40) for one in hashes({"prompt": chr(97 + n % 26) * 8192 + str(n)}, COMPLETIONS)
    ]
    made = list(dict.fromkeys(made))
    assert len(made) == 26 * 8  # one for each prefix, and the same letters have the same ones
    ones = sum(int(one, 16).bit_count() for one in made) / (64 * len(made))
    assert 0.47 < ones < 0.53


def test_there_are_at_most_256_of_them() -> None:
    long = {"prompt": text(1, 300_000)}
    assert len(hashes(long, COMPLETIONS)) == MOST_BLOCKS == 256
    longer = {"prompt": long["prompt"] + text(2, 4_000_000)}
    assert hashes(longer, COMPLETIONS) == hashes(long, COMPLETIONS)


def test_there_are_no_more_than_the_blocks_of_the_tokens_that_are_told() -> None:
    many = chat(*(message("user", "x") for _ in range(2000)))
    said = read_body("POST", json.dumps(many).encode())
    size = estimate_body("POST", CHAT, b"{}", said)
    assert 0 < len(hashes(many)) <= size.prompt_tokens // 256


def test_a_prompt_of_ids_has_a_block_for_256_of_them() -> None:
    ids = [random.Random(1).randrange(100_000) for _ in range(1000)]
    made = hashes({"prompt": ids}, COMPLETIONS)
    assert len(made) == 3
    assert hashes({"prompt": ids + [5] * 600}, COMPLETIONS)[:3] == made
    assert common(made, hashes({"prompt": [*ids[:600], 7, *ids[601:]]}, COMPLETIONS)) == 2


def test_of_several_prompts_it_is_the_first() -> None:
    one, other = text(1, 5000), text(2, 5000)
    assert hashes({"prompt": [one, other]}, COMPLETIONS) == hashes({"prompt": one}, COMPLETIONS)
    ids = list(range(1000))
    assert hashes({"prompt": [ids, [1, 2]]}, COMPLETIONS) == hashes({"prompt": ids}, COMPLETIONS)


def test_the_other_shapes_of_a_chat_have_hashes_too() -> None:
    one = hashes({"instructions": text(1, 5000), "input": text(2, 3000)}, RESPONSES)
    assert len(one) == 7
    items = [{"role": "user", "content": [{"type": "input_text", "text": text(2, 3000)}]}]
    other = hashes({"instructions": text(1, 5000), "input": items}, RESPONSES)
    assert common(one, other) == 4
    system = {"system": text(1, 5000), "messages": [QUESTION]}
    assert common(hashes(system, "/v1/messages"), one) == 4


def test_a_picture_counts_as_it_is_sized_and_another_one_is_another() -> None:
    def look(content: str, before: str = "look at this: ") -> tuple[str, ...]:
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}
        return hashes(chat(message("user", [{"type": "text", "text": before}, picture])))

    one = look("A" * 500_000)
    assert len(one) == 3  # 1000 tokens
    assert one == look("A" * 500_000)
    assert common(one, look("A" * 499_999 + "B")) == 0
    assert common(look("A" * 9, text(1, 3000)), look("B" * 9, text(1, 3000))) == 2


@pytest.mark.parametrize("target", ["/v1/embeddings", "/v1/score", "/tokenize"])
def test_what_makes_no_text_has_none(target: str) -> None:
    assert hashes({"input": text(1, 5000)}, target) == ()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        [1, 2],
        {},
        {"prompt": None},
        {"prompt": 5},
        {"prompt": [-1] * 1000},
        {"prompt": [10**30] * 1000},
        {"prompt": [1, None, "x"] * 400},
        {"prompt": [1.5] * 1000},
        {"prompt": [[], [1] * 1000]},
        {"messages": {"role": ["x" * 2000], "content": {"type": 5, "text": [None]}}},
        {"messages": [None, 5, "x" * 2000, ["y"], {"content": {"deep": [True, False, 0]}}]},
        {"messages": [message("user", [{"type": "image", "image": {"type": "image", "x": [1]}}] * 3)]},
        {"prompt": "\ud800" * 2000},
        ('{"messages":' + "[" * 900 + '"' + "x" * 5000 + '"' + "]" * 900 + "}").encode(),
        ('{"messages":' + '{"type":"image","a":' * 300 + '"x"' + "}" * 300 + "}").encode(),
    ],
    ids=range(17),
)
def test_no_body_is_too_odd(body: object) -> None:
    for target in (CHAT, COMPLETIONS, RESPONSES):
        made = hashes(body, target)
        assert hashes(body, target) == made
        assert len(made) <= 16


def test_a_salt_that_can_be_guessed_is_refused_without_being_shown() -> None:
    with pytest.raises(ValueError, match=r"^affinity_salt: wanted at least 16 bytes, got 11$"):
        Hasher(b"hello world")


# -- who has read what ---------------------------------------------------------------------------------


def test_the_instances_that_have_answered_a_prefix_are_known_with_its_length() -> None:
    served = Served()
    served.note(["a", "b", "c"], 1)
    served.note(["a", "b", "x", "y"], 2)
    assert served.blocks(["a", "b", "c", "d"]) == {1: 3, 2: 2}
    assert served.blocks(["a", "q"]) == {2: 1, 1: 1}
    assert served.blocks(["q"]) == served.blocks([]) == {}


def test_what_was_served_longest_ago_is_forgotten_and_so_are_too_many_instances() -> None:
    served = Served(most=3)
    for number in range(10):
        served.note(["a"], number)
    assert served.blocks(["a"]) == {9: 1, 8: 1, 7: 1, 6: 1}
    served.note(["b", "c"], 1)
    served.note(["a", "d"], 1)
    assert len(served) == 3
    assert served.blocks(["b"]) == {}
    assert list(served.blocks(["a"])) == [1, 9, 8, 7]
