"""The single-use tokens of one instance that wait to be leased, and how many of them to keep.

Tokens of the oldest lot are leased first. A token that was leased and given back unused is kept for the
client that had it: that client could still use it, so another client might be refused by the instance.

The level is the number of tokens used in STOCK_S; a stock is refilled when it is at a quarter of its level,
or at half of the least level, or when its tokens become old.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fleet_client.back_off import back_off_s

TOKEN_SHARE = 0.8
"""Part of a token's life in which it is leased; the client has the rest."""

RENEW_SHARE = 0.7
"""Part of the newest tokens' life after which new ones are fetched: an idle instance never runs dry."""

STOCK_S = 40.0
"""Seconds of use that a full stock lasts."""

STOCK_LEAST, STOCK_MOST = 400, 2000
"""Bounds of the level, in tokens. An idle instance has enough for a burst and for a while of use: with 64, a
thousand instances that begin to be used together were refilled twice in their first seconds, which took a
sixth of the rate (bench/route, 2026-11). 400 tokens are 40 kB."""

USE_INTERVAL_S = 1.0
"""Least seconds over which the use of an instance is measured."""

REFILL_MOST = 1000
"""Tokens fetched at a time: parsing 1000 takes about 3 ms, in which nothing is answered."""

REFILL_RETRY_S = (0.25, 10.0)
"""Seconds until a failed refill is repeated: the first pause, doubling up to the second."""


@dataclass(slots=True, eq=False)
class TokenLot:
    """Tokens that were fetched together; none is leased after lease_until. Times are epoch seconds."""

    tokens: list[str]
    lease_until: float
    expires_at: float


class TokenStock:
    """The unused tokens of one instance, and the state of its refills."""

    def __init__(self, now: float) -> None:
        """Start without tokens."""
        self.size = 0
        self.refilling = False  # a refill is under way
        self.retry_at = now
        self._lots: deque[TokenLot] = deque()
        self._returned: dict[str, list[tuple[str, TokenLot]]] = {}  # by the client that gave them back
        self._renew_at = math.inf
        self._old_at = math.inf  # the oldest lot is not leased from then on
        self._level = STOCK_LEAST
        self._used = 0  # tokens taken since _counted_from
        self._counted_from = now
        self._failures = 0  # refills in a row that failed

    # -- leasing --

    def take(self, now: float, client: str = "") -> tuple[str, TokenLot] | None:
        """Take one token for that client and return it with its lot; None when the stock is empty."""
        if self._returned and (mine := self._take_returned(client, 1, now)):
            return mine[0]
        if self._old_at <= now:
            self.drop_old(now)
        if not self._lots:
            return None
        lot = self._lots[0]
        self.size -= 1
        self._used += 1
        token = lot.tokens.pop()
        if not lot.tokens:
            self._drop()
        return token, lot

    def take_some(self, count: int, now: float, client: str = "") -> list[tuple[str, TokenLot]]:
        """Take `count` tokens for that client, or as many as there are; return each with its lot."""
        self.drop_old(now)
        out = self._take_returned(client, count, now) if self._returned else []
        before = len(out)
        while self._lots and len(out) < count:
            lot = self._lots[0]
            few = count - len(out)
            out += [(token, lot) for token in reversed(lot.tokens[-few:])]
            del lot.tokens[-few:]
            if not lot.tokens:
                self._drop()
        self.size -= len(out) - before
        self._used += len(out) - before
        return out

    def give_back(self, token: str, lot: TokenLot, client: str = "") -> None:
        """Keep a token that was leased and not used for the client that had it."""
        self._returned.setdefault(client, []).append((token, lot))

    def _take_returned(self, client: str, count: int, now: float) -> list[tuple[str, TokenLot]]:
        """Take up to `count` of the tokens that this client gave back, and drop those that are too old."""
        mine = self._returned.get(client, [])
        out: list[tuple[str, TokenLot]] = []
        while mine and len(out) < count:
            token, lot = mine.pop()
            if lot.lease_until > now:
                out.append((token, lot))
        if not mine:
            self._returned.pop(client, None)
        return out

    def drop_old(self, now: float) -> None:
        """Drop the tokens that are too old to be leased."""
        while self._old_at <= now:
            self.size -= len(self._drop().tokens)

    def _drop(self) -> TokenLot:
        gone = self._lots.popleft()
        self._old_at = self._lots[0].lease_until if self._lots else math.inf
        return gone

    def clear(self) -> None:
        """Drop all tokens of the stock, because the instance has rebooted."""
        self._lots.clear()
        self._returned.clear()
        self.size, self._old_at = 0, math.inf

    # -- refilling --

    def is_low(self, now: float) -> bool:
        """Return whether tokens are to be fetched: few are left or they become old, and no refill runs."""
        if self.refilling:
            return False
        return self.size < max(STOCK_LEAST // 2, self._level // 4) or now >= self._renew_at

    def begin_refill(self, now: float) -> int:
        """Note that a refill is under way from now on; return how many tokens it should fetch."""
        self.refilling = True
        # The level by use until now: an instance that has just begun to be used is not refilled in two steps.
        self._level = max(self._level, self._wanted_level(now))
        kept = self.size if now < self._renew_at else 0  # those to be renewed count for nothing
        return min(REFILL_MOST, self._level - kept)

    def end_refill(self) -> None:
        """Note that the refill is not under way any more."""
        self.refilling = False

    def refill(self, tokens: Sequence[str], expires_in_s: float, now: float) -> None:
        """Add a lot of tokens that live `expires_in_s` from now, and measure the use of tokens anew."""
        self._failures = 0
        level = self._wanted_level(now)
        if now - self._counted_from < USE_INTERVAL_S:
            self._level = max(self._level, level)  # too short to say that it is used less
        else:
            self._level, self._counted_from, self._used = level, now, 0
        kept = {c: [x for x in some if x[1].lease_until > now] for c, some in self._returned.items()}
        self._returned = {c: some for c, some in kept.items() if some}
        self._lots.append(TokenLot(list(tokens), now + TOKEN_SHARE * expires_in_s, now + expires_in_s))
        self.size += len(tokens)
        self._renew_at = now + RENEW_SHARE * expires_in_s
        self._old_at = self._lots[0].lease_until

    def postpone_refill(self, now: float) -> None:
        """Have a failed refill repeated after a pause, which doubles with each failure in a row."""
        self._failures += 1
        self.retry_at = now + back_off_s(self._failures, *REFILL_RETRY_S)

    def _wanted_level(self, now: float) -> int:
        """Return how many tokens last for STOCK_S at the rate of use since _counted_from."""
        level = STOCK_S * self._used / max(now - self._counted_from, 0.05)
        if not self.size and self._used:
            level = max(level, 2.0 * self._level)  # it ran dry, so how much was wanted is not known
        return round(min(STOCK_MOST, max(STOCK_LEAST, level)))
