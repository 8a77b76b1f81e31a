"""What the loadbalancer is told and what it says, as plain data.

Times are epoch seconds, work is in output-token equivalents.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from dispatch.token_stock import Batch
from engine.forward import Floats
from engine.timing import Timing

AFFINITY_BLOCK_TOKENS = 256
"""Prompt tokens behind one hash of a prefix: the cost of reading fewer is not worth a hash."""

# -- what is told ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HotInstance:
    """One instance of the hot set; capacity_work / throughput_work_s are the seconds of work it may hold.

    certificate: the only one that TLS to it may find (PEM), public_key_sha256: of its key; None without TLS.
    timing: how long its steps are believed to take, before it was watched; None: by its throughput only.
    """

    id: int
    draining: bool
    address: str
    auth_url: str
    master_token: str = field(repr=False)
    throughput_work_s: float
    capacity_work: float
    certificate: str | None = None
    public_key_sha256: str | None = None
    timing: Timing | None = None


@dataclass(frozen=True)
class HotSet:
    """What the autoscaler says may be used. Versions grow within an epoch: one autoscaler process."""

    epoch: str
    version: int
    model: str
    prefill_weight: float
    expected_output_tokens: float
    expected_hot_s: float | None
    instances: tuple[HotInstance, ...]


class Ended(Protocol):
    """The end of one request, as an instance reports it."""

    @property
    def id(self) -> str:
        """Request id."""

    @property
    def status(self) -> str:
        """finished, aborted or failed."""

    @property
    def output_tokens(self) -> int:
        """Tokens it was answered with."""


class Load(Protocol):
    """One load report: events since the one before, and how things stand."""

    @property
    def boot_id(self) -> str:
        """Changes when the instance reboots."""

    @property
    def seq(self) -> int:
        """Number of the last event in it."""

    @property
    def started(self) -> Sequence[str]:
        """Request ids whose token was taken."""

    @property
    def started_bytes(self) -> Sequence[int]:
        """How long each of them was, 0 where it did not say; none from an instance that cannot tell."""

    @property
    def ended(self) -> Sequence[Ended]:
        """Requests that ended."""

    @property
    def running(self) -> int:
        """Requests being served."""

    @property
    def waiting(self) -> int:
        """Requests waiting inside the model server."""

    @property
    def model_up(self) -> bool:
        """Whether the model server answers; the other figures are 0 when not."""

    @property
    def prompt_tokens_total(self) -> int:
        """Counter since the model server started."""

    @property
    def generation_tokens_total(self) -> int:
        """Counter since the model server started."""


# -- what is said ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Ask:
    """What a client wants: work, the max_tokens behind it if known, instances that must not serve it.

    prompt_tokens: part of that work; 0 where only the work was told. affinity: the client's salted hashes of
    the prompt's prefixes, the i-th of its first i + 1 blocks of AFFINITY_BLOCK_TOKENS. priority: 0 is served
    first, 2 last. client: who asks (allowance.py).
    """

    work: float
    max_tokens: int | None = None
    avoid: Collection[int] = ()
    prompt_tokens: int = 0
    affinity: Sequence[str] = ()
    priority: int = 1
    client: str = ""


@dataclass(slots=True, eq=False)
class Lease:
    """What a client is given. started: the report in which it was seen to have started, 0 before.

    row: its request as the instance sees it (engine/forward.py).
    """

    request_id: str
    token: str = field(repr=False)
    instance_id: int
    told: HotInstance = field(repr=False)
    work: float
    max_tokens: int | None
    given_at: float
    expires_at: float
    batch: Batch = field(repr=False)
    boot_id: str | None
    row: Floats = field(repr=False)
    started: int = 0
    over: bool = False
    client: str = ""

    @property
    def address(self) -> str:
        """Where its request goes."""
        return self.told.address


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that is held. over: granted, cancelled, or past `until`.

    since: when it came. give_by: given later it is late.
    """

    ask: Ask
    until: float
    since: float
    give_by: float
    late: bool = False
    over: bool = False


@dataclass(frozen=True)
class Refill:
    """Fetch so many tokens there, then call add_tokens or refill_failed with this."""

    told: HotInstance = field(repr=False)
    count: int

    @property
    def instance_id(self) -> int:
        """Of whom."""
        return self.told.id


@dataclass(frozen=True)
class Poll:
    """Ask for the load report there, then call report or poll_failed with this."""

    told: HotInstance = field(repr=False)
    after: int

    @property
    def instance_id(self) -> int:
        """Whose."""
        return self.told.id


class Push(NamedTuple):
    """What an instance says by itself: its events after..seq. number grows within a boot.

    started_bytes: as in Load.
    """

    boot_id: str
    number: int
    after: int
    seq: int
    missed: bool
    started: Sequence[str]
    ended: Sequence[Ended]
    model_up: bool
    started_bytes: Sequence[int] = ()


class InstanceUse(NamedTuple):
    """One instance's part of Usage; working_s and failures are cumulative."""

    unfinished: int
    work: float
    working_s: float
    throughput_work_s: float
    failures: int


@dataclass(frozen=True)
class Usage:
    """What the autoscaler must know. What has arrived or turned late is cumulative; demand counts all.

    arrived_output_tokens: as expected when they came. late: of the held, in the late lane.
    """

    busy: float
    demand: float
    held: int
    held_work: float
    arrivals: int
    arrived_work: float
    instances: Mapping[int, InstanceUse]
    arrived_prompt_tokens: int = 0
    arrived_output_tokens: float = 0.0
    in_flight: int = 0
    late: int = 0
    held_prompt_tokens: int = 0
    oldest_wait_s: float = 0.0
    turned_late: int = 0
