"""The kinds of faults: each has a name, and what it does until its time is over.

A kind is a context: entered it is on, left it is off, and all is as it was, as far as it can be. `strike` in
campaign.py enters it in a thread of its own for as long as the schedule says.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType

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


GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "kill-loadbalancer": ("kill-loadbalancer-1", "kill-loadbalancer-2"),
        "kill-gateway": ("kill-gateway-1", "kill-gateway-2"),
        "stop-loadbalancer": ("stop-loadbalancer-1", "stop-loadbalancer-2"),
        "stop-gateway": ("stop-gateway-1", "stop-gateway-2"),
        "ledger-spoilt": ("ledger-damaged", "ledger-cut", "ledger-lost"),
        "clock-step": ("clock-forward", "clock-back"),
        "cloud:list-errors": ("cloud:list-429", "cloud:list-500"),
        "cloud:ssh": ("cloud:ssh-hangs", "cloud:ssh-refuses"),
        "host:unknown-requests": ("host:huge-load", "host:strangers"),
        "host:odd-values": (
            *("host:giant-numbers", "host:negative-numbers", "host:texts-for-numbers", "host:nested"),
            *("host:missed-for-ever", "host:number-of-the-future", "host:surrogates"),
        ),
        "host:endless-answer": (
            *("host:endless-body", "host:endless-headers", "host:endless-interim", "host:slow-head"),
        ),
        "host:grey": ("host:engine-grey", "host:engine-slow"),
        "host:redirects": ("host:auth-redirects", "host:engine-redirects"),
        "host:endless-log": ("host:endless-line", "host:growing-log"),
        "client:hoarder": ("client:hoards", "client:hoards-first"),
    }
)
"""Variants that count as one kind: the same is done to the same, and only which of two processes it meets
differs, or which wrong number or text is said."""

_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


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

    def draw_s(self, rng: random.Random) -> float:
        """Return for how long it lasts this time; those of one seed only are mostly short, to come often."""
        least, most = self.lasts_s
        return least + (most - least) * rng.random() ** (3 if self.tags else 1)


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


def group_of(name: str) -> str:
    """Return as which kind a fault of that name counts."""
    return _GROUP_OF.get(name, name)


def _of(*modules: object) -> Iterator[Kind]:
    for module in modules:
        yield from module.KINDS  # type: ignore[attr-defined]
