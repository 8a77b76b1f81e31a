"""The options of a transport: one list for threads and asyncio."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict
from urllib.parse import urlsplit

from fleet_client.leases import NORMAL, PRIORITIES
from fleet_client.tls_pins import BadAddress, context_for

LOADBALANCER = "http://127.0.0.1:8200"
"""Where the loadbalancer listens by default."""


class OptionFields(TypedDict, total=False):
    """The keyword arguments of both transports, which `FleetOptions` explains."""

    api_key: str | None
    max_tries: int
    wait_s: float
    ahead: int
    connect_s: float
    trust_network: bool
    loadbalancer_cert: str | Path | None
    priority: str
    affinity: bool
    affinity_salt: bytes | str | None


@dataclass(frozen=True)
class FleetOptions:
    """The options of a transport: how it reaches the fleet, how far it goes for a request. Times in seconds.

    Raises ValueError that names what is out of range; no key and no salt is in its text.
    """

    loadbalancer: str = LOADBALANCER
    # A client key, where the loadbalancer wants one; None: FLEET_CLIENT_KEY of the environment.
    api_key: str | None = field(default=None, repr=False)
    max_tries: int = 4  # instances that a request is tried on
    wait_s: float = 30.0  # for leases, all in all
    ahead: int = 0  # leases fetched before they are needed
    # For a connection to an instance: packets cross an ocean in 0.2 s, a lost SYN repeats after 1 and 3 s.
    connect_s: float = 5.0
    trust_network: bool = False  # allow a loadbalancer over plain http elsewhere than on loopback
    # File of certificates that an https loadbalancer may show, and no others; None: what the machine's
    # authorities vouch for.
    loadbalancer_cert: str | Path | None = None
    priority: str = NORMAL  # high, normal or low, of requests without a header X-Fleet-Priority
    # Tell the loadbalancer salted hashes of prompts' prefixes, so that a conversation goes where it was read
    # before (prefix_hashes.py says what they reveal).
    affinity: bool = True
    # At least 16 bytes, the same for all clients that are to profit from each other's prompts; None:
    # FLEET_AFFINITY_SALT of the environment, else a random one.
    affinity_salt: bytes | str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check all options but the salt, which `prefix_hashes.Hasher` checks."""
        if not 0 <= self.ahead <= 256:
            raise ValueError(f"ahead: wanted 0 to 256, got {self.ahead}")
        check_loadbalancer(self.loadbalancer, trust_network=self.trust_network)
        for name, least, most in (("max_tries", 1, 32), ("wait_s", 0, 600), ("connect_s", 0.1, 120)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}: wanted {least} to {most}, got {getattr(self, name)}")
        if self.priority not in PRIORITIES:
            raise ValueError(f"priority: wanted high, normal or low, got {self.priority!r}")
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key: wanted printable ASCII")

    @property
    def url(self) -> str:
        """The loadbalancer's URL without a slash at its end."""
        return self.loadbalancer.rstrip("/")


def check_loadbalancer(text: str, *, trust_network: bool) -> None:
    """Raise ValueError for a URL that is not a server's, or over which leases may not travel.

    A lease holds the certificate that a prompt is sent to: whoever can change it on its way reads the prompt.
    """
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"loadbalancer {text!r}: wanted http://HOST:PORT")
    if parts.scheme == "http" and not trust_network:
        try:
            context_for(text, None)
        except BadAddress:
            raise ValueError(
                f"loadbalancer {text!r}: leases in the clear are for loopback only; use https or an ssh "
                "tunnel, or trust_network=True where nobody else can listen"
            ) from None
