"""What can be asked of the cloud, as data; and, below the line, the one who asks.

A command is made by `InstanceSet.decide`, written down by `begin`, sent by a `Performer`, and its
reply given to `finish`. Its failure costs only itself: what became of it is seen in the listing.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from vast.rows import Offer


@dataclass(frozen=True)
class Create:
    """Rent this offer. The label is given by `begin`'s caller and is unique."""

    offer: Offer
    why: str
    label: str = ""


@dataclass(frozen=True)
class Start:
    """Start a stopped instance."""

    label: str
    id: int
    why: str


@dataclass(frozen=True)
class Stop:
    """Stop a running instance; its disk stays."""

    label: str
    id: int
    why: str


@dataclass(frozen=True)
class Destroy:
    """End a rental and its bill. Repeated until the listing does not show it any more."""

    label: str
    id: int
    why: str


@dataclass(frozen=True)
class Drain:
    """Give it no new requests. Nothing is asked of the cloud."""

    label: str
    id: int
    why: str


@dataclass(frozen=True)
class Undrain:
    """Give it requests again. Nothing is asked of the cloud."""

    label: str
    id: int
    why: str


@dataclass(frozen=True)
class LookForOffers:
    """Search the market; the offers come back through `offers_found`."""

    why: str


Command = Create | Start | Stop | Destroy | Drain | Undrain | LookForOffers


class Reply(StrEnum):
    """What became of a command at the cloud."""

    DONE = "done"
    REFUSED = "refused"  # the cloud said no: nothing happened
    UNKNOWN = "unknown"  # no reply, or one that may hide an effect


def with_label(command: Create, label: str) -> Create:
    """The same order under that label."""
    return replace(command, label=label)


@dataclass(frozen=True)
class Performed:
    """How a command went: the reply, the new instance's id, the offers found, and why not."""

    reply: Reply
    why: str = ""
    new_id: int | None = None
    offers: tuple[Offer, ...] | None = None
    offer_gone: bool = False
