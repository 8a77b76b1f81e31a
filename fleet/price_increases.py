"""Whether to pay a higher price that a host asks for from the end of a contract on.

    accepted   the new price for the instance's work is no dearer than another machine with its set-up
    lapses     another is cheaper: the contract ends as agreed, and the instance is replaced before
    waits      the market is not known: it is looked at again

Where nothing at all is for rent it is accepted.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from engine.profile import Profile
from fleet.contract_ends import Horizon
from fleet.instance import Instance
from fleet.market import EXPECTED_LIFE_H, usd_per_million_work
from vast.rows import Offer, PriceIncrease


class PriceAnswer(StrEnum):
    """What becomes of an increase that a host asks for."""

    ACCEPTED = "accepted"
    LAPSES = "lapses"
    WAITS = "waits"


@dataclass(frozen=True)
class Judged:
    """One increase with what is made of it, and why in words."""

    increase: PriceIncrease
    verdict: PriceAnswer
    why: str


def judge_increase(
    increase: PriceIncrease,
    i: Instance,
    offers: Iterable[Offer] | None,
    profile: Profile,
    horizon: Horizon,
) -> Judged:
    """Return what to make of an increase for that instance. offers: of the market; None: it is not known."""
    if offers is None:
        return Judged(increase, PriceAnswer.WAITS, "the market is not known")
    work_s = profile.throughput_on(i.gpu_name, i.num_gpus, i.gpu_told)
    asked = increase.new_usd_h / work_s / 3600.0 * 1e6
    found = [o for o in offers if not horizon.is_too_short(o)]
    if not found:
        return Judged(increase, PriceAnswer.ACCEPTED, "nothing else is for rent")
    other = min(with_set_up(o, profile, horizon.load_s) for o in found)
    price = f"${increase.new_usd_h:.3f}/h instead of ${increase.old_usd_h:.3f}/h is ${asked:.4f} a million"
    said = f"{price} units of work, another machine with its set-up ${other:.4f}"
    return Judged(increase, PriceAnswer.ACCEPTED if asked <= other else PriceAnswer.LAPSES, said)


def with_set_up(offer: Offer, profile: Profile, load_s: float) -> float:
    """Return $ per million units of work on another machine; its load is spread as its download is."""
    price = usd_per_million_work(offer, profile)
    load_usd_h = offer.dph_total * load_s / 3600.0 / EXPECTED_LIFE_H
    return price * (1.0 + load_usd_h / max(offer.dph_total, 1e-9))
