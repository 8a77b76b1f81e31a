"""What our programs send over a network unencrypted, and whether the operator has allowed it."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from fleet_client.errors import ConfigError
from fleet_client.loopback import is_loopback_host, is_loopback_url

log = logging.getLogger("network")


@dataclass(frozen=True)
class InTheClear:
    """One way by which others on the network can listen.

    flag: the flag that opens it, with its value. shows: what they learn. instead: what to use for safety.
    """

    flag: str
    shows: str
    instead: str = "https"


def clear_call(flag: str, url: str, shows: str) -> list[InTheClear]:
    """Return [how a call to that URL can be overheard], empty unless it is plain HTTP to another machine.

    flag: the flag that names the URL. shows: what the call tells.
    """
    plain = urlsplit(url).scheme == "http" and not is_loopback_url(url)
    return [InTheClear(f"{flag} {url}", shows)] if plain else []


def clear_bind(host: str, shows: str, *, encrypted: bool) -> list[InTheClear]:
    """Return [how a server listening on that host can be overheard], empty where it cannot be.

    It can be where other machines reach it by plain HTTP. shows: what its connections tell.
    """
    plain = not encrypted and not is_loopback_host(host)
    return [InTheClear(f"--host {host}", shows, "--tls-cert and --tls-key")] if plain else []


def allow(ways: Iterable[InTheClear], *, trust_network: bool) -> None:
    """Log what is sent over the network unencrypted; raise ConfigError unless trust_network allows it."""
    for way in ways:
        if not trust_network:
            raise ConfigError(
                f"{way.flag} would be plain HTTP beyond this machine, and shows {way.shows} to all who can "
                f"listen there: {way.instead}, or --trust-network where nobody can"
            )
        log.warning(
            "%s is plain HTTP beyond this machine: all who can listen there have %s", way.flag, way.shows
        )
