"""What users send in a live run: drawn ahead, all of it, from the seed.

Nothing that happens in the run changes it (open loop): a slow answer never delays the next arrival. Prompts
are token ids, so that every engine counts the same number, and `ignore_eos` makes answers as long as drawn.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.profiles import PROFILES, get_profile
from fleet_client.flags import flag
from process.errors import ConfigError

LENGTH_SIGMA = (0.81, 0.68)
"""Sigma of the log-normal lengths of prompts and answers: the spread (standard deviation over mean, 0.96 and
0.77) of the Azure conversation log of 2023-11."""

TOKEN_IDS = (3, 256)
"""First id and number of ids that prompts are made of: every vocabulary has these; 0 to 2 are often
special."""


LOCAL_SCHEDULE = (1.0, 3.0, 4.0, 1.0, 0.5, 0.5)
"""Multiples of the users with --local: the fleet grows beyond one instance and falls again, in a minute."""


def parse_schedule(text: str) -> tuple[float, ...]:
    """Return the load multiples in a text like "1,3,0.5"; raise ConfigError that says what was wanted."""
    try:
        multiples = tuple(float(part) for part in text.split(","))
    except ValueError:
        multiples = ()
    if not multiples or not all(0.0 <= m <= 1000.0 for m in multiples):
        raise ConfigError("wanted numbers from 0 to 1000 with commas between")
    return multiples


@dataclass(frozen=True)
class Workload:
    """What users send, and how long they wait for it, as flags of sim.py. Lengths in tokens.

    load_schedule: multiples of the users over equal slices of the run. wait_s: the loadbalancer has the same
    bound. request_timeout_s: from the moment a request is due to the end of its answer.
    """

    num_iterations: int = flag(60, "rounds of the run", least=1, most=1_000_000, unit="rounds")
    round_s: float = flag(1.0, "seconds of a round", least=0.01, most=3600.0)
    base_num_users: int = flag(20, "users, before the schedule", least=0, most=1_000_000, unit="users")
    # 20 users: 2 requests/s, half of what one RTX 4090 can do with vllm-13
    request_probability: float = flag(
        0.1, "probability that a user sends a request in a round", least=0.0, most=1.0
    )
    load_schedule: tuple[float, ...] = flag(
        (1.0,),
        "multiples of the users, over equal slices of the run",
        metavar="M,M,…",
        shown=f"1; with --local and the paced engine {','.join(f'{m:g}' for m in LOCAL_SCHEDULE)}",
        read=parse_schedule,
    )
    streaming: bool = flag(True, "have answers streamed")
    model: str = flag("vllm-13", f"profile of the model, one of {', '.join(PROFILES)}", metavar="NAME")
    profiles: Path | None = flag(
        None,
        "file of your own model profiles, TOML (docs/models.md)",
        shown="profiles.toml here",
    )
    prompt_tokens: float = flag(300.0, "mean length of prompts", metavar="N", unit="tokens")
    max_tokens: float = flag(180.0, "mean length of answers", metavar="N", unit="tokens")
    seed: int = flag(
        0, "number from which everything is drawn", least=0, most=2**63 - 1, shown="random, and printed"
    )
    wait_s: float = flag(30.0, "seconds that /route may hold a request", least=0.0, most=600.0)
    request_timeout_s: float = flag(
        120.0, "seconds for a request, all tries together", least=0.1, most=86_400.0
    )


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request that a live run is to send. at_s: when it is due, seconds since the start of the run."""

    number: int
    at_s: float
    prompt_tokens: int
    max_tokens: int


def plan(load: Workload) -> list[Arrival]:
    """Return all requests of the run, sorted by time; the same workload gives the same list.

    Lengths are log-normal with the means asked for, cut so that prompt and answer fit the model's context.
    """
    rng = random.Random(load.seed)
    longest = get_profile(load.model).max_model_len
    due: list[float] = []
    for n in range(load.num_iterations):
        multiple = load.load_schedule[n * len(load.load_schedule) // load.num_iterations]
        for _ in range(round(load.base_num_users * multiple)):
            if rng.random() < load.request_probability:
                due.append((n + rng.random()) * load.round_s)  # noqa: PERF401 two draws, in this order
    arrivals = []
    for number, at_s in enumerate(sorted(due)):
        output = _length(rng, load.max_tokens, LENGTH_SIGMA[1], longest - 1)
        prompt = _length(rng, load.prompt_tokens, LENGTH_SIGMA[0], longest - output)
        arrivals.append(Arrival(number, at_s, prompt, output))
    return arrivals


def _length(rng: random.Random, mean: float, sigma: float, most: int) -> int:
    # exp(mu + sigma²/2) is the mean of a log-normal
    return min(most, max(1, round(rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma))))


def body_of(arrival: Arrival, model: str, streaming: bool, seed: int) -> dict[str, Any]:
    """Return the JSON body of a request to the model server.

    Its prompt is unlike all others, so that no prefix cache can help.
    """
    first, ids = TOKEN_IDS
    raw = random.Random((seed << 32) + arrival.number).randbytes(arrival.prompt_tokens)
    body: dict[str, Any] = {
        "model": model,
        "prompt": [first + b % ids for b in raw],
        "max_tokens": arrival.max_tokens,
        "ignore_eos": True,
        "stream": streaming,
    }
    if streaming:
        body["stream_options"] = {"include_usage": True}
    return body
