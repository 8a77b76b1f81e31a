"""What an instance says of itself: to whoever asks its auth_server, and by itself (remote/ makes these)."""

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct

MAX_EVENTS = 2_000
"""Events of a report that is pushed; an instance that has more to say is polled."""

MAX_REPORT_BODY = 2**18
"""Bytes of a report that is pushed."""

Total = Annotated[int, Meta(ge=0, le=2**62)]
EventNumber = Annotated[int, Meta(ge=0, le=2**53)]
RequestId = Annotated[str, Meta(min_length=16, max_length=16)]
RequestBytes = Annotated[int, Meta(ge=0, le=2**32)]
BootId = Annotated[str, Meta(min_length=1, max_length=64)]
MessageNumber = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Token = Annotated[str, Meta(min_length=1)]


class RequestEnd(Struct, frozen=True, gc=False):
    """The end of one request, and with how many tokens it was answered."""

    id: RequestId
    status: Literal["finished", "aborted", "failed"]
    output_tokens: Annotated[int, Meta(ge=0, le=2**32)]


class LoadReport(Struct, frozen=True):
    """One load report (GET /load): events numbered up to seq, and how things stand.

    missed: events between the asked number and the first one here are lost. started: ids of requests whose
    token was taken; started_bytes: how long each of them was, 0 where it did not say; none from an instance
    that cannot tell. running, waiting: in the model server. model_up: whether it answers; the figures are 0
    when not. kv_use: share of the KV memory in use, None where the engine does not say. Totals count from the
    engine's start.
    """

    boot_id: str
    seq: Total
    started: Sequence[RequestId]
    ended: Sequence[RequestEnd]
    running: Total
    waiting: Total
    model_up: bool
    prompt_tokens_total: Total
    generation_tokens_total: Total
    started_bytes: Sequence[RequestBytes] = ()
    missed: bool = False
    kv_use: float | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit, with ValueError."""
        _check_sizes(self.started, self.started_bytes)


class TokenOrder(Struct, frozen=True, omit_defaults=True):
    """The body of POST /tokens. report_to: URL where the instance is to send its reports from now on."""

    count: int
    report_to: str | None = None


class TokenBatch(Struct, frozen=True):
    """Fresh single-use tokens of one boot, good for expires_in_s from now, and the load at that moment."""

    tokens: Annotated[Sequence[Token], Meta(min_length=1)]
    boot_id: str
    expires_in_s: float
    load: LoadReport

    def __repr__(self) -> str:
        """Show no token."""
        return f"TokenBatch({len(self.tokens)} tokens, boot_id={self.boot_id!r}, load={self.load!r})"


class PushedReport(Struct, frozen=True):
    """What an instance says by itself (POST /report): its events after..seq.

    number grows within a boot. The other fields are as in LoadReport.
    """

    boot_id: BootId
    number: MessageNumber
    after: EventNumber
    seq: EventNumber
    missed: bool
    started: Annotated[Sequence[RequestId], Meta(max_length=MAX_EVENTS)]
    ended: Annotated[Sequence[RequestEnd], Meta(max_length=MAX_EVENTS)]
    model_up: bool
    started_bytes: Annotated[Sequence[RequestBytes], Meta(max_length=MAX_EVENTS)] = ()

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit, with ValueError."""
        _check_sizes(self.started, self.started_bytes)


class ReportTaken(Struct, frozen=True):
    """The answer to POST /report: the earliest time for the next one, in seconds."""

    next_in_s: float


class ReadyBody(Struct, frozen=True):
    """How an instance's model is (POST /ready). number grows within a boot; why: how far, or what failed."""

    state: Literal["loading", "ready", "failed"]
    boot_id: BootId
    number: MessageNumber
    why: Annotated[str, Meta(max_length=300)] | None = None


def _check_sizes(started: Sequence[str], sizes: Sequence[int]) -> None:
    if sizes != () and len(sizes) != len(started):
        raise ValueError(f"started_bytes: wanted {len(started)} numbers, one for each that started")
