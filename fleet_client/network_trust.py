"""What of ours goes over a network in the clear, and whether the operator said that it may."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from fleet_client.errors import ConfigError
from fleet_client.loopback import is_loopback_host, is_loopback_url

log = logging.getLogger("network")


@dataclass(frozen=True)
class InTheClear:
    """A way by which others on the network can listen. flag: with its value. shows: what they learn."""

    flag: str
    shows: str
    instead: str = "https"


def clear_call(flag: str, url: str, shows: str) -> list[InTheClear]:
    """Return the way to that URL, if it is plain HTTP to another machine."""
    plain = urlsplit(url).scheme == "http" and not is_loopback_url(url)
    return [InTheClear(f"{flag} {url}", shows)] if plain else []


def clear_bind(host: str, shows: str, *, encrypted: bool) -> list[InTheClear]:
    """Return the way to a server that listens there, if it is plain HTTP from other machines."""
    plain = not encrypted and not is_loopback_host(host)
    return [InTheClear(f"--host {host}", shows, "--tls-cert and --tls-key")] if plain else []


def allow(ways: Iterable[InTheClear], *, trust_network: bool) -> None:
    """Say in the log what is open to the network; raise ConfigError unless the operator trusts it."""
    for way in ways:
        if not trust_network:
            raise ConfigError(
                f"{way.flag} would be plain HTTP beyond this machine, and shows {way.shows} to all who can "
                f"listen there: {way.instead}, or --trust-network where nobody can"
            )
        log.warning(
            "%s is plain HTTP beyond this machine: all who can listen there have %s", way.flag, way.shows
        )
