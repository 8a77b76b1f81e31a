"""The states of an instance and the transitions between them: the rules as data.

    ordered ─► loading ─► running ─► hot ─► draining ─► stopping ─► cold ─► starting ─┐
                            ▲ ▲       │        │                                      │
                            │ └───────┘        └─► hot (needed again)                 │
                            └─────────────────────────────────────────────────────────┘
    from anywhere: failed ─► destroying ─► gone

Beside each edge stands the event in the world that causes it. A transition that is not in the table raises
IllegalTransition and changes nothing. Only fleet/reconcile.py moves instances; how long each state may last
is in fleet/deadlines.py.
"""

from collections.abc import Mapping
from enum import StrEnum


class State(StrEnum):
    """The states in the life of an instance; the same words are in logs and routes."""

    ORDERED = "ordered"
    LOADING = "loading"
    RUNNING = "running"
    HOT = "hot"
    DRAINING = "draining"
    STOPPING = "stopping"
    COLD = "cold"
    STARTING = "starting"
    FAILED = "failed"
    DESTROYING = "destroying"
    GONE = "gone"


S = State
TRANSITIONS: Mapping[State, Mapping[State, str]] = {
    # from: {to: the event in the world that causes it}
    S.ORDERED: {
        S.LOADING: "the listing shows its label",
    },
    S.LOADING: {
        S.RUNNING: "actual_status is running: the container is up",
        S.COLD: "the cloud stopped it: out of credit, or by hand",
    },
    S.RUNNING: {
        S.HOT: "the log has the ready line and a test prompt came back with a token",
        S.STOPPING: "its model is loaded and it is not needed",
        S.COLD: "the cloud stopped it: outbid, out of credit, or by hand",
    },
    S.HOT: {
        S.DRAINING: "it is not needed",
        S.RUNNING: "a health check failed; it becomes hot again by passing one",
        S.COLD: "the cloud stopped it: outbid, out of credit, or by hand",
    },
    S.DRAINING: {
        S.HOT: "it is needed again before it was stopped",
        S.STOPPING: "its last request has ended, or its time to drain is up",
        S.RUNNING: "a health check failed",
        S.COLD: "the cloud stopped it",
    },
    S.STOPPING: {
        S.COLD: "the listing shows it stopped",
    },
    S.COLD: {
        S.STARTING: "it was asked to start",
        S.RUNNING: "it runs without our asking: an outbid machine came back, or a person started it",
    },
    S.STARTING: {
        S.RUNNING: "the container is up again",
        S.STOPPING: "its GPU is taken, or it is no longer needed",
        S.COLD: "the cloud refused the start",
    },
    S.FAILED: {},
    S.DESTROYING: {},
    S.GONE: {},
}
FROM_ANYWHERE: Mapping[State, str] = {
    S.FAILED: "a deadline passed, a fatal log line, a lost host, a changed host key",
    S.DESTROYING: "it failed, is not wanted any more, or a person asked",
    S.GONE: "the cloud does not list it any more, or never accepted the order",
}

SERVING = frozenset({S.HOT, S.DRAINING})
"""States in which clients may have requests on the instance."""

CHECKED = SERVING | {S.RUNNING}
"""States in which health checks are made."""

BILLS_GPU = frozenset({S.ORDERED, S.LOADING, S.RUNNING, S.HOT, S.DRAINING, S.STARTING, S.STOPPING})
"""States in which the GPU is, or may be, billed; in the others only storage is."""

GIVEN_UP = frozenset({S.FAILED, S.DESTROYING, S.GONE})
"""States of instances that are not part of the fleet any more, although they may still bill."""


class IllegalTransition(Exception):
    """An instance was to make a transition that the table does not have; nothing was changed."""


def check_transition(now_in: State, to: State) -> None:
    """Raise IllegalTransition unless the table has a transition between these states."""
    if to is now_in or (to not in TRANSITIONS[now_in] and to not in FROM_ANYWHERE):
        raise IllegalTransition(f"no way from {now_in} to {to}")
