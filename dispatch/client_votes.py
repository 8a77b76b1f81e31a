"""Which clients are believed when they say that a request failed: those whose claims have not proven false.

A claim is proven false by our own contact with the instance since (dispatch/circuit_breaker.py): its report
is good and its address answers with its certificate, or, after others' word had opened its circuit, the very
first request there is finished. FALSE_MOST of those within FALSE_S, and the client's claims count for nothing
for a while, which doubles. One whose claims were right begins anew.

Times are epoch seconds.
"""

import math
from dataclasses import dataclass

from fleet_client.back_off import back_off_s

FALSE_MOST, FALSE_S = 3, 60.0
"""False claims in so many seconds after which a client is not believed: an honest one makes few, because its
requests go elsewhere after one, and a network of its own that is broken makes many."""

UNHEARD_S = (60.0, 1800.0)
"""Seconds in which a client is not believed: the first time, doubling up to the second."""

MOST_CLIENTS = 1000
"""Clients that are remembered; the one longest without a false claim is forgotten first."""


@dataclass(slots=True)
class FalseClaims:
    """The false claims of one client lately, and until when the client is not believed.

    times: how often in a row it came to that.
    """

    false: int = 0
    first_at: float = -math.inf
    unheard_until: float = -math.inf
    times: int = 0

    def count_false(self, now: float) -> bool:
        """Count a false claim; return whether the client is no longer believed from now on."""
        if now - self.first_at > FALSE_S:
            self.false, self.first_at = 0, now
        self.false += 1
        if self.false < FALSE_MOST or now < self.unheard_until:
            return False
        self.false = 0
        self.times += 1
        self.unheard_until = now + back_off_s(self.times, *UNHEARD_S)
        return True


class ClientVotes:
    """Which clients are believed, by the false claims that they have made about instances."""

    def __init__(self) -> None:
        """Start without false claims: every client is believed."""
        self.unheard = 0  # times that a client was not to be believed any more
        self._records: dict[str, FalseClaims] = {}  # those with the latest false claim last

    def counts(self, client: str, now: float) -> bool:
        """Return whether that client is believed now, so that its claim is looked into."""
        it = self._records.get(client)
        return it is None or now >= it.unheard_until

    def contradict(self, client: str, now: float) -> None:
        """Count a claim of a client that has proven false."""
        it = self._records.pop(client, None) or FalseClaims()
        self._records[client] = it
        self.unheard += it.count_false(now)
        if len(self._records) > MOST_CLIENTS:
            del self._records[next(iter(self._records))]

    def confirm(self, client: str) -> None:
        """Forget a client's false claims, because a claim of it was right."""
        self._records.pop(client, None)
