"""Single-use tokens: made by the auth_server, taken by the token check of the model server.

    token = base64url( number u32 | expires u64 | HMAC-SHA256(key of this boot, both)[:16] )

A token needs no entry anywhere to be known as ours. That it was used stands in a file of one byte a slot:

    slot of a token = number mod SLOTS
    0 never used · g unspent, 1 ≤ g ≤ 127 the round of the ring · g + 128 spent

Taking a token checks the signature, the time, and under the file's lock that the slot says "unspent, this
round", and says "spent" from then on. So exactly one of any number of racing takers in any number of
processes wins, and a restart of either process forgets nothing. The key dies with the boot, and so do all
tokens.

Times are seconds of the machine's monotonic clock, which every process on it shares and nobody can set.
"""

import base64
import binascii
import hashlib
import hmac
import os
import struct
from collections import deque

from remote.shared_file import HEADER, SharedFile, make_file

LIFE_S = 600.0
"""A token is good for so long; the loadbalancer renews its stock well before."""

CAP = 100_000
"""Tokens that may be outstanding (issued, neither spent nor expired) at once."""

SLOTS = 131_072
"""Slots of the ring: more than CAP, so that one free of outstanding tokens is soon found."""

_ROUNDS = 127
_SPENT = 0x80
_SIGNED = struct.Struct(">IQ")
_MAC = 16
TOKEN_CHARS = (4 * (_SIGNED.size + _MAC) + 2) // 3
"""Length of a token: 38 characters."""


class TooMany(Exception):
    """So many tokens are outstanding that no more may be issued for now."""


def make_store(boot_dir: str) -> None:
    """Make a key for this boot's tokens and an empty ring of slots, in the boot directory."""
    make_file(os.path.join(boot_dir, "spent"), SLOTS)
    fd = os.open(os.path.join(boot_dir, "token.key"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as f:
        f.write(os.urandom(32))


def request_id(token: str) -> str:
    """Return the public name of the request that a token admits; the loadbalancer computes the same."""
    return hashlib.sha256(token.encode()).hexdigest()[:16]


class _Store:
    """The key and the ring of slots for the tokens of one boot, opened."""

    def __init__(self, boot_dir: str) -> None:
        """Open the files in that boot directory; raise OSError."""
        with open(os.path.join(boot_dir, "token.key"), "rb") as f:
            self._key = f.read()
        self._ring = SharedFile(os.path.join(boot_dir, "spent"))

    def close(self) -> None:
        """Close the file of the ring."""
        self._ring.close()

    def _mac(self, signed: bytes) -> bytes:
        return hmac.digest(self._key, signed, "sha256")[:_MAC]


class Gate(_Store):
    """Checks and takes tokens: each admits one request."""

    def take(self, token: str, now: float) -> bool:
        """Take a token; return whether it admits a request. From then on it admits none."""
        if len(token) != TOKEN_CHARS:
            return False
        try:
            raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
        except (ValueError, binascii.Error):
            return False
        signed, mac = raw[: _SIGNED.size], raw[_SIGNED.size :]
        if not hmac.compare_digest(self._mac(signed), mac):
            return False
        number, expires_ms = _SIGNED.unpack(signed)
        # A second spelling of the same bytes would be another request to the loadbalancer.
        if now * 1000.0 >= expires_ms or _encode(raw) != token:
            return False
        at, unspent = HEADER + number % SLOTS, _unspent(number)
        with self._ring as ring:
            if ring.data[at] != unspent:
                return False
            ring.data[at] = unspent | _SPENT
        return True


class Issuer(_Store):
    """Makes tokens; there is one issuer in a boot, restarted or not. Not for several threads at once."""

    def __init__(self, boot_dir: str, now: float) -> None:
        """Go on where an earlier issuer ended: its unspent tokens count as if they were fresh."""
        super().__init__(boot_dir)
        with self._ring as ring:
            # Before the mark all had expired when the last batch was made: those do not count again.
            begin, self._next = ring.mark, ring.counter
        self._batches: deque[tuple[float, list[int]]] = deque()  # (expires, numbers)
        if left := self._outstanding(list(range(begin, self._next))):
            self._batches.append((now + LIFE_S, left))

    def issue(self, count: int, now: float) -> list[str]:
        """Return `count` fresh tokens, good for LIFE_S; raise TooMany if they would exceed CAP."""
        while self._batches and self._batches[0][0] <= now:
            self._batches.popleft()
        if self._bound() + count > CAP:
            # The bound counts spent ones as well: only now is it worth looking at each.
            kept = ((expires, self._outstanding(numbers)) for expires, numbers in self._batches)
            self._batches = deque((expires, numbers) for expires, numbers in kept if numbers)
            if self._bound() + count > CAP:
                raise TooMany(f"{self._bound()} tokens are outstanding, at most {CAP} may be")
        held: set[int] = set()
        if self._batches and self._next + count - SLOTS > self._batches[0][1][0]:
            # Once round the ring, and some of those who were there are still good: keep off their slots.
            held = {n % SLOTS for _, numbers in self._batches for n in numbers}
        numbers: list[int] = []
        while len(numbers) < count:
            if self._next % SLOTS not in held:
                numbers.append(self._next)
            self._next += 1
        with self._ring as ring:
            for n in numbers:
                ring.data[HEADER + n % SLOTS] = _unspent(n)
            self._batches.append((now + LIFE_S, numbers))
            ring.mark, ring.counter = self._batches[0][1][0], self._next
        expires_ms = int((now + LIFE_S) * 1000.0)
        signed = (_SIGNED.pack(n & 0xFFFFFFFF, expires_ms) for n in numbers)
        return [_encode(s + self._mac(s)) for s in signed]

    def outstanding(self, now: float) -> int:
        """Return how many tokens are neither spent nor expired."""
        return sum(len(self._outstanding(numbers)) for expires, numbers in self._batches if expires > now)

    def _bound(self) -> int:
        return sum(len(numbers) for _, numbers in self._batches)

    def _outstanding(self, numbers: list[int]) -> list[int]:
        with self._ring as ring:
            state = ring.data[HEADER:]
        return [n for n in numbers if state[n % SLOTS] == _unspent(n)]


def _unspent(number: int) -> int:
    """Return what the slot of an unspent token holds.

    It repeats SLOTS × 127 tokens later, long after the token expired.
    """
    return 1 + (number & 0xFFFFFFFF) // SLOTS % _ROUNDS


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
