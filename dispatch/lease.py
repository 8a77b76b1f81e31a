"""A lease: the right to send one request to one instance."""

from dataclasses import dataclass, field

from dispatch.token_stock import TokenLot
from engine.forward import Floats
from web.messages.hot_set import HotInstance


@dataclass(slots=True, eq=False)
class Lease:
    """The right of a client to send one request to one instance. Times are epoch seconds.

    row: the request as the instance sees it (engine/forward.py). room: that it takes there, as a share of the
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
    first_token_s: float = 0.0  # after it was given, as is expected
    token_s: float = 0.0  # from one token to the next, by what was told of the instance
    pace_told: bool = False  # its client has told how fast the answer came
    priority: int = 1
    waited_s: float = 0.0  # its request, before it was given
    trace: str = ""  # the id under which its client finds it in logs

    @property
    def address(self) -> str:
        """The URL of the instance that the lease's request is to be sent to."""
        return self.spec.address

    def expect(self, first_token_s: float, token_s: float) -> None:
        """Note in how many seconds after the lease was given its first token is due, and then each other."""
        self.first_token_s, self.token_s = first_token_s, token_s

    def note_wait(self, waited_s: float) -> None:
        """Note for how long its request had waited when it was given."""
        self.waited_s = waited_s

    def tell_pace(self) -> None:
        """Note that its client has told how fast the answer came."""
        self.pace_told = True

    def start(self, report: int) -> None:
        """Note the number of the report that said that the lease's token was taken."""
        self.started = report

    def rest(self) -> None:
        """Note that the lease takes no room on its instance until its request starts."""
        self.rests = True

    def wake(self) -> None:
        """Note that the lease takes room on its instance again."""
        self.rests = False

    def end(self) -> None:
        """Note that the lease has ended."""
        self.over = True
