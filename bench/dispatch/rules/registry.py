"""All rules that are compared, by the names of tables and flags."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from bench.dispatch.rules.clairvoyant import Clairvoyant, ClairvoyantHere, ClairvoyantWhole
from bench.dispatch.rules.dynamo import DynamoKv
from bench.dispatch.rules.epp import Epp
from bench.dispatch.rules.plain import InstanceAware, LeastInFlight, PowerOfTwo, Random, RoundRobin
from bench.dispatch.rules.rule import DispatchRule, ServerFleet
from bench.dispatch.rules.smg import CacheAwareNew, CacheAwareOld, LeastLoad, LMetric
from bench.dispatch.rules.vast import VastQueueTime

Make = Callable[[ServerFleet, random.Random], DispatchRule]


@dataclass(frozen=True)
class RuleEntry:
    """A rule. make: None for ours, whose options are keywords of `Ours`. peer: one of others'.

    listed: whether it is among those that ours is to be better than.
    """

    title: str
    make: Make | None
    peer: bool = True
    listed: bool = True
    holds: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


RULES: Mapping[str, RuleEntry] = MappingProxyType(
    {
        "ours": RuleEntry("ours", None, peer=False),
        "ours-polls": RuleEntry("ours, polls only", None, peer=False, options={"pushes": False}),
        "ours-whole": RuleEntry("ours, weight 1", None, peer=False, options={"weight": 1.0}),
        "clairvoyant": RuleEntry("clairvoyant", Clairvoyant, peer=False),
        "clairvoyant-here": RuleEntry("clairvoyant, of those there", ClairvoyantHere, peer=False),
        "clairvoyant-whole": RuleEntry("clairvoyant, weights 1 1 ½", ClairvoyantWhole, peer=False),
        "round-robin": RuleEntry("round robin", RoundRobin),
        "random": RuleEntry("random", Random),
        "power-of-two": RuleEntry("power of two", PowerOfTwo),
        "least-in-flight": RuleEntry("least in-flight", LeastInFlight),
        # Told the true rate of each GPU for the very trace: which no other of these is.
        "instance-aware": RuleEntry("least in-flight / GPU's rate", InstanceAware, listed=False),
        "smg-least-load": RuleEntry("SMG least_load", LeastLoad),
        "cache-aware-old": RuleEntry("cache_aware, old", CacheAwareOld),
        "cache-aware": RuleEntry("cache_aware, new", CacheAwareNew),
        "lmetric": RuleEntry("LMetric", LMetric),
        "dynamo": RuleEntry("Dynamo KV", DynamoKv),
        "epp": RuleEntry("llm-d EPP 2/2/3", Epp),
        "vast": RuleEntry("Vast queue time", VastQueueTime),
    }
)
