"""What the loadbalancer is told and what it says, as plain data.

Times are epoch seconds, work is in output-token equivalents.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dispatch.token_stock import Batch
from engine.forward import Floats
from web.messages.hot_set import HotInstance

AFFINITY_BLOCK_TOKENS = 256
"""Prompt tokens behind one hash of a prefix: the cost of reading fewer is not worth a hash."""


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
