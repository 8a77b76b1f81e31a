"""Made-up traffic for those who have no log: a daily profile, bursts, and lengths with long tails.

    rate(t) = rate * hour(t) * burst(t)

Requests come as a Poisson process of that rate. Bursts begin at random, as many an hour as are asked for, and
last an exponential time; in one the rate is `height` times what it is otherwise, and the rest is lowered so
that the mean stays. Lengths are log-normal, given by mean and 95th percentile, as logs are described.
Requests know nothing of each other but for the bursts, so this is kinder to a policy than most real days.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields

from errors import ConfigError
from simulation.traces import HOUR_FACTORS, Request

MOST_TOKENS = 100_000


@dataclass(frozen=True)
class Synthetic:
    """What the traffic is like. Defaults are near the Azure conversation log of 2023 in lengths.

    days: how long. rate: requests/s on average. swing: 0 for a flat day, 1 for the daily profile as published
    for ServeGen's m-small, 2 for twice its swing. bursts: an hour; burst_s: mean length; height: times the
    usual rate. prompt, prompt_p95, output, output_p95: tokens, mean and 95th percentile.
    """

    days: float = 1.0
    rate: float = 2.0
    swing: float = 1.0
    bursts: float = 4.0
    burst_s: float = 60.0
    height: float = 3.0
    prompt: float = 1155.0
    prompt_p95: float = 4083.0
    output: float = 211.0
    output_p95: float = 451.0

    def __post_init__(self) -> None:
        """Refuse what is no traffic: ConfigError names the parameter, the value and the range."""
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(f"synthetic {name} {value:g}: wanted {least:g} to {most:g}")
        if self.bursts * self.burst_s * self.height > 0.9 * 3600.0 * max(1.0, self.height):
            raise ConfigError(
                f"synthetic: {self.bursts:g} bursts an hour of {self.burst_s:g} s leave no rest"
            )
        for name in ("prompt", "output"):
            mean, p95 = getattr(self, name), getattr(self, f"{name}_p95")
            if not mean < p95 <= _most_p95(mean):
                raise ConfigError(
                    f"synthetic {name}_p95 {p95:g}: wanted over the mean, {mean:g}, and at most "
                    f"{_most_p95(mean):.4g}, which is as far as a log-normal goes"
                )


_RANGES = (
    ("days", 0.001, 366.0),
    ("rate", 1e-4, 1e5),
    ("swing", 0.0, 2.0),
    ("bursts", 0.0, 3600.0),
    ("burst_s", 1.0, 3600.0),
    ("height", 1.0, 100.0),
    ("prompt", 1.0, MOST_TOKENS),
    ("prompt_p95", 1.0, MOST_TOKENS),
    ("output", 1.0, MOST_TOKENS),
    ("output_p95", 1.0, MOST_TOKENS),
)

_Z95 = 1.6448536269514722
"""95th percentile of the standard normal distribution."""


def _most_p95(mean: float) -> float:
    # p95 / mean = exp(z s - s²/2) is largest at s = z.
    return mean * math.exp(_Z95 * _Z95 / 2.0)


def _log_normal(mean: float, p95: float) -> tuple[float, float]:
    """mu and sigma with that mean and 95th percentile: z s - s²/2 = log(p95 / mean), the smaller root."""
    ratio = math.log(p95 / mean)
    sigma = _Z95 - math.sqrt(max(0.0, _Z95 * _Z95 - 2.0 * ratio))
    return math.log(mean) - sigma * sigma / 2.0, sigma


def parse(text: str) -> Synthetic:
    """`days=2,rate=1.5,…` as Synthetic; empty for the defaults; raises ConfigError."""
    known = [f.name for f in fields(Synthetic)]
    given: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if name not in known or not equals:
            raise ConfigError(f"synthetic {part!r:.60}: wanted name=number with a name of {', '.join(known)}")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"synthetic {name}: wanted a number, got {value!r:.60}")
        given[name] = number
    return Synthetic(**given)


def requests(spec: Synthetic, seed: int) -> Iterator[Request]:
    """The arrivals in order of time, from 0; the same seed gives the same."""
    rng = random.Random(seed)
    end = spec.days * 86_400.0
    hours = [max(0.0, 1.0 + spec.swing * (f - 1.0)) for f in HOUR_FACTORS["servegen_m-small"]]
    mean = sum(hours) / len(hours)
    share = min(0.9, spec.bursts * spec.burst_s / 3600.0)  # of the time that is in a burst
    usual = spec.rate / (mean * (1.0 + share * (spec.height - 1.0)))
    gap_s = 3600.0 / spec.bursts - spec.burst_s if spec.bursts > 0.0 else math.inf
    prompt, output = _log_normal(spec.prompt, spec.prompt_p95), _log_normal(spec.output, spec.output_p95)
    fastest = usual * spec.height * max(hours)
    bursting = False
    turns = rng.expovariate(1.0 / gap_s) if gap_s < math.inf else math.inf
    at = 0.0
    first: float | None = None
    while True:
        at += rng.expovariate(fastest)
        if at >= end:
            return
        while at >= turns:
            bursting = not bursting
            turns += rng.expovariate(1.0 / (spec.burst_s if bursting else max(gap_s, 1.0)))
        rate = usual * hours[int(at // 3600.0) % 24] * (spec.height if bursting else 1.0)
        if rng.random() * fastest >= rate:
            continue
        first = at if first is None else first
        yield Request(at - first, _length(rng, prompt), _length(rng, output), -1)


def _length(rng: random.Random, shape: tuple[float, float]) -> int:
    return min(MOST_TOKENS, max(1, round(rng.lognormvariate(*shape))))
