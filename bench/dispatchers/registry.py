"""All rules that are compared, by the names of tables and flags."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from bench.dispatchers.clairvoyant import Clairvoyant, ClairvoyantHere, ClairvoyantWhole
from bench.dispatchers.dynamo import DynamoKv
from bench.dispatchers.epp import Epp
from bench.dispatchers.plain import InstanceAware, LeastInFlight, PowerOfTwo, Random, RoundRobin
from bench.dispatchers.rule import Fleet, Rule
from bench.dispatchers.smg import CacheAwareNew, CacheAwareOld, LeastLoad, LMetric
from bench.dispatchers.vast import VastQueueTime

Make = Callable[[Fleet, random.Random], Rule]


@dataclass(frozen=True)
class Entry:
    """A rule. make: None for ours, whose options are keywords of `Ours`. peer: one of others'.

    listed: whether it is among those that ours is to be better than.
    """

    title: str
    make: Make | None
    peer: bool = True
    listed: bool = True
    holds: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


RULES: Mapping[str, Entry] = MappingProxyType(
    {
        "ours": Entry("ours", None, peer=False),
        "ours-polls": Entry("ours, polls only", None, peer=False, options={"pushes": False}),
        "ours-whole": Entry("ours, weight 1", None, peer=False, options={"weight": 1.0}),
        "clairvoyant": Entry("clairvoyant", Clairvoyant, peer=False),
        "clairvoyant-here": Entry("clairvoyant, of those there", ClairvoyantHere, peer=False),
        "clairvoyant-whole": Entry("clairvoyant, weights 1 1 ½", ClairvoyantWhole, peer=False),
        "round-robin": Entry("round robin", RoundRobin),
        "random": Entry("random", Random),
        "power-of-two": Entry("power of two", PowerOfTwo),
        "least-in-flight": Entry("least in-flight", LeastInFlight),
        # Told the true rate of each GPU for the very trace: which no other of these is.
        "instance-aware": Entry("least in-flight / GPU's rate", InstanceAware, listed=False),
        "smg-least-load": Entry("SMG least_load", LeastLoad),
        "cache-aware-old": Entry("cache_aware, old", CacheAwareOld),
        "cache-aware": Entry("cache_aware, new", CacheAwareNew),
        "lmetric": Entry("LMetric", LMetric),
        "dynamo": Entry("Dynamo KV", DynamoKv),
        "epp": Entry("llm-d EPP 2/2/3", Epp),
        "vast": Entry("Vast queue time", VastQueueTime),
    }
)
