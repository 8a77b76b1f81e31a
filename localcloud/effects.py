"""What the cloud model wants done in the world: values that `Cloud.take_effects` hands out in order."""

from collections.abc import Mapping
from dataclasses import dataclass

from localcloud.machines import Machine
from localcloud.orders import Order


@dataclass(frozen=True)
class Boot:
    """Start the rental's processes, and tell `Cloud.booted` or `Cloud.boot_failed` how that went.

    keep_ports: the outside ports of its last boot, to be used again if free; drop_ports: bind the ports that
    are shown and answer nothing there. load_s, start_s: seconds its model server takes the first time and
    when started again. ssh: "ok", "hang" or "refuse".
    """

    id: int
    boot: int
    order: Order
    machine: Machine
    authorized_keys: tuple[str, ...]
    keep_ports: Mapping[str, int]
    drop_ports: bool
    load_s: float
    start_s: float
    fatal_line: str | None
    new_host_key: bool
    ssh: str


@dataclass(frozen=True)
class Terminate:
    """Send SIGTERM to the start script."""

    id: int


@dataclass(frozen=True)
class End:
    """End the instance's processes; with wipe delete its disk too."""

    id: int
    wipe: bool = False


@dataclass(frozen=True)
class Kill:
    """Send SIGKILL to all of the instance's processes, or to those of its "model" server."""

    id: int
    part: str = "all"


@dataclass(frozen=True)
class Freeze:
    """Stop the instance's processes with SIGSTOP, or let them continue."""

    id: int
    frozen: bool


@dataclass(frozen=True)
class Ssh:
    """Make the instance's ssh server behave as "ok", "hang" or "refuse" from now on."""

    id: int
    mode: str


@dataclass(frozen=True)
class Authorize:
    """Accept these ssh keys on the instance, whether it runs or not."""

    id: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class MarkLoaded:
    """Note that the instance's disk holds the model: its model server takes start_s from now on."""

    id: int


@dataclass(frozen=True)
class Moved:
    """Log that a rental changed its phase."""

    id: int
    was: str
    now: str
    why: str
    after_s: float


Effect = Boot | Terminate | End | Kill | Freeze | Ssh | Authorize | MarkLoaded | Moved
