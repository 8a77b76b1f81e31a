"""Which GPUs of the market can serve a model at a latency objective, and what a million tokens cost there.

An instance serves as many requests at once as its KV memory holds and as keep to the objective, in the mean
of a steady state in which as many prompts are read as answers end:

    step   the time between two tokens of an answer, with the prompts that are read in it
    first  two steps, and reading the prompt alone
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engine.estimate import step_of
from engine.gpus import GPUS
from engine.profile import Profile
from engine.slo import Slo
from engine.step_time_constants import Timing
from fleet.gpu_numbers import numbers_of
from vast.rows import Offer

PROMPT_TOKENS = 300.0
"""Mean length of the prompts that are assumed, as in the profiles' throughputs."""


@dataclass(frozen=True)
class Fit:
    """How one number of GPUs of a kind serves a model. at_once: requests; 0 where none keeps the objective.

    tokens_s: of output, of an instance with so many. offers: how many of it are for rent; usd_h: the cheapest
    of them. by: where the step times come from.
    """

    gpu_name: str
    num_gpus: int
    kv_tokens: int
    at_once: int
    tokens_s: float
    token_s: float
    first_token_s: float
    offers: int
    usd_h: float
    by: str

    @property
    def usd_million(self) -> float | None:
        """Dollars for a million output tokens at the cheapest offer; None where the objective is not kept."""
        return self.usd_h / self.tokens_s / 3600.0 * 1e6 if self.tokens_s else None

    def shown(self) -> dict[str, Any]:
        """Return it as JSON for people and programs."""
        usd = self.usd_million
        return {
            "gpu_name": self.gpu_name,
            "num_gpus": self.num_gpus,
            "kv_tokens": self.kv_tokens,
            "at_once": self.at_once,
            "tokens_s": round(self.tokens_s, 1),
            "token_s": round(self.token_s, 4),
            "first_token_s": round(self.first_token_s, 3),
            "offers": self.offers,
            "usd_h": round(self.usd_h, 4),
            "usd_per_million_tokens": None if usd is None else round(usd, 4),
            "by": self.by,
        }


def fits_of(offers: Iterable[Offer], profile: Profile, slo: Slo) -> list[Fit]:
    """Return how each kind and number of GPUs on offer serves the model, the cheapest tokens first.

    Offers on which the model does not fit, or of whose GPUs nothing is known, are left out.
    """
    kinds: dict[tuple[str, int, int], list[Offer]] = {}
    for o in offers:
        if profile.fits(o.gpu_name, o.num_gpus, numbers_of(o)):
            kinds.setdefault((o.gpu_name, o.num_gpus, round(o.gpu_ram_mb / 4096.0)), []).append(o)
    found = [_fit(alike, profile, slo) for alike in kinds.values()]
    return sorted(found, key=lambda f: (f.usd_million is None, f.usd_million or f.usd_h, f.gpu_name))


def not_for_rent(found: Iterable[Fit], profile: Profile, most_gpus: int) -> list[str]:
    """Return which known GPUs would hold the model, and are not on the market: the fewest of each that do."""
    there = {f.gpu_name for f in found}
    would = []
    for name in GPUS.keys() - there:
        counts = (n for n in (1, 2, 4, 8) if n <= most_gpus and profile.fits(name, n))
        if (least := next(counts, None)) is not None:
            would.append(f"{least} x {name}")
    return sorted(would)


def _fit(alike: list[Offer], profile: Profile, slo: Slo) -> Fit:
    cheapest = min(alike, key=lambda o: (o.dph_total, o.id))
    told = numbers_of(cheapest)
    timing = profile.timing_on(cheapest.gpu_name, cheapest.num_gpus, told)
    output = profile.expected_output_tokens
    at_once = held_within(timing, slo, PROMPT_TOKENS, output)
    token_s = step_of(timing, at_once, PROMPT_TOKENS, output) / 1e3 if at_once else 0.0
    return Fit(
        cheapest.gpu_name,
        cheapest.num_gpus,
        timing.kv_tokens,
        at_once,
        at_once / token_s if at_once else 0.0,
        token_s,
        _first_token_s(timing, at_once, output),
        len(alike),
        cheapest.dph_total,
        "arithmetic" if timing.name.endswith("by arithmetic") else "constants",
    )


def held_within(timing: Timing, slo: Slo, prompt: float, output: float) -> int:
    """Return the most requests of these lengths at once with which the objective is kept."""
    most = min(timing.max_seqs, int(timing.kv_tokens / (prompt + output / 2.0)))
    least, limit_s = 0, slo.first_token_limit_s(prompt)
    while least < most:
        half = (least + most + 1) // 2
        kept = step_of(timing, half, prompt, output) <= slo.output_token_s * 1e3
        if kept and _first_token_s(timing, half, output, prompt) <= limit_s:
            least = half
        else:
            most = half - 1
    return least


def _first_token_s(timing: Timing, at_once: int, output: float, prompt: float = PROMPT_TOKENS) -> float:
    beside = step_of(timing, max(1, at_once), prompt, output)
    return (2.0 * beside + timing.prefill_ms(round(prompt))) / 1e3
