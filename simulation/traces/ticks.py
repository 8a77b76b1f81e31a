"""Requests whose times are rounded get places of their own."""

import random
from collections.abc import Iterable, Iterator

from simulation.traces.request import Request


def spread(
    requests: Iterable[Request], tick_s: float, rng: random.Random, *, alone: bool
) -> Iterator[Request]:
    """Move requests of one moment to places of their own before the next.

    alone: also those whose time no other request has.
    """
    together: list[Request] = []
    for request in requests:
        if together and request.at_s != together[0].at_s:
            yield from _placed(together, min(tick_s, request.at_s - together[0].at_s), rng, alone)
            together = []
        together.append(request)
    yield from _placed(together, tick_s, rng, alone)


def _placed(together: list[Request], room_s: float, rng: random.Random, alone: bool) -> Iterator[Request]:
    if len(together) == 1 and not alone:
        yield from together
        return
    places = sorted(rng.random() * room_s for _ in together)
    for (at, prompt, output, session), place in zip(together, places, strict=True):
        yield Request(min(at + place, at + room_s), prompt, output, session)
