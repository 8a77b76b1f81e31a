"""One rented machine as the autoscaler knows it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fleet.states import BILLS_GPU, State
from web.signatures import ReplayGuard


@dataclass
class Instance:
    """One rented machine. Times are seconds on the caller's clock, prices $/h."""

    label: str
    state: State
    since: float
    why: str
    ordered_at: float
    id: int | None = None
    machine_id: int | None = None
    gpu_name: str = ""
    num_gpus: int = 1
    running_usd_h: float = 0.0
    stopped_usd_h: float = 0.0
    price_usd_h: float = 0.0
    throughput_work_s: float = 1.0
    loaded: bool = False
    condemned: bool = False
    was_hot: bool = False  # in this boot
    maybe_busy: bool = False  # it was given requests in this boot, or may have been before we knew it
    adopted: bool = False  # found in the listing: when it was ordered is not known
    booted_at: float = 0.0
    boot_ordered_at: float | None = None
    host: str | None = None
    ports: Mapping[int, int] = field(default_factory=dict)
    replay_guard: ReplayGuard = field(default_factory=ReplayGuard)  # of what it says by itself
    certificate: str | None = None  # as ssh showed it in this boot, or in the one before
    ssh: tuple[str, int] | None = None
    listed: bool = False
    intended: str | None = None
    last_check_at: float = float("-inf")
    checks: int = 0
    in_flight_at: float = 0.0
    in_flight: int | None = None
    drain_version: int = 0
    orders_out: int = 0
    asked_at: float = 0.0
    answered_at: float = float("-inf")
    destroyed: bool = False
    patience_until: float = float("-inf")
    absent_since: float | None = None
    absent_turns: int = 0
    lost_since: float | None = None
    broken_since: float | None = None
    no_start_before: float = 0.0
    failed_starts: int = 0
    refused_starts: int = 0

    @property
    def address(self) -> str | None:
        """Where clients send prompts, once the listing shows it."""
        return self._url(8000)

    @property
    def auth_url(self) -> str | None:
        """Where the loadbalancer fetches tokens, once the listing shows it."""
        return self._url(3000)

    def _url(self, inside: int) -> str | None:
        if not self.host or inside not in self.ports:
            return None
        return f"{'https' if self.certificate else 'http'}://{self.host}:{self.ports[inside]}"

    @property
    def usd_per_work(self) -> float:
        """Price of throughput: what victims and starts are ranked by."""
        return self.running_usd_h / max(self.throughput_work_s, 1e-9)

    @property
    def committed_usd_h(self) -> float:
        """What it may cost at most in its state, as far as is known."""
        if self.state in BILLS_GPU:
            return max(self.price_usd_h, self.running_usd_h)
        return max(self.price_usd_h, self.stopped_usd_h) or self.running_usd_h  # no price: never listed

    def __repr__(self) -> str:
        """<1001 fleet/3f2a… hot 12:ok>; designed to be read in test failures."""
        return f"<{self.id} {self.label} {self.state} {self.why!r}>"
