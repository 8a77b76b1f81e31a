"""What the cloud model wants done to real processes: values that `Cloud.take_effects` hands out in order."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from localcloud.hub import HubAccess
from localcloud.machines import Machine
from localcloud.orders import Order
from localcloud.ssh_logins import KIND, SshLogin


@dataclass(frozen=True)
class Boot:
    """Order to start a rental's processes; `Cloud.booted` or `Cloud.boot_failed` is told how that went.

    keep_ports: the outside ports of its last boot, to be used again if free; drop_ports: bind the ports that
    are shown and answer nothing there. load_s, start_s: seconds its model server takes the first time and
    when started again. ssh: "ok", "hang" or "refuse". hub: what its engine gets of
    the hub. secrets: the account's variables. login: how its ssh treats a login.
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
    hub: HubAccess = field(default_factory=HubAccess)
    secrets: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    login: SshLogin = KIND


@dataclass(frozen=True)
class Terminate:
    """Order to send SIGTERM to the start script of an instance."""

    id: int


@dataclass(frozen=True)
class End:
    """Order to end an instance's processes; with wipe to delete its disk too."""

    id: int
    wipe: bool = False


@dataclass(frozen=True)
class Kill:
    """Order to send SIGKILL to all of an instance's processes, or to those of its "model" server."""

    id: int
    part: str = "all"


@dataclass(frozen=True)
class Freeze:
    """Order to stop an instance's processes with SIGSTOP, or to let them continue."""

    id: int
    frozen: bool


@dataclass(frozen=True)
class Ssh:
    """Order that an instance's ssh server behave as "ok", "hang" or "refuse" from now on."""

    id: int
    mode: str


@dataclass(frozen=True)
class Authorize:
    """Order to accept these ssh keys on an instance, whether it runs or not."""

    id: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class MarkLoaded:
    """Order to note that an instance's disk holds the model, which then takes only start_s to start."""

    id: int


@dataclass(frozen=True)
class Moved:
    """Order to log that a rental changed its phase after after_s seconds in the old one, `was`."""

    id: int
    was: str
    now: str
    why: str
    after_s: float


Effect = Boot | Terminate | End | Kill | Freeze | Ssh | Authorize | MarkLoaded | Moved
