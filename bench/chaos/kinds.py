"""The kinds of faults: each has a name, and what it does until its time is over.

A kind is a context: entered it is on, left it is off, and all is as it was, as far as it can be. `strike` in
campaign.py enters it in a thread of its own for as long as the schedule says.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from bench.chaos.stack import Stack
from bench.chaos.truth import Truth


class NotNow(Exception):
    """This fault has nothing to strike at the moment."""


@dataclass
class Scene:
    """Where a fault strikes. for_s: how long it will last; rng: of this fault alone."""

    stack: Stack
    truth: Truth
    rng: random.Random
    for_s: float
    words: list[str]

    def say(self, text: str) -> None:
        """Tell in the log of faults what was struck."""
        self.words.append(text)


Effect = Callable[[Scene], AbstractContextManager[None]]


@dataclass(frozen=True)
class Kind:
    """A kind of fault. lasts_s: from, to. alone: others of that word are not on at the same time.

    dark: while it is on no machine can serve, whatever we do. tags: it strikes in some seeds only.
    """

    name: str
    effect: Effect
    lasts_s: tuple[float, float] = (3.0, 12.0)
    alone: str = ""
    tags: frozenset[str] = frozenset()
    dark: bool = False


def running(scene: Scene, states: tuple[str, ...] = ("running",)) -> list[dict[str, object]]:
    """Return the rows of machines that run now; raise NotNow when none does."""
    with scene.truth.lock:
        found = [row for row in scene.truth.rows if row["state"] in states and row["pids"]]
    if not found:
        raise NotNow
    return found


def all_kinds() -> Mapping[str, Kind]:
    """Return every kind that there is, by name."""
    from bench.chaos import kinds_client, kinds_cloud, kinds_host, kinds_own

    return {kind.name: kind for kind in _of(kinds_own, kinds_cloud, kinds_host, kinds_client)}


def _of(*modules: object) -> Iterator[Kind]:
    for module in modules:
        yield from module.KINDS  # type: ignore[attr-defined]
