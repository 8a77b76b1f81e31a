"""The instances of the hot set, what they can do together, and when the next one is expected."""

import random
from collections import deque
from collections.abc import Iterator

from dispatch.candidate_index import CandidateIndex
from dispatch.instance import ServingInstance
from dispatch.predicted_load import LoadTable
from web.messages.hot_set import HotInstance, HotSet

CAPACITY_UNKNOWN = 30.0
"""Requests of the expected length that an instance is taken to hold until one was known."""

PAST_EPOCHS = 16
"""Epochs of earlier autoscaler processes that are remembered, so that a late message is not believed."""


class HotInstances:
    """The instances of the hot set by id, the index of those that can serve, their predicted load."""

    def __init__(self, rng: random.Random, expected_output_tokens: float) -> None:
        """Start without instances. rng: breaks ties. expected_output_tokens: of an answer, on average."""
        self.by_id: dict[int, ServingInstance] = {}
        self.index = CandidateIndex(rng)
        self.table = LoadTable()
        self.hot_set: HotSet | None = None  # the one that the instances are of
        self._newest: HotSet | None = None  # the one that is being taken over, or that
        self.hot = 0  # instances that do not drain, whether or not they can serve at this moment
        self.throughput = 0.0  # of those together, work a second
        self.typical_capacity = CAPACITY_UNKNOWN * expected_output_tokens  # of one of those, work
        self.largest_capacity = self.typical_capacity  # what one request can use at most, work
        self._past_epochs: deque[str] = deque(maxlen=PAST_EPOCHS)
        self._expected_at: float | None = None

    def __iter__(self) -> Iterator[ServingInstance]:
        """Iterate over all instances, draining ones too."""
        return iter(self.by_id.values())

    def __len__(self) -> int:
        """Return the number of instances, draining ones too."""
        return len(self.by_id)

    def take(self, hot_set: HotSet) -> bool:
        """Begin to take over a hot set; return False when its epoch and version say that it is older."""
        last = self._newest
        if last is not None and hot_set.epoch == last.epoch:
            if hot_set.version < last.version:
                return False
        elif hot_set.epoch in self._past_epochs:
            return False
        elif last is not None:
            self._past_epochs.append(last.epoch)
        self._newest = hot_set
        return True

    def takes(self, hot_set: HotSet) -> bool:
        """Return whether this hot set is still the one being taken over, because no newer one has come."""
        return self._newest is hot_set

    def complete(self, hot_set: HotSet) -> None:
        """Note that a hot set has been taken over: the instances are now those that it names."""
        self.hot_set = hot_set
        self.survey()

    def same(self, spec: HotInstance) -> ServingInstance | None:
        """Return the instance that a message was for; None when it is gone or another one has its id now."""
        inst = self.by_id.get(spec.id)
        return inst if inst is not None and inst.spec.auth_url == spec.auth_url else None

    def why_out(self, instance_id: int) -> str | None:
        """Return in a word why an instance answers nothing any more; None: it may, or nothing is known."""
        if self.hot_set is None:
            return None
        inst = self.by_id.get(instance_id)
        if inst is None:
            return "not_hot"
        if inst.reports.silent:
            return "silent"
        return "model_down" if inst.reports.model_down else None

    def add(self, spec: HotInstance, now: float) -> ServingInstance:
        """Add and return an instance that was not hot before."""
        inst = self.by_id[spec.id] = ServingInstance(spec, self.table, now)
        return inst

    def remove(self, inst: ServingInstance) -> None:
        """Remove an instance, which must have no leases any more."""
        self.index.discard(inst)
        inst.leave()
        del self.by_id[inst.id]

    def survey(self) -> None:
        """Update the totals: how many instances are hot, their throughput together, their usual capacity."""
        hot = [inst for inst in self.by_id.values() if not inst.draining]
        self.hot = len(hot)
        self.throughput = sum(inst.throughput for inst in hot)
        if hot:
            self.typical_capacity = sum(inst.capacity for inst in hot) / len(hot)
            self.largest_capacity = max(max(inst.capacity, inst.spec.capacity_work) for inst in hot)

    def expect(self, expected_hot_s: float | None, now: float) -> None:
        """Note in how many seconds the next instance is expected to become hot; None: not known."""
        self._expected_at = None if expected_hot_s is None else now + expected_hot_s

    def expected_in_s(self, now: float) -> float | None:
        """Return the seconds until the next instance is expected to be hot (negative: overdue), or None."""
        return None if self._expected_at is None else self._expected_at - now
