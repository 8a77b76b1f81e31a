"""The phases of a rental: which may follow which, how the service shows each, and what it is billed as.

       create                                             ┌──── reboot ────┐
    ───────────► creating ─► created ─► loading ─► RUNNING ─► rebooting ───┤
                                           ▲  ▲       │ └───► recycling ─► loading
              its GPU is free              │  │       ├─ its processes died ─► CRASHED ─► loading (start)
    scheduling ────────────────────────────┘  │       ├─ stop ─► STOPPING ─► stopped
        ▲ ▲        bid high enough, GPU free  │       └─ a higher bid ─► outbid
        │ └── start ── stopped       outbid ──┘
        └── (a start while it is still stopping)

In capitals: the GPU is paid for. Storage is paid in every phase; a host that is offline charges nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Phase(StrEnum):
    """The phases of a rental, in the words of the status page; the service's own words are in SHOWN."""

    CREATING = "creating"
    CREATED = "created"
    LOADING = "loading"
    RUNNING = "running"
    REBOOTING = "rebooting"
    RECYCLING = "recycling"
    STOPPING = "stopping"
    STOPPED = "stopped"
    SCHEDULING = "scheduling"
    OUTBID = "outbid"
    CRASHED = "crashed"


P = Phase
TRANSITIONS: Mapping[Phase, Mapping[Phase, str]] = MappingProxyType(
    {
        # from: {to: the event in the world that causes it}
        P.CREATING: {
            P.CREATED: "the host made the container",
            P.STOPPED: "stopped by its owner, or no credit",
            P.OUTBID: "somebody bids more",
        },
        P.CREATED: {
            P.LOADING: "the host pulls the image",
            P.STOPPED: "stopped by its owner, or no credit",
            P.OUTBID: "somebody bids more",
        },
        P.LOADING: {
            P.RUNNING: "its processes are up",
            P.CREATED: "the container could not be started",
            P.STOPPED: "stopped by its owner, or no credit",
            P.OUTBID: "somebody bids more",
        },
        P.RUNNING: {
            P.STOPPING: "stopped by its owner, or no credit",
            P.OUTBID: "somebody bids more",
            P.CRASHED: "its processes died",
            P.REBOOTING: "rebooted by its owner",
            P.RECYCLING: "recycled by its owner",
        },
        P.REBOOTING: {
            P.RUNNING: "its processes are up",
            P.CREATED: "the container could not be started",
            P.STOPPING: "stopped by its owner, or no credit",
            P.OUTBID: "somebody bids more",
        },
        P.RECYCLING: {
            P.LOADING: "the host made the container anew",
            P.STOPPING: "stopped by its owner, or no credit",
            P.OUTBID: "somebody bids more",
        },
        P.STOPPING: {
            P.STOPPED: "its processes are gone",
            P.OUTBID: "somebody bids more, and it was started again meanwhile",
        },
        P.STOPPED: {
            P.SCHEDULING: "started by its owner",
        },
        P.SCHEDULING: {
            P.LOADING: "a slot of its machine is free",
            P.STOPPED: "stopped by its owner, or no credit",
        },
        P.OUTBID: {
            P.LOADING: "a slot of its machine is free, or cheap enough",
            P.SCHEDULING: "started by its owner",
            P.STOPPED: "stopped by its owner, or no credit",
        },
        P.CRASHED: {
            P.LOADING: "started by its owner",
            P.STOPPING: "stopped by its owner, or no credit",
            P.OUTBID: "somebody bids more",
            P.REBOOTING: "rebooted by its owner",
            P.RECYCLING: "recycled by its owner",
        },
    }
)

WAITING = (P.SCHEDULING, P.OUTBID)
"""Phases that end when a slot is free; no event of the rental itself ends them."""


class IllegalPhase(Exception):
    """The table of transitions does not let a rental change its phase so: a fault in the cloud model."""


def cause(was: Phase, to: Phase) -> str:
    """Return the event in the world that moves a rental from one phase to the other.

    Raises IllegalPhase if there is none.
    """
    if to not in TRANSITIONS[was]:
        raise IllegalPhase(f"no way from {was} to {to}")
    return TRANSITIONS[was][to]


@dataclass(frozen=True)
class Shown:
    """How the service's fields show a rental's phase (vast-contract 2.12), and what it is billed as."""

    actual_status: str | None
    intended_status: str
    cur_state: str
    holds_gpu: bool
    bills_gpu: bool
    bill: str


SHOWN: Mapping[Phase, Shown] = MappingProxyType(
    {
        P.CREATING: Shown(None, "running", "running", True, False, "loading"),
        P.CREATED: Shown("created", "running", "running", True, False, "loading"),
        P.LOADING: Shown("loading", "running", "running", True, False, "loading"),
        P.RUNNING: Shown("running", "running", "running", True, True, "running"),
        P.REBOOTING: Shown("rebooting", "running", "running", True, True, "running"),
        P.RECYCLING: Shown("recycling", "running", "running", True, True, "running"),
        P.STOPPING: Shown("running", "stopped", "running", True, True, "running"),
        P.STOPPED: Shown("exited", "stopped", "stopped", False, False, "stopped"),
        P.SCHEDULING: Shown("exited", "running", "stopped", False, False, "stopped"),
        P.OUTBID: Shown("exited", "stopped", "stopped", False, False, "stopped"),
        P.CRASHED: Shown("exited", "running", "running", True, True, "running"),
    }
)
BILLS = ("loading", "running", "stopped", "traffic")
"""By what charged dollars are counted: the state of the rental, or bytes that came to it."""
