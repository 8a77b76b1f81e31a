"""Leases that are fetched before they are needed, so that a request need not wait for POST /route.

They come in batches, one call for as many as are missing, and are all alike: for a request of typical size,
of the client's own priority, and wherever there is room, because what will be asked is not known yet.
Requests far above the typical size take leases of their own, and so do those of lower priority. All others
take, of the leases at hand,

    the one of the instance that has answered most of their prefix, of equal ones the oldest;
    none at first, when another instance has answered so much more of the prefix that reading that again takes
    longer (READ_S a token) than POST /route does (route_s, as measured all the time): they ask, without
    waiting, for a lease where their prefix lies, and take one at hand when there is no room there;
    none at first either when no instance has read the prefix yet, but requests often come back and find no
    lease at hand where they were read: only a request that asks tells the loadbalancer its hashes, and so
    where the next turn is to go.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from fleet_client.back_off import back_off_s
from fleet_client.leases import PAUSE_S, ClientLease
from fleet_client.prefix_hashes import BLOCK_TOKENS
from fleet_client.token_estimate import TokenEstimate

IDLE_S = 5.0
"""Seconds without a request after which leases at hand go back: they keep capacity from others."""

FAR = 2.0
"""Multiple of the typical work above which a request takes a lease of its own, not one fetched ahead."""

FAR_WORK = 200.0
"""Output tokens that it must be above that as well: a few seconds of one place in a batch."""

SIZE_WEIGHT = 0.1
"""Weight of one request in the running means of sizes: they follow in about twenty."""

BATCH = 64
"""Most leases asked for in one call: what POST /route gives."""

BATCHES = 4
"""Parts of the wanted stock: one is asked for when it is missing. Calls stay few and the stock is never much
below what the user said."""

READ_S = 1e-4
"""Seconds in which a model server reads a prompt token, to compare with POST /route: 13B models take 0.04
(H100) to 0.4 ms (RTX 3090), 70B ones 0.2 to 1.3 (engine/step_time_constants.py, column e)."""

WORTH_BLOCKS = 2
"""Fewest blocks of a prefix that are worth a question, however near the loadbalancer is: 512 tokens are part
of one step of a busy engine, which reads other prompts in it, too."""

MISS_WEIGHT = 0.05
"""Weight of one request in the running share of those that found no lease where they had been read."""

ROUTE_WEIGHT = 0.2
"""Weight of one answer of /route in the running mean of how long it takes."""


class LeasesAhead:
    """The leases at hand that one client has fetched ahead: up to `most`, for requests of typical size.

    When no request came for IDLE_S they go back.
    """

    def __init__(self, most: int) -> None:
        """Start without leases, and fetch none before the first request."""
        self.most = most
        self.coming = 0  # asked for and not here yet
        self.route_s = 0.0  # what POST /route takes when it does not wait, a running mean
        self._missed = 0.0  # share of requests that had been read, but not where there was a lease
        self._ready: deque[ClientLease] = deque()
        self._used_at: float | None = None
        self._retry_at = 0.0
        self._refusals = 0  # in a row
        self._prompt = 0.0
        self._output = 0.0
        self._limited = True
        self._closed = False

    def __len__(self) -> int:
        """Return the number of leases that were fetched and are not used yet."""
        return len(self._ready)

    @property
    def typical(self) -> TokenEstimate:
        """The request size for which the next leases are fetched."""
        output = max(1, round(self._output)) if self._limited else None
        return TokenEstimate(round(self._prompt), output)

    # -- what a request takes

    def better_asked(self, blocks: int, near: Mapping[int, int], avoid: Collection[int], now: float) -> bool:
        """Return whether /route should be asked for a lease where the prefix lies, though some are at hand.

        blocks: of the whole prompt. near: of its prefix, by the instance that has answered them.
        """
        if blocks < WORTH_BLOCKS:
            return False
        here = [near.get(lease.instance_id, 0) for lease in self._usable(avoid, now)]
        if not here:
            return False  # it is asked in any case, and may wait
        longest = max((some for one, some in near.items() if one not in avoid), default=0)
        more = longest - max(here)
        self._missed += MISS_WEIGHT * ((more >= WORTH_BLOCKS) - self._missed)
        if longest > 0:
            return more >= WORTH_BLOCKS and more * BLOCK_TOKENS * READ_S > self.route_s
        # The next turn saves the reading, as likely as a turn has found no lease of late.
        return self._missed * blocks * BLOCK_TOKENS * READ_S > self.route_s

    def take(
        self,
        size: TokenEstimate,
        now: float,
        avoid: Collection[int] = (),
        near: Mapping[int, int] | None = None,
    ) -> ClientLease | None:
        """Take the fresh lease nearest to the prefix, of equal ones the oldest; None: one must be asked for.

        avoid: instances that it must not be for. near: as in `better_asked`.
        """
        if self.most == 0 or self._closed:
            return None
        far = self._used_at is not None and size.work > FAR * self.typical.work + FAR_WORK
        self._learn(size)
        self._used_at = now
        if far:
            return None
        usable = self._usable(avoid, now)
        if near:
            best = max(usable, key=lambda lease: near.get(lease.instance_id, 0), default=None)
        else:
            best = next(iter(usable), None)
        if best is not None:
            self._ready.remove(best)
        return best

    def _usable(self, avoid: Collection[int], now: float) -> Iterable[ClientLease]:
        return (lease for lease in self._ready if lease.fresh(now) and lease.instance_id not in avoid)

    def _learn(self, size: TokenEstimate) -> None:
        first = self._used_at is None
        weight = 1.0 if first else SIZE_WEIGHT
        # One giant must not make all leases giants.
        prompt = size.prompt_tokens if first else min(size.prompt_tokens, 4.0 * self._prompt + 1000.0)
        self._prompt += weight * (prompt - self._prompt)
        self._limited = size.max_tokens is not None
        if size.max_tokens is not None:
            weight = 1.0 if self._output == 0.0 else SIZE_WEIGHT
            output = size.max_tokens if weight == 1.0 else min(size.max_tokens, 4.0 * self._output + 1000.0)
            self._output += weight * (output - self._output)

    # -- what is fetched

    def want(self, now: float) -> int:
        """Return how many leases to ask for in one call now; they are coming until `arrived` or `refused`."""
        if self._closed or self._used_at is None or now >= self._used_at + IDLE_S or now < self._retry_at:
            return 0
        missing = self.most - sum(lease.fresh(now) for lease in self._ready) - self.coming
        if missing <= 0 or missing * BATCHES < self.most:
            return 0
        wanted = min(missing, BATCH)
        self.coming += wanted
        return wanted

    def answered(self, took_s: float) -> None:
        """Note how long POST /route took to answer, or to fail, when it was not asked to wait."""
        self.route_s += (ROUTE_WEIGHT if self.route_s else 1.0) * (took_s - self.route_s)

    def arrived(self, leases: Sequence[ClientLease], wanted: int, now: float) -> Sequence[ClientLease]:
        """Keep leases that were fetched, of `wanted` asked for; return those to give back: all, if idle."""
        if len(leases) < wanted:
            self.refused(wanted, 0.0, now)  # there is no room for the others
        else:
            self.coming -= wanted
            self._refusals = 0
        if self._closed or (self._used_at is not None and now >= self._used_at + IDLE_S):
            return leases
        self._ready.extend(leases)
        return ()

    def refused(self, wanted: int, retry_after_s: float, now: float) -> None:
        """Note that `wanted` leases are not coming; ask again after a pause."""
        self.coming -= wanted
        self._refusals += 1
        rest_s = max(retry_after_s, back_off_s(self._refusals, *PAUSE_S))
        self._retry_at = max(self._retry_at, now + rest_s)

    def look_in_s(self, now: float) -> float | None:
        """Return in how many seconds `sweep` or `want` may have news; None: not before a `take`."""
        if self._closed or self._used_at is None or now >= self._used_at + IDLE_S:
            return 0.0 if self._ready else None
        due = self._used_at + IDLE_S
        if self._ready:
            due = min(due, min(lease.stale_at for lease in self._ready))
        if self._retry_at > now:
            due = min(due, self._retry_at)
        return max(0.01, due - now)

    # -- what goes back

    def sweep(self, now: float) -> list[ClientLease]:
        """Remove and return the leases that are too old, or all when none was used for IDLE_S."""
        if self._used_at is not None and now >= self._used_at + IDLE_S:
            return self._remove(lambda _: True)
        return self._remove(lambda lease: not lease.fresh(now))

    def leave(self, instance_id: int) -> list[ClientLease]:
        """Remove and return the leases of an instance that failed."""
        return self._remove(lambda lease: lease.instance_id == instance_id)

    def close(self) -> list[ClientLease]:
        """Remove and return all leases, and fetch no more."""
        self._closed = True
        return self._remove(lambda _: True)

    def _remove(self, gone: Callable[[ClientLease], bool]) -> list[ClientLease]:
        removed = [lease for lease in self._ready if gone(lease)]
        if removed:
            self._ready = deque(lease for lease in self._ready if not gone(lease))
        return removed
