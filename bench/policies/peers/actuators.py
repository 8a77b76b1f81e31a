"""How a rule that says one number N is carried out: as its own system would, or with our stopped pool.

    AsIs      hot N, total N        a new instance loads for the whole load time, a surplus one is destroyed
    WithPool  hot N, total peak N   a surplus one is stopped and starts again in the start time

So the gain of a rule and the gain of the actuator can be told apart (docs/reference/peers.md 19).
"""

from dataclasses import replace

from bench.policies.peers.rule import PeerPolicy
from bench.policies.peers.windows import Peak
from policies import FleetSnapshot, Targets

KEEP_S = 6 * 3600.0
"""Seconds that a stopped instance is kept after it was last wanted, as in docs/reference/policy-study.md."""


class AsIs:
    """A rule that knows no stopped pool: whatever is not hot is not there."""

    def __init__(self, peer: PeerPolicy) -> None:
        """peer: the rule, with its memory."""
        self.peer = peer
        self.tick_s, self.memory_s = peer.tick_s, peer.memory_s
        self._reads_setup_time = bool(getattr(peer, "reads_setup_time", False))

    def scaled(self, speedup: float) -> "AsIs":
        """Return a fresh one, its times divided."""
        return AsIs(self.peer.scaled(speedup))

    def targets(self, seen: FleetSnapshot) -> Targets:
        """Return N and N. A rule that reads the set-up time is told how long a load takes."""
        if self._reads_setup_time:
            seen = replace(seen, start_time_s=seen.load_time_s)
        said = self.peer.targets(seen)
        return Targets(said.hot, said.hot, said.why)


class WithPool:
    """The rule's N, and the stopped pool of ours around it.

    The pool holds the most N there was in keep_s. Until that long was watched, nothing that is loaded is
    destroyed either: what was wanted before is not known.
    """

    def __init__(self, peer: PeerPolicy, keep_s: float = KEEP_S) -> None:
        """peer: the rule, with its memory; keep_s: seconds."""
        self.peer = peer
        self.tick_s, self.memory_s = peer.tick_s, peer.memory_s
        self.keep_s = keep_s
        self._peak = Peak(keep_s)
        self._began: float | None = None

    def scaled(self, speedup: float) -> "WithPool":
        """Return a fresh one, its times divided."""
        return WithPool(self.peer.scaled(speedup), self.keep_s / speedup)

    def targets(self, seen: FleetSnapshot) -> Targets:
        """Return N hot, and in all what was wanted lately."""
        said = self.peer.targets(seen)
        if self._began is None:
            self._began = seen.now
        total = int(self._peak.note(seen.now, said.hot))
        if seen.now - self._began < self.keep_s:
            total = max(total, seen.hot + seen.coming + seen.cold)
        return Targets(said.hot, total, said.why)
