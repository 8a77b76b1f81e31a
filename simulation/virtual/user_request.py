"""One request of a user, from its arrival to its end.

    asking ──lease──► sent ──answer──► ended
     ▲  │ held ─lease──▲ │               ▲
     │  └──►┘            │ its instance  │ its time is up
     └───────────────────┘ failed it     └── asking, held

An illegal move raises NotConserved and changes nothing.
"""

from dataclasses import replace
from enum import Enum

from dispatch.lease import Lease
from dispatch.route_request import RouteRequest
from fleet_client.back_off import back_off_s

RETRY_S = (0.5, 5.0)
"""Seconds of a client's pause before its second and later tries: the first doubles up to the second."""

MOST_AVOIDED = 16
"""Instances that a request avoids at once: the last that failed it."""


class NotConserved(Exception):
    """A run lost or doubled a request, a token or a dollar: a fault of the simulation."""


def must(holds: bool, otherwise: str) -> None:
    """Raise NotConserved with the text `otherwise` unless the condition holds."""
    if not holds:
        raise NotConserved(otherwise)


class Place(Enum):
    """Where a request is on its way from arrival to end, as in the module's picture."""

    ASKING = "asking"
    HELD = "held"
    SENT = "sent"
    ENDED = "ended"


class UserRequest:
    """A request of a user and what it went through. Times in seconds, lengths in tokens.

    at: when it came; up_at: when its user gives up. given_at: when it got its last lease. row: its number
    in the model servers' table, 0 while it is in none. late: it was in the late lane.
    """

    __slots__ = (
        "ask",
        "at",
        "given_at",
        "late",
        "lease",
        "output",
        "place",
        "prompt",
        "row",
        "scored",
        "tries",
        "up_at",
    )  # fmt: skip

    def __init__(
        self, at: float, prompt: int, output: int, ask: RouteRequest, up_at: float, scored: bool
    ) -> None:
        """Make a request that arrives now. scored: whether it arrives in the part of the run that counts."""
        self.at = at
        self.prompt = prompt
        self.output = output
        self.ask = ask
        self.up_at = up_at
        self.scored = scored
        self.tries = 0
        self.given_at = at
        self.row = 0
        self.lease: Lease | None = None
        self.place = Place.ASKING
        self.late = False

    @property
    def given(self) -> Lease:
        """The lease that this request has; raises NotConserved if it has none."""
        lease = self.lease
        if lease is None:
            raise NotConserved("a request has no lease, and was to have one")
        return lease

    def hold(self) -> None:
        """Note that the request waits at the loadbalancer."""
        self.place = Place.HELD

    def send(self, lease: Lease, now: float, late: bool = False) -> None:
        """Note that the request goes to the instance of the lease. late: it waited in the late lane."""
        self.place = Place.SENT
        self.lease = lease
        self.given_at = now
        self.tries += 1
        self.late = self.late or late

    def submitted(self, row: int) -> None:
        """Note the row that the request has in the table of the model servers."""
        self.row = row

    def set_back(self) -> float:
        """Note that the request's instance failed; return the seconds to wait before asking for another."""
        lease = self.given
        must(self.place is Place.SENT, "a request failed that was not on its way")
        self.place = Place.ASKING
        self.lease = None
        self.row = 0
        self.ask = replace(self.ask, avoid=(*self.ask.avoid, lease.instance_id)[-MOST_AVOIDED:])
        return back_off_s(self.tries - 1, *RETRY_S)

    def complete(self) -> None:
        """Note that the request was answered."""
        must(self.place is Place.SENT, f"a request completed that was {self.place.value}")
        self.place = Place.ENDED

    def give_up(self) -> None:
        """Note that the request ended without an answer."""
        must(
            self.place in (Place.ASKING, Place.HELD),
            f"a request was given up while it was {self.place.value}",
        )
        self.place = Place.ENDED
