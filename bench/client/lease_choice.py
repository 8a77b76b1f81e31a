"""Which lease a request takes: conversations against a made-up fleet, in made-up time."""

import random

from fleet_client.leases import ClientLease
from fleet_client.leases_ahead import READ_S, LeasesAhead
from fleet_client.prefix_hashes import BLOCK_TOKENS, Served
from fleet_client.token_estimate import TokenEstimate

WAYS = ("oldest", "nearest", "client", "asked")


def measure_ahead(instances: int, route_s: float, turns: float, requests: int = 4000) -> dict[str, float]:
    """Return milliseconds a request, by the way of taking leases.

    There are no queues, and instances keep what they have read.

    turns: of a conversation, on average. Its prompt has 4 blocks, and 2 more each turn; 20 requests/s.
    """
    return {way: round(_mean_wait_s(way, instances, route_s, turns, requests) * 1e3, 1) for way in WAYS}


def _mean_wait_s(way: str, instances: int, route_s: float, turns: float, requests: int) -> float:
    rng = random.Random(1)
    ahead, served = LeasesAhead(8), Served()
    ahead.answered(route_s)
    told: dict[str, int] = {}  # what the loadbalancer knows
    has_read: list[set[str]] = [set() for _ in range(instances)]
    live: list[list[str]] = []
    now, waited_s, size = 0.0, 0.0, TokenEstimate(1500, 100)
    for n in range(requests):
        now += rng.expovariate(20.0)
        follows = bool(live) and rng.random() > 1.0 / turns
        prompt = live.pop(rng.randrange(len(live))) if follows else []
        prompt = prompt + [f"{n}-{block}" for block in range(2 if prompt else 4)]
        live = [*live, prompt][-40:]
        near = {} if way == "oldest" else served.blocks(prompt)
        ask = way == "asked" or (way == "client" and ahead.better_asked(len(prompt), near, (), now))
        lease = None if ask else ahead.take(size, now, (), near)
        if lease is None:
            waited_s += route_s
            where = next((told[one] for one in reversed(prompt) if one in told), rng.randrange(instances))
            told |= dict.fromkeys(prompt, where)
        else:
            where = lease.instance_id
        ahead.sweep(now)
        while way != "asked" and (wanted := ahead.want(now)):
            places = [rng.randrange(instances) for _ in range(wanted)]
            ahead.arrived(
                [ClientLease("", "", one, now, now + 600.0, "", None) for one in places], wanted, now
            )
        waited_s += READ_S * BLOCK_TOKENS * sum(one not in has_read[where] for one in prompt)
        has_read[where].update(prompt)
        served.note(prompt, where)
    return waited_s / requests
