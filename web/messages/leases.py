"""What a client asks of the loadbalancer and what it is given: POST /route, /done and /well."""

import re
from typing import Annotated, Literal

from msgspec import Meta, Struct

MAX_TOKENS = 10_000_000
"""Tokens of a request: ten times the longest context there is."""

MAX_WORK = 1e7
"""Work of a request, in output-token equivalents."""

MAX_WAIT_S = 600.0
"""Seconds that a request may wait for a lease."""

MAX_AVOID = 64
"""Instances that a request may avoid: more than a client tries."""

MAX_AFFINITY = 256
"""Hashes of a prompt's beginnings: 65,536 tokens of it."""

MAX_PROMPTS = 100_000
"""Prompts of one request: far more than an engine takes in one body."""

MAX_COUNT = 64
"""Leases of one answer, 20 kB of them."""

MAX_TOLD = 64
"""Answers that a client may tell of at once."""

MAX_ASKED = 256
"""Instances that a client may ask about at once."""

PrefixHash = Annotated[str, Meta(min_length=8, max_length=32)]
_HEX = re.compile("[0-9a-f]*")
Priority = Literal["high", "normal", "low"]
Outcome = Literal["finished", "failed", "unused"]


class RouteBody(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /route: either work, or prompt_tokens and max_tokens where it is known.

    prompts: how many the request holds, each of which may be as long as the model takes; default 1.
    """

    prompt_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    work: Annotated[float, Meta(ge=1e-3, le=MAX_WORK)] | None = None
    wait_s: Annotated[float, Meta(ge=0.0, le=MAX_WAIT_S)] | None = None
    avoid: Annotated[list[Annotated[int, Meta(ge=0, le=2**53)]], Meta(max_length=MAX_AVOID)] | None = None
    affinity: Annotated[list[PrefixHash], Meta(max_length=MAX_AFFINITY)] | None = None
    priority: Priority | None = None
    count: Annotated[int, Meta(ge=1, le=MAX_COUNT)] | None = None
    prompts: Annotated[int, Meta(ge=1, le=MAX_PROMPTS)] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a body with both work and tokens or neither, or hashes that are not hex."""
        # One look at all of them: msgspec's own look at each takes 1.6 µs (2026-11).
        if self.affinity and not _HEX.fullmatch("".join(self.affinity)):
            wrong = next(n for n, one in enumerate(self.affinity) if not _HEX.fullmatch(one))
            raise ValueError(f"affinity[{wrong}]: wanted hex digits 0-9 and a-f")
        if self.work is None:
            if self.prompt_tokens is None:
                raise ValueError("prompt_tokens: is missing (or give work)")
        elif self.prompt_tokens is not None or self.max_tokens is not None:
            raise ValueError("work: goes alone, without prompt_tokens and max_tokens")


class DoneBody(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /done, by which a client says how the request of a lease ended.

    why: one word of a-z, 0-9 and _, because a sentence could quote a prompt.
    """

    request_id: Annotated[str, Meta(min_length=1, max_length=64)]
    outcome: Outcome
    why: Annotated[str, Meta(pattern=r"\A[a-z0-9_]{0,40}\Z")] | None = None


class AnswerTold(Struct, frozen=True, forbid_unknown_fields=True):
    """How fast the answer to one request came: seconds to its first part, and for all others.

    pieces: parts of a stream; 0: it came in one.
    """

    request_id: Annotated[str, Meta(min_length=1, max_length=64)]
    first_s: Annotated[float, Meta(ge=0.0, le=1e5)]
    rest_s: Annotated[float, Meta(ge=0.0, le=1e5)]
    pieces: Annotated[int, Meta(ge=0, le=MAX_TOKENS)]


class PaceBody(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /pace, by which a client says how fast answers came."""

    answers: Annotated[list[AnswerTold], Meta(max_length=MAX_TOLD)]


class WellBody(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /well, by which a client asks about instances whose answers have fallen silent."""

    instances: Annotated[list[Annotated[int, Meta(ge=0, le=2**53)]], Meta(max_length=MAX_ASKED)]


class WellAnswer(Struct, frozen=True):
    """Of the instances that were asked about, those that answer nothing any more, each with one word why."""

    out: dict[int, str]


class LeaseAnswer(Struct, frozen=True, gc=False, omit_defaults=True):
    """One lease: where the request goes, and the single-use token that admits it.

    expires_at: epoch seconds; expires_in_s: for a client whose clock is wrong. certificate (PEM) and
    public_key_sha256 (base64): of an instance with TLS; leases of a batch have them in `certificates`.
    first_token_s: seconds in which the first token is expected; of a batch those of a typical request.
    """

    address: str
    token: str
    request_id: str
    instance_id: int
    model: str
    expires_at: float
    expires_in_s: float
    certificate: str | None = None
    public_key_sha256: str | None = None
    first_token_s: float | None = None

    def __repr__(self) -> str:
        """Return a text for logs, which leaves out the lease's token."""
        return f"LeaseAnswer(request_id={self.request_id!r}, instance_id={self.instance_id})"


class InstanceCertificate(Struct, frozen=True, gc=False):
    """The certificate of one instance (PEM), and the SHA-256 of its public key (base64)."""

    certificate: str
    public_key_sha256: str


class LeaseBatch(Struct, frozen=True):
    """The answer to a POST /route with `count`: up to so many leases.

    certificates: of the instances in the leases, by instance id.
    """

    leases: list[LeaseAnswer]
    certificates: dict[int, InstanceCertificate]
