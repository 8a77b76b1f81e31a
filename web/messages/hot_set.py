"""The hot set, the instances that may be used, as the autoscaler tells a loadbalancer (GET and PUT /hot)."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from engine.step_time_constants import Timing

MAX_INSTANCES = 20_000
"""Instances of one hot set."""

MAX_HOT_BODY = 32 * 2**20
"""Bytes of a hot set: 10,000 instances at about 2 kB, most of which is the certificate."""

Url = Annotated[str, Meta(min_length=8, max_length=300)]
StepConstant = Annotated[float, Meta(ge=0.0, le=1e6)]
Count = Annotated[int, Meta(ge=1, le=10**9)]


class HotTiming(Struct, frozen=True, gc=False):
    """The step-time constants of an instance as they are sent: Timing of engine/ without its name."""

    a: StepConstant
    b: StepConstant
    c: StepConstant
    d: StepConstant
    e: StepConstant
    f: StepConstant
    kv_tokens: Count
    max_seqs: Count
    step_tokens: Count

    @classmethod
    def of(cls, timing: Timing) -> "HotTiming":
        """Return the message with these step-time constants."""
        t = timing
        return cls(t.a, t.b, t.c, t.d, t.e, t.f, t.kv_tokens, t.max_seqs, t.step_tokens)

    def timing(self) -> Timing:
        """Return the step-time constants in this message."""
        return Timing("told", *msgspec.structs.astuple(self))


class HotInstance(Struct, frozen=True, gc=False):
    """One instance of the hot set; capacity_work / throughput_work_s are the seconds of work it may hold.

    certificate: the only one that TLS to the instance may find (PEM); None without TLS. timing: the step-time
    constants that are believed before the instance was watched; None: only its throughput is known.
    """

    id: Annotated[int, Meta(ge=0, le=2**53)]
    state: Literal["hot", "draining"]
    address: Url
    auth_url: Url
    master_token: Annotated[str, Meta(min_length=1, max_length=200)]
    throughput_work_s: Annotated[float, Meta(ge=1e-3, le=1e9)]
    capacity_work: Annotated[float, Meta(ge=1e-3, le=1e12)]
    certificate: Annotated[str, Meta(min_length=1, max_length=16_384)] | None = None
    timing: HotTiming | None = None

    @property
    def draining(self) -> bool:
        """Whether the instance gets no new requests."""
        return self.state == "draining"

    def __repr__(self) -> str:
        """Return a text for logs, which leaves out the instance's master token."""
        return f"HotInstance(id={self.id}, state={self.state!r}, address={self.address!r})"


class ModelLimits(Struct, frozen=True, kw_only=True):
    """The limits of the model. max_model_len: tokens of a prompt with its answer; None: not told."""

    max_model_len: Count | None = None


class HotSetHead(ModelLimits, frozen=True):
    """What a hot set says beside its instances.

    Versions grow within an epoch, which is one autoscaler process. expected_hot_s: seconds until the next
    instance becomes hot; None: not known.
    """

    epoch: Annotated[str, Meta(min_length=1, max_length=64)]
    version: Annotated[int, Meta(ge=0, le=2**53)]
    model: Annotated[str, Meta(min_length=1, max_length=200)]
    prefill_weight: Annotated[float, Meta(ge=0.0, le=100.0)]
    expected_output_tokens: Annotated[float, Meta(ge=1.0, le=1e6)]
    expected_hot_s: Annotated[float, Meta(ge=0.0, le=1e6)] | None


class HotSet(HotSetHead, frozen=True):
    """The hot set: the instances that a loadbalancer may use, as the autoscaler sends it."""

    instances: Annotated[tuple[HotInstance, ...], Meta(max_length=MAX_INSTANCES)]


class HotSetTaken(Struct, frozen=True):
    """The answer to PUT /hot: whether that hot set was newer, and which one the loadbalancer has now.

    loadbalancer: its name, as in its reports; None: it is of before 2026-12.
    """

    taken: bool
    epoch: str | None
    version: int | None
    loadbalancer: str | None = None
