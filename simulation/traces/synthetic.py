"""Made-up traffic for those who have no log: a daily profile, bursts, and lengths with long tails.

    rate(t) = usual rate * hour(t) * burst(t)

                  ┌─────┐ height          ┌──┐
    ──────────────┘     └─────────────────┘  └────────── usual     hour(t): one factor an hour, mean 1
                  burst_s       3600/bursts - burst_s, both exponential

Requests are a Poisson process of that rate: a Markov-modulated one with two states. Bursts come at random,
as many an hour as are asked for; in one the rate is `height` times the usual, and the usual is so much lower
that the mean over the day is what was asked for. Lengths are log-normal, given by mean and 95th percentile,
as logs are described; each is drawn for itself. Nothing else ties requests together: no sessions, nobody who
comes because of another, no day unlike the next.

Always true: times ascend from 0 to before the end of the last day, 0 being midnight of the profile; the same
parameters and seed give the same requests, one at a time.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields

from process.errors import ConfigError
from simulation.traces.logs import HOUR_FACTORS
from simulation.traces.request import Request

MOST_TOKENS = 100_000
"""Most tokens that may be asked for, and to which a length is cut: a log-normal has no end, contexts have."""

PROFILE = "servegen_m-small"
"""The daily profile that is taken, of HOUR_FACTORS: a quiet night and a busy evening, without BurstGPT's
nearly empty hours."""


@dataclass(frozen=True)
class Synthetic:
    """The parameters of made-up traffic; ConfigError names the parameter, the value and the range.

    The bursts by default lie between those of the logs in ../shared/traces. Variance over mean of the counts
    per minute, of the log and of these defaults at its rate (hour-long logs: swing=0), measured 2026-11:

        Mooncake conversation 3 : 32, ServeGen m-small 12 : 21, Azure conversation 16 : 47, code 164 : 23
    """

    days: float = 1.0
    """Length in days; each has the same profile."""
    rate: float = 2.0
    """Requests/s on average over a whole day: a few 13B instances' worth."""
    swing: float = 1.0
    """How far the rate follows the time of day: 0 not at all, 1 the profile as published, 2 twice its
    swing."""
    bursts: float = 4.0
    """Bursts an hour, on average: one every quarter of an hour, which finds a policy with hot instances or
    without."""
    burst_s: float = 60.0
    """Mean seconds of a burst: no longer than an instance takes to start (60 to 120 s), so that a start comes
    late."""
    height: float = 3.0
    """Rate in a burst over the usual rate: the Azure logs' busiest minutes are 1.5 and 4.2 times their
    mean."""
    prompt: float = 1155.0
    """Mean tokens of a prompt; this and the next three as in Azure's conversation log of 2023
    (../shared/traces)."""
    prompt_p95: float = 4083.0
    """95th percentile of the tokens of a prompt."""
    output: float = 211.0
    """Mean tokens of an answer."""
    output_p95: float = 451.0
    """95th percentile of the tokens of an answer."""

    def __post_init__(self) -> None:
        """Raise ConfigError for parameters of traffic that are out of range or contradict each other."""
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(f"synthetic {name} {value:g}: wanted {least:g} to {most:g}")
        if self.bursts * self.burst_s > MOST_BURSTING * 3600.0:
            raise ConfigError(
                f"synthetic bursts {self.bursts:g}: wanted at most "
                f"{MOST_BURSTING * 3600.0 / self.burst_s:g} an hour of {self.burst_s:g} s; more leave no rest"
            )
        for name in ("prompt", "output"):
            mean, p95 = getattr(self, name), getattr(self, f"{name}_p95")
            if not mean < p95 <= _most_p95(mean):
                raise ConfigError(
                    f"synthetic {name}_p95 {p95:g}: wanted over the mean, {mean:g}, and at most "
                    f"{_most_p95(mean):.4g}, which is as far as a log-normal goes"
                )


MOST_BURSTING = 0.9
"""Largest share of the time that may be in a burst: with more, the usual rate would be the exception."""

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
    """Return mu and sigma of the log-normal distribution with this mean and 95th percentile.

    z s - s²/2 = log(p95 / mean), of which s is the smaller root.
    """
    ratio = math.log(p95 / mean)
    sigma = _Z95 - math.sqrt(max(0.0, _Z95 * _Z95 - 2.0 * ratio))
    return math.log(mean) - sigma * sigma / 2.0, sigma


def parse(text: str) -> Synthetic:
    """Return the parameters of made-up traffic in a text like `days=2,rate=1.5`.

    The empty text gives the defaults. Raises ConfigError.
    """
    known = [f.name for f in fields(Synthetic)]
    given: dict[str, float] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in known or not equals:
            raise ConfigError(f"synthetic {part!r:.60}: wanted name=number with a name of {', '.join(known)}")
        if name in given:
            raise ConfigError(f"synthetic {name}: wanted once, got {given[name]:g} and {value!r:.60}")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"synthetic {name}: wanted a number, got {value!r:.60}")
        given[name] = number
    return Synthetic(**given)


def requests(spec: Synthetic, seed: int) -> Iterator[Request]:
    """Yield made-up arrivals sorted by time, from 0 to spec.days; the same seed gives the same requests."""
    rng = random.Random(seed)
    end = spec.days * 86_400.0
    hours = [max(0.0, 1.0 + spec.swing * (f - 1.0)) for f in HOUR_FACTORS[PROFILE]]
    share = spec.bursts * spec.burst_s / 3600.0  # of the time that is in a burst
    usual = spec.rate * len(hours) / (sum(hours) * (1.0 + share * (spec.height - 1.0)))
    rest_s = 3600.0 / spec.bursts - spec.burst_s if spec.bursts > 0.0 else math.inf
    prompt, output = _log_normal(spec.prompt, spec.prompt_p95), _log_normal(spec.output, spec.output_p95)

    def stays_s() -> float:
        mean = spec.burst_s if bursting else rest_s
        return rng.expovariate(1.0 / mean) if mean < math.inf else math.inf

    bursting = rng.random() < share
    turn = stays_s()
    at, hour = 0.0, 0
    while at < end:
        # The rate stays as it is until the hour or the burst turns. A gap that reaches beyond is drawn anew
        # from there: an exponential gap does not remember how long it has been waited for.
        rate = usual * hours[hour % 24] * (spec.height if bursting else 1.0)
        until = min(turn, (hour + 1) * 3600.0, end)
        while rate > 0.0 and (at := at + rng.expovariate(rate)) < until:
            yield Request(at, _length(rng, prompt), _length(rng, output), -1)
        at = until
        if at >= (hour + 1) * 3600.0:
            hour += 1
        if at >= turn:
            bursting = not bursting
            turn += stays_s()


def _length(rng: random.Random, shape: tuple[float, float]) -> int:
    """Return a number of tokens drawn from a log-normal, at least 1. shape: its mu and sigma."""
    return min(MOST_TOKENS, max(1, round(math.exp(rng.gauss(*shape)))))
