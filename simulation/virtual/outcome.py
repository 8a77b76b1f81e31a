"""The results of a run in virtual time: figures of the requests and of the fleet, in little memory."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from fleet.costs import CostBreakdown
from fleet.history import FleetSample, columns, joined
from fleet.instance import Instance
from policies import Policy
from simulation.figures import SPREAD, Digest
from simulation.outcomes_over_time import OutcomesOverTime
from simulation.report import FAILED, LATE, OverTime, Sample

SHOWN = 600
"""Most points of a picture of the fleet."""

SAMPLES = 4096
"""Most samples of the fleet that are kept; when there are more, every other one is dropped."""


@dataclass
class RequestFigures:
    """Figures of the requests that arrived in the scored part of a run; `cut` is of the whole run.

    missed: requests that did not keep the objective, those that failed among them. late: requests that the
    loadbalancer had put behind the others. later_s, later_tokens: seconds from the first token to the end,
    summed up, and the tokens after the first.
    """

    requests: int = 0
    completed: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    retried: int = 0
    setbacks: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    missed: int = 0
    missed_why: Counter[str] = field(default_factory=Counter)
    late: int = 0
    first_token: Digest = field(default_factory=Digest)
    per_token: Digest = field(default_factory=Digest)
    whole: Digest = field(default_factory=Digest)
    route: Digest = field(default_factory=Digest)
    late_wait: Digest = field(default_factory=Digest)
    later_s: float = 0.0
    later_tokens: int = 0

    @property
    def between_tokens(self) -> dict[str, float | None]:
        """The time between two tokens: its mean over all tokens; the single ones are not looked at."""
        mean = self.later_s / self.later_tokens if self.later_tokens else None
        return dict.fromkeys(SPREAD) | {"mean": mean}

    @property
    def missed_share(self) -> float:
        """The share of the requests that did not keep the objective."""
        return self.missed / self.requests if self.requests else 0.0

    def add_completed(
        self, prompt: int, output: int, waited_s: float, first_s: float, whole_s: float, missed: str | None
    ) -> None:
        """Count an answered request. waited_s, first_s, whole_s: seconds to lease, first token, end.

        missed: of the objective, as report.missed_by says.
        """
        self.requests += 1
        self.completed += 1
        self.prompt_tokens += prompt
        self.output_tokens += output
        self.first_token.add(first_s)
        self.whole.add(whole_s)
        self.route.add(waited_s)
        if output > 1:
            self.per_token.add((whole_s - first_s) / (output - 1))
            self.later_s += whole_s - first_s
            self.later_tokens += output - 1
        if missed is not None:
            self.missed += 1
            self.missed_why[missed] += 1
        if missed == LATE:
            self.late_wait.add(waited_s)

    def add_failed(self, why: str) -> None:
        """Count a request whose user gave up. why: the last failure."""
        self.requests += 1
        self.failed[why] += 1
        self.missed += 1
        self.missed_why[FAILED] += 1

    def add_retried(self) -> None:
        """Count a request that took more than one lease."""
        self.retried += 1

    def add_late(self) -> None:
        """Count an answered request that the loadbalancer had put behind those that could be in time."""
        self.late += 1

    def add_setback(self, why: str) -> None:
        """Count a failure of an instance to serve a request, by kind."""
        self.setbacks[why] += 1

    def add_refusal(self, why: str) -> None:
        """Count a refusal of the loadbalancer to give a lease, by kind."""
        self.refusals[why] += 1

    def add_cut(self) -> None:
        """Count a request that was cut because it was longer than the model's context."""
        self.cut += 1


@dataclass(kw_only=True)
class Outcome(RequestFigures):
    """The results of a run in virtual time.

    Figures are of the scored part of the run; counts of clamped turns and the audit are of all of it.
    """

    duration_s: float
    costs: CostBreakdown
    took: list[tuple[str, float, float]]
    over_time: OverTime
    clamped: Counter[str]
    audit: dict[str, Any]
    policy: Policy
    curve: dict[str, Any] | None


class FleetSamples:
    """Samples of the fleet over time, joined by twos whenever there are more than SAMPLES."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._looks = 0
        self._every = 1
        self._history: list[FleetSample] = []
        self._joining: list[FleetSample] = []

    def look(
        self, at_s: float, instances: Iterable[Instance], demand: float, latest: FleetSample | None
    ) -> None:
        """Take a sample of the fleet now, if it is one of those that are kept.

        latest: what the autoscaler noted of its last turn, if that was just now.
        """
        if latest is not None:
            self._joining.append(replace(latest, at_s=at_s))
        self._looks += 1
        if self._looks % self._every:
            return
        if self._joining:
            self._history.append(joined(self._joining))
            self._joining.clear()
        fleet = list(instances)
        states = Counter(str(i.state) for i in fleet)
        usd_h = sum(i.price_usd_h for i in fleet)
        self.samples.append(Sample(at_s, dict(states), round(usd_h, 6), round(demand, 4)))
        if len(self.samples) > SAMPLES:
            del self.samples[1::2]
            self._history = [joined(self._history[n : n + 2]) for n in range(0, len(self._history), 2)]
            self._every *= 2

    def over_time(self, outcomes: OutcomesOverTime, to_s: float) -> OverTime:
        """Return all that was seen, with what became of the requests; to_s: the end of the run."""
        fleet = {"from": 0.0, "to": round(to_s, 3), **columns(self._history, SHOWN)}
        return OverTime(self.samples, outcomes, fleet)
