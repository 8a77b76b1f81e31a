"""What could be rented and what that would cost, offer by offer, and a choice of them in sentences.

set-up dollars = (load time x price of the running machine) + downloaded GB x the host's price a GB
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.profile import Profile
from fleet.limits import Limits
from fleet.market import ranked, usd_per_million_work
from fleet.preferences import ANY_MACHINE, Preferences
from vast.rows import Offer

MBIT_A_GB = 8000.0


@dataclass(frozen=True)
class Candidate:
    """What one offer would cost. hot_s: expected seconds from the order until it is hot.

    usd_to_set_up: until it is loaded, with what is downloaded; None where the host's price of traffic is not
    known. usd_h: while it runs; stopped_usd_h: while it is stopped.
    """

    offer: Offer
    usd_per_million_work: float
    hot_s: float
    download_usd: float | None
    usd_to_set_up: float | None
    usd_h: float
    stopped_usd_h: float

    @classmethod
    def of(cls, offer: Offer, profile: Profile) -> "Candidate":
        """Return what that offer would cost with that model."""
        download_s = profile.download_gb * MBIT_A_GB / max(offer.inet_down_mbps, 1.0)
        hot_s = max(profile.load_time_s, download_s + profile.start_time_s)
        price = offer.inet_down_usd_gb
        download_usd = None if price is None else profile.download_gb * price
        running_usd = offer.dph_total * hot_s / 3600.0
        return cls(
            offer,
            usd_per_million_work(offer, profile),
            hot_s,
            download_usd,
            None if download_usd is None else running_usd + download_usd,
            offer.dph_total,
            max(0.0, offer.dph_total - offer.dph_base),
        )

    def shown(self) -> dict[str, Any]:
        """Return it as JSON for people and programs."""
        o = self.offer
        return {
            "offer": o.id,
            "machine": o.machine_id,
            "host": o.host_id,
            "gpu_name": o.gpu_name,
            "num_gpus": o.num_gpus,
            "place": o.geolocation,
            "reliability": o.reliability,
            "driver": o.driver_version,
            "inet_down_mbps": o.inet_down_mbps,
            "inet_down_usd_gb": o.inet_down_usd_gb,
            "usd_gpu_h": round(o.dph_total / o.num_gpus, 5),
            "days_left": None if o.duration_s is None else round(o.duration_s / 86_400.0, 1),
            "usd_h": round(self.usd_h, 5),
            "stopped_usd_h": round(self.stopped_usd_h, 5),
            "usd_per_million_work": round(self.usd_per_million_work, 4),
            "hot_s": round(self.hot_s),
            "download_usd": None if self.download_usd is None else round(self.download_usd, 4),
            "usd_to_set_up": None if self.usd_to_set_up is None else round(self.usd_to_set_up, 4),
        }


def candidates(offers: Sequence[Offer], profile: Profile) -> list[Candidate]:
    """Return the offers with what they would cost, in the order in which they would be taken."""
    return [Candidate.of(o, profile) for o in ranked(offers, profile)]


def choose(found: Sequence[Candidate], count: int, preferences: Preferences) -> list[Candidate]:
    """Return the first `count` of them, no host with more than its share."""
    most = preferences.most_at_host(count)
    by_host = Counter[int | None]()
    chosen: list[Candidate] = []
    for c in found:
        host = c.offer.host_id
        if len(chosen) < count and (most is None or host is None or by_host[host] < most):
            by_host[host] += 1
            chosen.append(c)
    return chosen


def summary(
    taken: Sequence[Candidate], count: int, limits: Limits, preferences: Preferences = ANY_MACHINE
) -> list[str]:
    """Return in sentences what renting these would cost, and what keeps from it."""
    said = []
    if len(taken) < count:
        most = preferences.most_at_host(count)
        share = "" if most is None else f", at most {most} of a host (--max-per-host)"
        said.append(
            f"Only {len(taken)} of {count} can be rented now: nothing else on the market fits{share}."
        )
    if not taken:
        return said
    set_up = [c.usd_to_set_up for c in taken]
    known = sum(one for one in set_up if one is not None)
    unknown = sum(one is None for one in set_up)
    more = f", and the traffic of {unknown} more" if unknown else ""
    stopped, hot = sum(c.stopped_usd_h for c in taken), sum(c.usd_h for c in taken)
    first, last = (f(c.hot_s for c in taken) / 60.0 for f in (min, max))
    said += [
        f"prepare --count {count}: ${known:.2f} to set up{more}; the first is loaded after about "
        f"{first:.0f} min, the last after {last:.0f}.",
        f"Stopped with the model on their disks they cost ${stopped * 24.0:.2f} a day; "
        f"all hot ${hot:.2f} an hour, ${hot * 24.0:.2f} a day.",
    ]
    if hot > limits.max_usd_h:
        said.append(
            f"While they load they cost ${hot:.2f} an hour: --max-dollars-per-hour is "
            f"{limits.max_usd_h:g}, so they would be rented one after the other."
        )
    if count > limits.max_instances:
        said.append(f"--max-instances is {limits.max_instances}: no more would be rented.")
    hosts = {c.offer.host_id for c in taken if c.offer.host_id is not None}
    if len(taken) > 1 and len(hosts) == 1:
        said.append("All of them are on one host: when it fails, all fail together.")
    return said
