"""What can be asked of the cloud, as data.

A command is made by fleet/planner.py, written down by `InstanceSet.begin`, sent by a `Performer`, and its
reply given to `finish`. Its failure costs only itself: what became of it is seen in the listing.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from vast.rows import Offer, Row


@dataclass(frozen=True)
class Create:
    """Rent this offer. The caller of `begin` gives the label, which is unique."""

    offer: Offer
    why: str
    label: str = ""
    evidence: str = ""  # what it follows from


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
    evidence: str = ""  # what it follows from


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


@dataclass(frozen=True)
class AskPage:
    """Ask for the instance's own page: the listings lack it, and only its page says that it is gone."""

    label: str
    id: int
    why: str


Command = Create | Start | Stop | Destroy | Drain | Undrain | LookForOffers | AskPage


class Reply(StrEnum):
    """What became of a command at the cloud."""

    DONE = "done"
    REFUSED = "refused"  # the cloud said no: nothing happened
    UNKNOWN = "unknown"  # no reply, or one that may hide an effect
    UNSENT = "unsent"  # a fault of ours: it was not sent


def with_label(command: Create, label: str) -> Create:
    """Return the same order under that label."""
    return replace(command, label=label)


@dataclass(frozen=True)
class Performed:
    """How a command went. why: it was not done. new_id: of a created instance.

    offers: what a search found. offer_gone: another customer has the offer; the next one may still be free.
    row: what the instance's own page shows, None when it says that there is none.
    """

    reply: Reply
    why: str = ""
    new_id: int | None = None
    offers: tuple[Offer, ...] | None = None
    offer_gone: bool = False
    row: Row | None = None
