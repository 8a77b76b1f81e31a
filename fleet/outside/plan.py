"""The command `plan`: what `prepare` would rent and what it would cost. Nothing is ordered.

    set-up dollars = (load time x price of the running machine) + downloaded GB x the host's price a GB

The offers come in the order in which the autoscaler would take them, machines that failed lately left out.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.profiles import Profile, get_profile
from fleet.market import ranked, usd_per_million_work
from fleet.outside.config import AutoscalerConfig, vast_settings
from fleet.outside.operator_commands import wide_console
from fleet_client import private_files
from fleet_client.flags import within
from process.errors import CloudError, ConfigError
from process.safe_text import safe_text
from vast.cli import Cli
from vast.client import Vast
from vast.rows import Offer

SHOWN = 15
"""Offers in the table, beside those that would be taken."""

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


def summary(taken: Sequence[Candidate], count: int, config: AutoscalerConfig) -> list[str]:
    """Return in sentences what renting these would cost, and what keeps from it."""
    said = []
    if len(taken) < count:
        said.append(f"Only {len(taken)} of {count} can be rented now: nothing else on the market fits.")
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
    if hot > config.max_dollars_per_hour:
        said.append(
            f"While they load they cost ${hot:.2f} an hour: --max-dollars-per-hour is "
            f"{config.max_dollars_per_hour:g}, so they would be rented one after the other."
        )
    if count > config.max_instances:
        said.append(f"--max-instances is {config.max_instances}: no more would be rented.")
    hosts = {c.offer.host_id for c in taken if c.offer.host_id is not None}
    if len(taken) > 1 and len(hosts) == 1:
        said.append("All of them are on one host: when it fails, all fail together.")
    return said


def plan(
    config: AutoscalerConfig, count: int, *, as_json: bool = False, console: Console | None = None
) -> None:
    """Show what `prepare --count N` would rent and cost; raise ConfigError where it cannot be known."""
    within("--count", count, 1, 1000)
    profile = get_profile(config.model)
    state_dir = config.state_dir or private_files.default_state_dir(config.label)
    private_files.make_private_dir(state_dir)
    vast = Vast(Cli(vast_settings(config, state_dir, os.environ, Path.home())))
    try:
        offers = vast.search_offers(profile.offer_query, storage_gb=profile.disk_gb)
    except CloudError as e:
        raise ConfigError(f"the cloud cannot be searched: {e}") from e
    found = candidates(offers, profile)
    taken, said = found[:count], summary(found[:count], count, config)
    console = console or wide_console()
    if as_json:
        answer = {"taken": [c.shown() for c in taken], "offers": [c.shown() for c in found], "says": said}
        console.print(json.dumps(answer), highlight=False, markup=False, soft_wrap=True)
        return
    console.print(_table(found[: max(SHOWN, count)], count))
    for sentence in said:
        console.print(sentence, highlight=False, markup=False)


def _table(found: Sequence[Candidate], count: int) -> Table:
    table = Table(box=None)
    for name in ("", "GPU", "place", "reliable", "driver", "Mbit/s", "$/GB in", "$/h", "stopped", "$/M work"):
        table.add_column(name, no_wrap=True)
    for name in ("min to hot", "$ to set up", "days left"):
        table.add_column(name, no_wrap=True)
    for n, c in enumerate(found):
        o = c.offer
        cells = (
            "take" if n < count else "",
            f"{o.num_gpus} x {o.gpu_name}",
            o.geolocation or "?",
            f"{o.reliability:.1%}",
            o.driver_version or "?",
            f"{o.inet_down_mbps:.0f}",
            "?" if o.inet_down_usd_gb is None else f"{o.inet_down_usd_gb:.4f}",
            f"{c.usd_h:.3f}",
            f"{c.stopped_usd_h:.4f}",
            f"{c.usd_per_million_work:.3f}",
            f"{c.hot_s / 60.0:.0f}",
            "?" if c.usd_to_set_up is None else f"{c.usd_to_set_up:.3f}",
            "?" if o.duration_s is None else f"{o.duration_s / 86_400.0:.0f}",
        )
        table.add_row(*(safe_text(cell) for cell in cells))
    return table
