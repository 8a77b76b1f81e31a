"""What a request's size and salted hashes cost."""

import json
import random
import statistics
import time
from typing import Any

from fleet_client.prefix_hashes import Hasher, Served
from fleet_client.token_estimate import estimate_body, read_body


def measure_hashes(rounds: int) -> dict[str, dict[str, float]]:
    """Return medians in microseconds, by the shape of the request."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(2000)]

    def text(size: int) -> str:
        return " ".join(rng.choices(words, k=size // 6))[:size]

    def chat(messages: int, size: int) -> dict[str, Any]:
        roles = ("user", "assistant")
        return {"messages": [{"role": roles[n % 2], "content": text(size)} for n in range(messages)]}

    shapes: dict[str, dict[str, Any]] = {
        "a question of 200 bytes": chat(1, 200),
        "one message of 4 kB": chat(1, 4096),
        "20 messages, 16 kB": chat(20, 820),
        "200 messages, 160 kB": chat(200, 820),
        "one message of 256 kB": chat(1, 2**18),
        "one message of 4 MB": chat(1, 2**22),
        "8,192 token ids": {"prompt": [rng.randrange(100_000) for _ in range(8192)]},
    }
    return {name: _hash_cost(json.dumps(body).encode(), rounds) for name, body in shapes.items()}


def _hash_cost(raw: bytes, rounds: int) -> dict[str, float]:
    hasher, served, target = Hasher(b"bench " * 4), Served(), "/v1/chat/completions"
    times: dict[str, list[float]] = {"read_us": [], "hash_us": [], "note_us": []}
    made: tuple[str, ...] = ()
    for _ in range(rounds):
        begun = time.perf_counter()
        said = read_body("POST", raw)
        size = estimate_body("POST", target, raw, said)
        read = time.perf_counter()
        made = hasher.hashes(target, said, size)
        hashed = time.perf_counter()
        served.blocks(made)
        served.note(made, 1)
        noted = time.perf_counter()
        for name, took_s in zip(times, (read - begun, hashed - read, noted - hashed), strict=True):
            times[name].append(took_s)
    medians = {name: round(statistics.median(some) * 1e6, 1) for name, some in times.items()}
    hashed_kb = len(made) * 1.024
    return {"kB": round(len(raw) / 1e3, 1), "blocks": len(made), **medians} | (
        {"hash_us_per_kB": round(medians["hash_us"] / hashed_kb, 2)} if made else {}
    )
