"""The states of an instance, the moves between them, and how long each may last: the rules as data.

    ordered ─► loading ─► running ─► hot ─► draining ─► stopping ─► cold ─► starting ─┐
                            ▲ ▲       │        │                                      │
                            │ └───────┘        └─► hot (needed again)                 │
                            └─────────────────────────────────────────────────────────┘
    from anywhere: failed ─► destroying ─► gone

Beside each edge stands the event in the world that causes it. A move that is not in the table raises
IllegalTransition and changes nothing; `autoscaler.InstanceSet` is the only caller.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from engine.profiles import Profile


class State(StrEnum):
    """Where an instance is in its life; the words of design, logs and routes."""

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
    },
    S.RUNNING: {
        S.HOT: "the log has the ready line and a test prompt came back with a token",
        S.STOPPING: "its model is loaded and it is not needed",
        S.COLD: "the cloud stopped it: outbid, out of credit, or by hand",
    },
    S.HOT: {
        S.DRAINING: "it is not needed",
        S.RUNNING: "a health check failed; it must earn hot again",
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
BILLS_GPU = frozenset({S.ORDERED, S.LOADING, S.RUNNING, S.HOT, S.DRAINING, S.STARTING, S.STOPPING})


class IllegalTransition(Exception):
    """The table of transitions has no such edge; nothing was changed."""


def check_move(now_in: State, to: State) -> None:
    """Raise IllegalTransition unless the table has that edge."""
    if to is now_in or (to not in TRANSITIONS[now_in] and to not in FROM_ANYWHERE):
        raise IllegalTransition(f"no way from {now_in} to {to}")


@dataclass(frozen=True)
class Deadlines:
    """How long an instance may stay in a state before it counts as failed, and other patience; seconds.

    Real times; `for_profile` divides them for a local cloud with a speedup, but never below what the
    polling itself needs.
    """

    ordered: float = 180.0  # accepted order to first listing: seconds in practice, eventual consistency
    loading: float = 1800.0  # image pull; skypilot allows 30 min overall (vast-contract 6.1)
    first_load: float = 1800.0  # container up to hot, model not on disk: weights come over the network
    reload: float = 420.0  # container up to hot, model on disk
    recover: float = (
        180.0  # hot lost to a health check and not earned again; a restarted model loads meanwhile
    )
    starting: float = 60.0  # start to container up; longer means its GPU is taken (vast-contract 6.5)
    draining: float = 300.0  # the longest answer we let finish
    stopping: float = 180.0  # stop is repeated meanwhile
    lost: float = 90.0  # host offline or unknown (vast-contract 6.7)
    lost_cold: float = 3600.0  # the same for a stopped one: its bill is small and its disk worth a wait
    vanished: float = 600.0  # one that vanished from the listing still counts against the hard limits
    absent: float = 30.0  # not in the listing although it should be
    disbelief: float = (
        120.0  # a listing that lacks most of the fleet is taken for an outage; those last a minute
    )
    patience: float = (
        60.0  # after a time without a believable view nothing fails before it could be looked at
    )
    broken_host: float = 10.0  # a docker error in status_msg that stays
    repeat: float = 15.0  # a stop or destroy without effect is sent again
    no_gpu_rest: float = 600.0  # a cold instance whose GPU was taken is left alone
    lease: float = 60.0  # a lease given before the drain may still be used
    bad_machine: float = 86_400.0  # a machine that failed is not rented again
    offers: float = 60.0  # age of an offer that may still be taken
    create_rest: float = 30.0  # pause after a failed create; doubles to 15 min

    @classmethod
    def for_profile(cls, profile: Profile, speedup: float = 1.0) -> "Deadlines":
        """Deadlines that fit the profile's load and start times, divided by speedup."""
        real = cls(
            first_load=max(cls.first_load, 3.0 * profile.load_time_s),
            reload=max(cls.reload, 4.0 * profile.start_time_s),
            recover=max(cls.recover, 2.0 * profile.start_time_s),
        )
        if speedup == 1.0:
            return real
        # One CLI call takes 0.5 s and up to several wait for each other, so nothing below these is fair.
        floors: dict[str, float] = {
            "ordered": 30,
            "loading": 30,
            "first_load": 45,
            "reload": 45,
            "recover": 30,
            "starting": 20,
        }
        floors |= {
            "stopping": 30,
            "lost": 15,
            "lost_cold": 60,
            "vanished": 60,
            "absent": 12,
            "patience": 20,
            "broken_host": 5,
            "repeat": 8,
        }
        floors |= {"no_gpu_rest": 30, "offers": 60, "create_rest": 2, "bad_machine": 600}
        # Requests, leases and outages take their real time on a fast cloud too.
        floors |= {"draining": real.draining, "lease": real.lease, "disbelief": real.disbelief}
        return cls(**{name: max(float(f), getattr(real, name) / speedup) for name, f in floors.items()})


@dataclass(frozen=True)
class Limits:
    """The hard limits. Instances that failed or are being destroyed count until they are gone."""

    max_instances: int = 8
    max_usd_h: float = 10.0
    max_creates_per_turn: int = 4
