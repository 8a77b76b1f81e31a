"""What can be rented: the cloud's offers, machines that failed, and the pause after failed creates."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine.profile import Profile
from fleet.deadlines import Deadlines
from fleet.gpu_numbers import numbers_of
from fleet.preferences import ANY_MACHINE, Preferences
from fleet_client.back_off import back_off_s
from vast.rows import Offer

LONGEST_REST_S = 900.0
"""Longest pause after failed creates, seconds; it doubles with each failure until then."""


EXPECTED_LIFE_H = 24.0
"""Hours that a rented instance is expected to run, over which its download is spread. A pool is kept for days
and runs for a part of them; one that grows and shrinks with each day rents anew each day."""


def usd_per_million_work(offer: Offer, profile: Profile) -> float:
    """Return what a million units of work cost on a machine: its price over the throughput expected of it.

    Its price is that of an hour of running, and a share of what the host asks for the bytes of image and
    weights: they are paid once, and spread over EXPECTED_LIFE_H. A host that names no price for bytes is
    taken to ask none.
    """
    work_s = profile.throughput_on(offer.gpu_name, offer.num_gpus, numbers_of(offer))
    download_usd_h = profile.download_gb * (offer.inet_down_usd_gb or 0.0) / EXPECTED_LIFE_H
    return (offer.dph_total + download_usd_h) / work_s / 3600.0 * 1e6


def ranked(offers: Iterable[Offer], profile: Profile) -> list[Offer]:
    """Return offers in the order in which they are taken: the cheapest for its work first, then by id."""
    return sorted(offers, key=lambda offer: (usd_per_million_work(offer, profile), offer.id))


def sorted_out(
    offers: Iterable[Offer], profile: Profile, preferences: Preferences
) -> tuple[list[Offer], Counter[str]]:
    """Return (the offers that an operator wants, how many of the others are refused for which reason)."""
    wanted, refused = [], Counter[str]()
    for offer in offers:
        why = preferences.refusal(offer, usd_per_million_work(offer, profile))
        if profile.fits(offer.gpu_name, offer.num_gpus, numbers_of(offer)) is False:
            why = "with too little GPU memory"
        if why is None:
            wanted.append(offer)
        else:
            refused[why] += 1
    return wanted, refused


@dataclass(frozen=True)
class MarketSnapshot:
    """The market for machines at one moment.

    offers: of machines that did not fail lately, the cheapest for its work first. fresh: they are not too old
    to be taken. searching: a search is under way. failed_creates: how many in a row. resting: no create is to
    be made now. refused: why the operator does not want others that were found, and how many.
    """

    offers: tuple[Offer, ...]
    fresh: bool
    searching: bool
    failed_creates: int
    resting: bool
    refused: tuple[str, ...] = ()


class Market:
    """Remembers the cloud's offers, machines that failed, and failed creates."""

    def __init__(
        self, profile: Profile, deadlines: Deadlines, preferences: Preferences = ANY_MACHINE
    ) -> None:
        """Begin without offers: they have to be searched for."""
        self.bad_machines: dict[int, float] = {}  # machine_id: until when it is not rented
        self._profile = profile
        self._deadlines = deadlines
        self._preferences = preferences
        self._refused: tuple[str, ...] = ()
        self._offers: tuple[Offer, ...] = ()  # the cheapest for its work first
        self._offers_at = float("-inf")
        self._searching_since = float("-inf")
        self.bad_reasons: dict[int, str] = {}  # machine_id: on what evidence, as far as this process knows
        self.last_failure = ""  # of a create
        self._failed_creates = 0
        self._no_create_before = float("-inf")

    def snapshot(self, now: float) -> MarketSnapshot:
        """Return the offers and the state of the market as they are now."""
        bad, old_s = self.bad_machines, self._deadlines.offers_s
        return MarketSnapshot(
            offers=tuple(o for o in self._offers if bad.get(o.machine_id, now) <= now),
            fresh=now - self._offers_at <= old_s,
            searching=now - self._searching_since <= old_s,
            failed_creates=self._failed_creates,
            resting=now < self._no_create_before,
            refused=self._refused,
        )

    # -- searches --------------------------------------------------------------------------------------

    def begin_search(self, now: float) -> None:
        """Note that a search for offers was ordered."""
        self._searching_since = now

    def end_search(self, offers: Iterable[Offer] | None, now: float) -> None:
        """Take over the offers that the search found; None: it failed."""
        self._searching_since = float("-inf")
        if offers is not None:
            wanted, refused = sorted_out(offers, self._profile, self._preferences)
            self._offers, self._offers_at = tuple(ranked(wanted, self._profile)), now
            self._refused = tuple(f"{count} {why}" for why, count in refused.most_common())

    def take(self, offer: Offer) -> None:
        """Remove an offer that is being rented from the market."""
        self._offers = tuple(other for other in self._offers if other.id != offer.id)

    def note_offer_gone(self, now: float) -> None:
        """Have the market searched again before the next create, because another customer took an offer."""
        self._offers_at = min(self._offers_at, now - self._deadlines.offers_s - 1.0)

    # -- what became of creates ------------------------------------------------------------------------

    def note_create_failed(self, now: float, why: str = "") -> None:
        """Count a create that failed; those ordered together count once, as they share their trouble."""
        self.last_failure = why
        if now < self._no_create_before:
            return
        self._failed_creates += 1
        rest_s = back_off_s(self._failed_creates, self._deadlines.create_rest_s, LONGEST_REST_S)
        self._no_create_before = now + rest_s
        self.note_offer_gone(now)

    def note_create_worked(self) -> None:
        """End the row of failed creates, because a rented machine became hot."""
        self._failed_creates = 0

    def end_rest(self) -> None:
        """Let creates be made at once again, because a person says that what failed is mended."""
        self._failed_creates, self._no_create_before = 0, float("-inf")

    @property
    def resting_until(self) -> float:
        """Until when no create is to be made."""
        return self._no_create_before

    @property
    def failed_creates(self) -> int:
        """How many creates in a row have failed."""
        return self._failed_creates

    def avoid(self, machine_id: int, why: str, now: float, for_s: float | None = None) -> float:
        """Do not rent that machine for a while, on the evidence `why`; return until when.

        for_s: seconds for which it is not rented; None: as long as any machine that failed.
        """
        self.bad_reasons[machine_id] = why
        until = now + (self._deadlines.bad_machine_s if for_s is None else for_s)
        self.bad_machines[machine_id] = until
        return until

    def forgive(self, machine_id: int) -> bool:
        """Let a machine be rented again; return whether it was avoided."""
        self.bad_reasons.pop(machine_id, None)
        return self.bad_machines.pop(machine_id, None) is not None

    def restore(self, bad_machines: Mapping[int, float]) -> None:
        """Take over until when machines that failed before a restart are not rented."""
        self.bad_machines.update(bad_machines)
