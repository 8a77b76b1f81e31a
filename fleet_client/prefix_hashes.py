"""Salted hashes of a prompt's prefixes: they find where it was read before, without showing it.

A model server that has read a prefix need not read it again, so the loadbalancer has to know which prompts
begin alike. It is told salted hashes of their beginnings:

    prompt, as canonical text   ├── 1024 bytes ──┼── 1024 bytes ──┼── 1024 bytes ──┼── the rest ─┤
                                └───── h1 ───────┘                │                │
                                └───────────── h2 ────────────────┘                │
                                └───────────────────── h3 ─────────────────────────┘

    h_i = BLAKE2b of the first i blocks, with the salt as its key, 8 bytes

Tools come first, then the system's words, then the messages in order, as chat templates have them: two
turns of a conversation share what the first one had, and conversations share their system prompt. A block
is 256 tokens by token_estimate's measure; token ids take 4 bytes each, so 256 of them are one, too.

Whoever has the hashes but not the salt learns which prompts under one salt begin with the same whole blocks,
and how many blocks they have, which prompt_tokens says anyway; they cannot check a guess of a text, however
short the list of guesses is. Whoever has the salt, too, can. Two texts may in theory have the same canonical
text: it is a hint, and the worst it does is send a request where its prefix is not.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from fleet_client.token_estimate import (
    BYTES_PER_TOKEN,
    DEEPEST,
    MEDIA_TOKENS,
    TokenEstimate,
    is_media,
    makes_text,
)

BLOCK_TOKENS, MOST_BLOCKS = 256, 256
"""Tokens of a block, and most blocks that are hashed: what POST /route takes."""

BLOCK = BLOCK_TOKENS * BYTES_PER_TOKEN
"""Bytes of canonical text in a block."""

LEAST_SALT = 16
"""Fewest bytes of a salt: one that can be guessed is none."""

REMEMBERED, HOLDERS = 20_000, 4
"""Most hashes kept, about 250 bytes each, and instances kept for each: the last that served it."""

_FIRST = ("role", "content")
_BEFORE, _MAIN = ("tools", "functions", "instructions", "system"), ("messages", "prompt", "input")
_TEXTS = frozenset(("text", "input_text", "output_text"))


class Hasher:
    """Makes the hashes of prompts' prefixes under one salt, which is never shown."""

    def __init__(self, salt: bytes) -> None:
        """Use that salt; raise ValueError for one that can be guessed."""
        if len(salt) < LEAST_SALT:
            raise ValueError(f"affinity_salt: wanted at least {LEAST_SALT} bytes, got {len(salt)}")
        self._key = hashlib.blake2b(salt, digest_size=32, person=b"fleet affinity").digest()

    def hashes(self, target: str, said: Mapping[str, Any] | None, size: TokenEstimate) -> tuple[str, ...]:
        """Return the hashes of a prompt's prefixes, the shortest first; none if it has no whole block.

        target: the path. said: the request's body as JSON. size: its estimated size.
        """
        blocks = min(MOST_BLOCKS, size.prompt_tokens // BLOCK_TOKENS)
        if said is None or blocks == 0 or not makes_text(target):
            return ()
        text = canonical(said, blocks * BLOCK, self._key)
        hasher = hashlib.blake2b(key=self._key, digest_size=8)
        out = []
        for end in range(BLOCK, len(text) + 1, BLOCK):
            hasher.update(text[end - BLOCK : end])
            out.append(hasher.copy().hexdigest())
        return tuple(out)


def canonical(said: Mapping[str, Any], limit: int, key: bytes) -> bytes:
    """Return the first `limit` bytes of the text that a model reads, however it is written as JSON.

    Of several prompts the first counts. key: pictures and sounds stand there as their hashes under it.
    """
    found = _Text(limit, key)
    for name in _BEFORE:
        found.add(said.get(name))
    for name in _MAIN:
        value = said.get(name)
        if name == "prompt" and isinstance(value, list) and value and not isinstance(value[0], int):
            value = value[0]
        found.add(value)
    return found.joined()


class _Text:
    """The text of a prompt, put together from the JSON of its request so that its beginnings can be hashed.

    The same prompt gives the same bytes; what is longer than `limit` bytes is cut off.
    """

    def __init__(self, limit: int, key: bytes) -> None:
        self._parts: list[bytes] = []
        self._limit = limit
        self._left = limit
        self._key = key

    def joined(self) -> bytes:
        return b"".join(self._parts)[: self._limit]

    def add(self, value: object, depth: int = 0) -> None:
        """Add the text in a JSON value; one that is empty or no text of the prompt adds nothing."""
        if self._left <= 0 or not value or depth > DEEPEST:
            return
        if isinstance(value, str):
            # A character has at least one byte, so no more of them are looked at than are wanted.
            self._put(b"\0" + value[: self._left].encode(errors="surrogatepass"))
        elif isinstance(value, dict):
            self._add_fields(value, depth)
        elif isinstance(value, list):
            if isinstance(value[0], int) and self._add_ids(value):
                return
            for one in value:
                self.add(one, depth + 1)
        else:
            self._put(b"\0" + repr(value).encode())

    def _add_fields(self, value: Mapping[str, Any], depth: int) -> None:
        if is_media(value):
            self._add_media(value, depth)
            return
        text = value.get("text")
        if isinstance(text, str) and value.get("type") in _TEXTS:
            # The same as the text alone. What else stands there is no part of the prompt, and may move from
            # turn to turn, as cache_control does.
            self.add(text, depth + 1)
            return
        self._put(b"\1")  # signs stand before what they divide: a text that grows begins like the shorter one
        for name in _FIRST:
            self.add(value.get(name), depth + 1)
        for name in sorted(value):
            if name not in _FIRST and value[name]:
                self.add(name, depth + 1)
                self.add(value[name], depth + 1)

    def _add_ids(self, ids: list[Any]) -> bool:
        try:
            self._put(array("I", ids[: self._left // BYTES_PER_TOKEN + 1]).tobytes())
        except (TypeError, OverflowError):
            return False  # no token ids
        return True

    def _add_media(self, value: Mapping[str, Any], depth: int) -> None:
        """Add a picture, a sound or the like as its digest, of the length that token_estimate assumes."""
        whole = _Text(2**62, self._key)
        for name in sorted(value):
            whole.add(name)
            whole.add(value[name], depth + 1)
        digest = hashlib.blake2b(whole.joined(), key=self._key, digest_size=40).digest()
        self._put(digest * (MEDIA_TOKENS * BYTES_PER_TOKEN // 40))

    def _put(self, raw: bytes) -> None:
        self._parts.append(raw)
        self._left -= len(raw)


class Served:
    """Which instances have answered which prefixes, as far as this client knows; a bounded number."""

    def __init__(self, most: int = REMEMBERED) -> None:
        """Start without prefixes. most: how many hashes are kept."""
        self._most = most
        self._holders: OrderedDict[str, tuple[int, ...]] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of hashes that are kept."""
        return len(self._holders)

    def note(self, hashes: Sequence[str], instance_id: int) -> None:
        """Note that an instance has answered a request with these prefixes."""
        kept = self._holders
        for one in hashes:
            before = kept.get(one)
            if before is None or before[0] != instance_id:
                rest = [i for i in before or () if i != instance_id]
                kept[one] = (instance_id, *rest[: HOLDERS - 1])
            kept.move_to_end(one)
        while len(kept) > self._most:
            kept.popitem(last=False)

    def blocks(self, hashes: Sequence[str]) -> dict[int, int]:
        """Return how many blocks of the prefix each instance has answered, by instance, if any."""
        found: dict[int, int] = {}
        for n in range(len(hashes), 0, -1):
            for instance_id in self._holders.get(hashes[n - 1], ()):
                found.setdefault(instance_id, n)
        return found
