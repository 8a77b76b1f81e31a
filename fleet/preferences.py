"""Which of the machines for rent an operator wants: place, host, price, verification.

The search asks the cloud for them where its query language can say it, so that its answer is not filled with
others; what comes back is held against them again.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fleet.regions import country_of
from vast.rows import Offer

HOST_SHARE = 3
"""A host has at most this part of the fleet, unless an operator says otherwise: hosts fail as a whole."""


@dataclass(frozen=True)
class Preferences:
    """What an operator wants of the machines that are rented; what is empty or None is all the same.

    countries: two-letter codes. hosts, avoided_hosts: host_ids. max_usd_gpu_h: $/h of one GPU, with its part
    of the storage. max_usd_million_tokens: of output tokens at a full queue. max_per_host: instances at one
    host; None for a third of the fleet, and 0 for any number.
    """

    countries: frozenset[str] = frozenset()
    datacenter_only: bool = False
    verified_only: bool = True
    hosts: frozenset[int] = frozenset()
    avoided_hosts: frozenset[int] = frozenset()
    max_usd_gpu_h: float | None = None
    max_usd_million_tokens: float | None = None
    max_per_host: int | None = None

    def query(self) -> str:
        """Return what a search for offers asks in addition, in the CLI's query language."""
        words = []
        if self.countries:
            words.append(f"geolocation in [{','.join(sorted(self.countries))}]")
        if self.datacenter_only:
            words.append("datacenter=true")
        if not self.verified_only:
            words.append("verified=any")  # the CLI asks for verified=true by itself
        if self.hosts:
            words.append(f"host_id in [{_listed(self.hosts)}]")
        if self.avoided_hosts:
            words.append(f"host_id notin [{_listed(self.avoided_hosts)}]")
        return " ".join(words)

    def refusal(self, offer: Offer, usd_million_tokens: float) -> str | None:
        """Return in some words why that offer is not wanted; None: it is.

        usd_million_tokens: what a million output tokens cost there.
        """
        if self.countries and country_of(offer.geolocation) not in self.countries:
            return "outside the regions"
        if self.datacenter_only and offer.datacenter is False:
            return "not in a datacenter"
        if self.verified_only and offer.verified is False:
            return "not verified"
        if self.hosts and offer.host_id not in self.hosts:
            return "not of a host that is pinned"
        if offer.host_id in self.avoided_hosts:
            return "of a host that is avoided"
        if self.max_usd_gpu_h is not None and offer.dph_total / offer.num_gpus > self.max_usd_gpu_h:
            return f"over {self.max_usd_gpu_h:g} $/h a GPU"
        most = self.max_usd_million_tokens
        if most is not None and usd_million_tokens > most:
            return f"over {most:g} $ a million tokens"
        return None

    def most_at_host(self, fleet: int) -> int | None:
        """Return how many instances of a fleet of that size one host may have; None: any number."""
        if self.max_per_host is None:
            return max(1, fleet // HOST_SHARE)
        return self.max_per_host or None


ANY_MACHINE = Preferences(max_per_host=0)
"""Without a wish: what the profile's query finds is rented, however much of it one host has."""


def _listed(numbers: Iterable[int]) -> str:
    return ",".join(str(number) for number in sorted(numbers))
