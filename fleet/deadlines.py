"""How long an instance may stay in a state before it counts as failed, and other waiting times."""

from dataclasses import dataclass

from engine.profile import Profile

FLOORS_S = {
    "ordered_s": 30.0,
    "loading_s": 30.0,
    "first_load_s": 45.0,
    "reload_s": 45.0,
    "recover_s": 30.0,
    "starting_s": 20.0,
    "container_s": 40.0,
    "stopping_s": 30.0,
    "lost_s": 15.0,
    "lost_cold_s": 60.0,
    "vanished_s": 60.0,
    "absent_s": 12.0,
    "patience_s": 20.0,
    "together_s": 300.0,
    "broken_host_s": 5.0,
    "repeat_s": 8.0,
    "no_gpu_rest_s": 30.0,
    "offers_s": 60.0,
    "create_rest_s": 2.0,
    "bad_machine_s": 600.0,
    "trial_s": 60.0,
}
"""Least values on a local cloud with a speedup: a CLI call takes 0.5 s, and several wait for each other."""


@dataclass(frozen=True)
class Deadlines:
    """Waiting times in seconds, for real machines; `for_profile` shortens them for a local cloud."""

    ordered_s: float = 180.0  # accepted order to first listing: seconds in practice, eventual consistency
    loading_s: float = 1800.0  # image pull; skypilot allows 30 min overall (vast-contract 6.1)
    first_load_s: float = 1800.0  # container up to hot, model not on disk: weights come over the network
    reload_s: float = 420.0  # container up to hot, model on disk
    recover_s: float = 180.0  # from a failed health check to hot again; a restarted model loads meanwhile
    starting_s: float = 60.0  # start to a sign of its GPU; scheduling takes 30 s (vast-contract 6.5)
    container_s: float = 300.0  # start to container up where its GPU is there: docker on a slow disk
    draining_s: float = 300.0  # the longest answer that is let finish
    stopping_s: float = 180.0  # a third of the time to stop; the order is repeated meanwhile
    lost_s: float = 90.0  # host offline or unknown (vast-contract 6.7)
    lost_cold_s: float = 3600.0  # the same for a stopped one: its bill is small and its disk worth a wait
    vanished_s: float = 600.0  # one that vanished from the listing still counts against the hard limits
    absent_s: float = 30.0  # not in the listing although it should be
    disbelief_s: float = (
        120.0  # a listing that lacks most of the fleet counts as an outage; those last a minute
    )
    patience_s: float = 60.0  # after a time without a believed listing every instance is looked at first
    together_s: float = 600.0  # no machine answers our checks: outages of our own network last minutes
    broken_host_s: float = 10.0  # a docker error in status_msg that stays
    repeat_s: float = 15.0  # a stop or destroy without effect is sent again
    no_gpu_rest_s: float = 600.0  # a cold instance whose GPU was taken is not started again
    lease_s: float = 60.0  # a lease given before the drain may still be used
    bad_machine_s: float = 86_400.0  # a machine that failed is not rented again
    offers_s: float = 60.0  # age of an offer that may still be taken
    create_rest_s: float = 30.0  # pause after a failed create; doubles to 15 min
    trial_s: float = 900.0  # creates are held: until one machine is tried; doubles to 6 h. It costs cents

    @classmethod
    def for_profile(cls, profile: Profile, speedup: float = 1.0) -> "Deadlines":
        """Return deadlines that fit the load and start times of a model's profile, divided by speedup.

        None becomes shorter than FLOORS_S. Requests, leases and outages take their real time on a fast cloud,
        too: draining_s, lease_s and disbelief_s stay.
        """
        real = cls(
            first_load_s=max(cls.first_load_s, 3.0 * profile.load_time_s),
            reload_s=max(cls.reload_s, 4.0 * profile.start_time_s),
            recover_s=max(cls.recover_s, 2.0 * profile.start_time_s),
        )
        if speedup == 1.0:
            return real
        return cls(**{name: max(floor, getattr(real, name) / speedup) for name, floor in FLOORS_S.items()})
