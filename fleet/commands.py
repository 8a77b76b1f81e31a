"""The commands that the cloud can be sent, as data.

A command is made by fleet/planner.py, written down by `InstanceSet.begin`, sent by a `Performer`, and its
reply given to `finish`. A failure costs only that command: what became of it is seen in the listing.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from vast.rows import Offer, Row


@dataclass(frozen=True)
class Create:
    """Rent a machine from an offer. The caller of `begin` gives the label, which is unique."""

    offer: Offer
    why: str
    label: str = ""
    evidence: str = ""  # what it follows from


@dataclass(frozen=True)
class Start:
    """Start a stopped instance, with the model still on its disk."""

    label: str
    id: int
    why: str


@dataclass(frozen=True)
class Stop:
    """Stop a running instance; its disk stays, with the model on it, and is still billed."""

    label: str
    id: int
    why: str


@dataclass(frozen=True)
class Destroy:
    """End the rental of an instance and its bill. Repeated until the listing does not show it any more."""

    label: str
    id: int
    why: str
    evidence: str = ""  # what it follows from


@dataclass(frozen=True)
class Drain:
    """Have an instance given no new requests. Nothing is asked of the cloud."""

    label: str
    id: int
    why: str


@dataclass(frozen=True)
class Undrain:
    """Have a draining instance given requests again. Nothing is asked of the cloud."""

    label: str
    id: int
    why: str


@dataclass(frozen=True)
class LookForOffers:
    """Search the market for offers, which come back with `finish`."""

    why: str


@dataclass(frozen=True)
class AskPage:
    """Ask for the cloud's page of one instance that the listings lack: only it says whether it is gone."""

    label: str
    id: int
    why: str


Command = Create | Start | Stop | Destroy | Drain | Undrain | LookForOffers | AskPage


class Reply(StrEnum):
    """What became of a command that was to be sent to the cloud."""

    DONE = "done"
    REFUSED = "refused"  # the cloud said no: nothing happened
    UNKNOWN = "unknown"  # no reply, or one that may hide an effect
    UNSENT = "unsent"  # a fault of ours: it was not sent


class AccountFault(StrEnum):
    """What the cloud holds against the account in a refusal, as far as its words tell."""

    KEY = "key"  # the API key is wrong
    SCOPE = "scope"  # the API key may not do that
    CREDIT = "credit"
    SPEND_LIMIT = "spend limit"
    IMAGE = "image"  # of the image or template that was ordered


def with_label(command: Create, label: str) -> Create:
    """Return the same order to create an instance, under that label."""
    return replace(command, label=label)


@dataclass(frozen=True)
class Performed:
    """What became of one command.

    why: the reason where it was not done. new_id: of a created instance. offers: what a search found.
    offer_gone: another customer has the offer; the next one may still be free. row: what the instance's own
    page shows; None when that says that there is no such instance. absent: the instance was gone before.
    sent_at: when it was sent, epoch seconds; None: just now. refusal: what the cloud holds against the
    account.
    """

    reply: Reply
    why: str = ""
    new_id: int | None = None
    offers: tuple[Offer, ...] | None = None
    offer_gone: bool = False
    row: Row | None = None
    absent: bool = False
    sent_at: float | None = None
    refusal: AccountFault | None = None

    def done_at(self, now: float) -> float | None:
        """Return about when it was done, since an answer may be long in coming; None: it was not."""
        if self.reply is not Reply.DONE:
            return None
        return now if self.sent_at is None else (self.sent_at + now) / 2.0
