"""A lease: the right to send one request to one instance."""

from dataclasses import dataclass, field

from dispatch.token_stock import TokenLot
from engine.forward import Floats
from web.messages.hot_set import HotInstance


@dataclass(slots=True, eq=False)
class Lease:
    """What a client is given. Times are epoch seconds.

    row: its request as the instance sees it (engine/forward.py). room: that it takes there, as a share of the
    instance. started: number of the report that said that its token was taken, 0 before. rests: it takes no
    room, because it has not started for long. over: it has ended in some way.
    """

    request_id: str
    token: str = field(repr=False)
    spec: HotInstance = field(repr=False)
    instance_id: int
    work: float
    given_at: float
    expires_at: float
    lot: TokenLot = field(repr=False)
    boot_id: str | None
    row: Floats = field(repr=False)
    client: str = ""
    room: float = 0.0
    started: int = 0
    rests: bool = False
    over: bool = False

    @property
    def address(self) -> str:
        """Where its request goes."""
        return self.spec.address

    def start(self, report: int) -> None:
        """Note the report that said that its token was taken."""
        self.started = report

    def rest(self) -> None:
        """Note that it takes no room."""
        self.rests = True

    def wake(self) -> None:
        """Note that it takes room again."""
        self.rests = False

    def end(self) -> None:
        """Note that it has ended."""
        self.over = True
