"""What can be asked of the cloud, as data.

A command is made by fleet/planner.py, written down by `InstanceSet.begin`, sent by a `Performer`, and its
reply given to `finish`. Its failure costs only itself: what became of it is seen in the listing.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from vast.rows import Offer


@dataclass(frozen=True)
class Create:
    """Rent this offer. The caller of `begin` gives the label, which is unique."""

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
    """Give the instance no new requests. Nothing is asked of the cloud."""

    label: str
    id: int
    why: str


@dataclass(frozen=True)
class Undrain:
    """Give the instance requests again. Nothing is asked of the cloud."""

    label: str
    id: int
    why: str


@dataclass(frozen=True)
class LookForOffers:
    """Search the market; the offers come back with `finish`."""

    why: str


Command = Create | Start | Stop | Destroy | Drain | Undrain | LookForOffers


class Reply(StrEnum):
    """What became of a command at the cloud."""

    DONE = "done"
    REFUSED = "refused"  # the cloud said no: nothing happened
    UNKNOWN = "unknown"  # no reply, or one that may hide an effect


def with_label(command: Create, label: str) -> Create:
    """Return the same order under that label."""
    return replace(command, label=label)


@dataclass(frozen=True)
class Performed:
    """How a command went. why: it was not done. new_id: of a created instance.

    offers: what a search found. offer_gone: another customer has the offer; the next one may still be free.
    """

    reply: Reply
    why: str = ""
    new_id: int | None = None
    offers: tuple[Offer, ...] | None = None
    offer_gone: bool = False
