"""What an instance reports of itself, when its auth_server is asked and unasked (remote/ makes these)."""

import contextlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from web.messages.decoding import BadField, decode, fits

MAX_EVENTS = 2_000
"""Events of a report that is pushed; an instance that has more to say is polled."""

MAX_REPORT_BODY = 2**18
"""Bytes of a report that is pushed."""

LONGEST_CERTIFICATE = 16_384
"""Characters of a certificate in PEM; one with an RSA key of 4096 bits has 2,000."""

MAX_REQUESTS = 100_000
"""Requests that a model server runs or has waiting: far more than fit into any memory."""

MAX_OUTPUT_TOKENS = 10_000_000
"""Tokens of an answer: ten times the longest context there is."""

MOST_ODD = 16
"""Values of a report that are left out because they cannot be; with more the report is refused."""

Total = Annotated[int, Meta(ge=0, le=2**53)]
Requests = Annotated[int, Meta(ge=0, le=MAX_REQUESTS)]
EventNumber = Annotated[int, Meta(ge=0, le=2**53)]
RequestId = Annotated[str, Meta(min_length=16, max_length=16)]
RequestBytes = Annotated[int, Meta(ge=0, le=2**32)]
BootId = Annotated[str, Meta(min_length=1, max_length=64)]
MessageNumber = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Token = Annotated[str, Meta(min_length=1, max_length=200)]


class RequestEnd(Struct, frozen=True, gc=False):
    """How one request on an instance ended, and with how many tokens it was answered."""

    id: RequestId
    status: Literal["finished", "aborted", "failed"]
    output_tokens: Annotated[int, Meta(ge=0, le=MAX_OUTPUT_TOKENS)]


class LoadReport(Struct, frozen=True):
    """An instance's answer to GET /load: its events numbered up to seq, and how things stand.

    missed: events between the asked number and the first one here are lost. started: ids of requests whose
    token was taken; started_bytes: how long each of them was, 0 where it did not say; none from an instance
    that cannot tell. running, waiting: in the model server. model_up: whether it answers; the figures are 0
    when not. kv_use: share of the KV memory in use, None where the engine does not say. Totals count from the
    engine's start.
    """

    boot_id: BootId
    seq: Total
    started: Sequence[RequestId]
    ended: Sequence[RequestEnd]
    running: Requests
    waiting: Requests
    model_up: bool
    prompt_tokens_total: Total
    generation_tokens_total: Total
    started_bytes: Sequence[RequestBytes] = ()
    missed: bool = False
    kv_use: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError unless there is one length for each started request, or none at all."""
        _check_sizes(self.started, self.started_bytes)


class TokenOrder(Struct, frozen=True, omit_defaults=True):
    """The body of POST /tokens, which asks an instance for `count` single-use tokens.

    report_to: URL where the instance is to send its reports from now on.
    """

    count: int
    report_to: str | None = None


class TokenBatch(Struct, frozen=True):
    """New single-use tokens of an instance, and its load report.

    They are good in the boot boot_id only, and for expires_in_s seconds from now.
    """

    tokens: Annotated[Sequence[Token], Meta(min_length=1)]
    boot_id: BootId
    expires_in_s: Annotated[float, Meta(ge=0.0, le=1e6)]
    load: LoadReport

    def __repr__(self) -> str:
        """Return a text for logs, which counts the tokens instead of showing them."""
        return f"TokenBatch({len(self.tokens)} tokens, boot_id={self.boot_id!r}, load={self.load!r})"


class PushedReport(Struct, frozen=True):
    """A report that an instance sends unasked (POST /report): its events number after+1 to seq.

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
        """Raise ValueError unless there is one length for each started request, or none at all."""
        _check_sizes(self.started, self.started_bytes)


class ReportTaken(Struct, frozen=True):
    """The answer to an instance's POST /report: in how many seconds it may send the next one."""

    next_in_s: float


class ReadyBody(Struct, frozen=True):
    """The body of POST /ready, in which an instance says how far its model is.

    number grows within a boot. why: how much is loaded, or what failed. certificate: the machine's (PEM), for
    which its signature vouches; none from instances whose start script is older than 0.3.
    """

    state: Literal["loading", "ready", "failed"]
    boot_id: BootId
    number: MessageNumber
    why: Annotated[str, Meta(max_length=300)] | None = None
    certificate: Annotated[str, Meta(max_length=LONGEST_CERTIFICATE)] = ""


Report = TypeVar("Report", LoadReport, PushedReport)


class _EndName(Struct, frozen=True, gc=False):
    """The part of a request's end that must be readable, so that its lease is over: the id."""

    id: RequestId


def read_report(raw: bytes, kind: type[Report]) -> Report:
    """Return an instance's report; raise BadField where it cannot be used at all.

    One value that cannot be right does not make the rest useless: an end whose length or status is odd is
    that of a request that was aborted, of which nothing is learned; an odd counter is 0, as after a start.
    """
    try:
        return decode(raw, kind)
    except BadField:
        said = decode(raw, dict[str, msgspec.Raw])
    said["ended"] = msgspec.Raw(msgspec.json.encode(_readable_ends(said.get("ended", msgspec.Raw(b"[]")))))
    if "started_bytes" in said and not fits(said["started_bytes"], Sequence[RequestBytes]):
        del said["started_bytes"]
    for name, wanted, instead in _FORGIVEN:
        if name in said and not fits(said[name], wanted):
            said[name] = msgspec.Raw(instead)
    return decode(msgspec.json.encode(said), kind)


_FORGIVEN: tuple[tuple[str, Any, bytes], ...] = (
    ("prompt_tokens_total", Total, b"0"),
    ("generation_tokens_total", Total, b"0"),
    ("kv_use", Annotated[float, Meta(ge=0.0, le=2.0)] | None, b"null"),
)


def _readable_ends(raw: msgspec.Raw) -> list[RequestEnd]:
    ends: list[RequestEnd] = []
    odd = 0
    for one in decode(raw, list[msgspec.Raw], "ended"):
        try:
            ends.append(decode(one, RequestEnd))
        except BadField:
            odd += 1
            if odd > MOST_ODD:
                raise
            with contextlib.suppress(BadField):
                ends.append(RequestEnd(decode(one, _EndName).id, "aborted", 0))
    return ends


def _check_sizes(started: Sequence[str], sizes: Sequence[int]) -> None:
    if sizes != () and len(sizes) != len(started):
        raise ValueError(f"started_bytes: wanted {len(started)} numbers, one for each that started")
