"""Which machines an operator wants to rent, as flags."""

from dataclasses import dataclass

from fleet.preferences import HOST_SHARE, Preferences
from fleet.regions import REGIONS, countries_of
from fleet_client.flags import flag
from process.errors import ConfigError


@dataclass(frozen=True)
class MarketFlags:
    """The flags that say which machines are rented; all of them hold for `plan`, `prepare` and `serve`."""

    region: tuple[str, ...] = flag(
        (),
        f"rent only there: a country as two letters, or one of {', '.join(REGIONS)}; may be repeated",
        metavar="PLACE",
        shown="anywhere",
    )
    datacenter_only: bool = flag(False, "rent only in datacenters")
    verified_only: bool = flag(True, "rent only machines that Vast.ai has verified, or others, too")
    pin_host: tuple[int, ...] = flag(
        (), "rent only of that host, by its host_id; may be repeated", metavar="ID", shown="any host"
    )
    avoid_host: tuple[int, ...] = flag(
        (), "rent nothing of that host, by its host_id; may be repeated", metavar="ID", shown="no host"
    )
    max_per_host: int | None = flag(
        None,
        "most instances of one host, which fail together; 0 for any number",
        least=0,
        most=10_000,
        unit="instances",
        shown=f"1 of {HOST_SHARE} of the fleet, at least one",
    )
    max_usd_gpu_hour: float | None = flag(
        None,
        "rent nothing dearer than that for one GPU an hour",
        least=0.0,
        most=1_000.0,
        metavar="USD",
        unit="$/h",
        shown="any price",
    )
    max_usd_million_tokens: float | None = flag(
        None,
        "rent nothing that costs more for a million output tokens at a full queue",
        least=0.0,
        most=100_000.0,
        metavar="USD",
        unit="$",
        shown="any price",
    )

    @property
    def preferences(self) -> Preferences:
        """Which machines are rented; raises ConfigError for a place that is none, or a host both ways."""
        try:
            countries = countries_of(self.region)
        except ConfigError as e:
            raise ConfigError(f"--region {e}") from None
        pinned, avoided = frozenset(self.pin_host), frozenset(self.avoid_host)
        if both := pinned & avoided:
            raise ConfigError(f"--pin-host and --avoid-host {min(both)}: wanted one of them")
        return Preferences(
            countries=countries,
            datacenter_only=self.datacenter_only,
            verified_only=self.verified_only,
            hosts=pinned,
            avoided_hosts=avoided,
            max_usd_gpu_h=self.max_usd_gpu_hour,
            max_usd_million_tokens=self.max_usd_million_tokens,
            max_per_host=self.max_per_host,
        )
