"""What a customer orders when it rents a machine, and how the service refuses a call."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


class CloudRefusal(Exception):
    """The service refuses a call, with its own status and words; nothing was changed."""

    def __init__(self, status: int, error: str, msg: str, **also: Any) -> None:
        """Make a refusal with HTTP status, error code and message. also: further fields of the answer."""
        super().__init__(msg)
        self.status = status
        self.error = error
        self.msg = msg
        self.also = also


@dataclass(frozen=True)
class Order:
    """What a customer wants to rent. price: a bid per machine in $/h, None on demand.

    env: what -e, -p and so on said, ports as {"-p 8000:8000": "1"} (vast-contract 2.2).
    """

    image: str
    disk_gb: float = 10.0
    label: str | None = None
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    onstart: str | None = None
    price: float | None = None
    cancel_unavail: bool = False
    runtype: str = "ssh"
    args: tuple[str, ...] = ()
    instance_key: str = ""
    image_login: str | None = field(default=None, repr=False)

    @property
    def ports(self) -> tuple[str, ...]:
        """The container's ports to be reachable from outside, as "8000/tcp"; ssh's is always among them."""
        inside = ["22/tcp"]
        for name in self.env:
            if name.startswith("-p "):
                port, _, protocol = name.rpartition(":")[2].partition("/")
                inside.append(f"{port}/{protocol or 'tcp'}")
        return tuple(dict.fromkeys(inside))

    @property
    def script_bytes(self) -> int:
        """How long onstart and args are together, in bytes, as the service counts them."""
        return len((self.onstart or "").encode()) + sum(len(arg.encode()) + 1 for arg in self.args)

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of the start script that the order gives (-e NAME=VALUE)."""
        return {name: value for name, value in self.env.items() if not name.startswith("-")}
