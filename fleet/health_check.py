"""Health checks of instances as data: what is to be checked, and what was found.

fleet/outside/health_checker.py makes them; `Reconciler.judge` draws the conclusions.
"""

from dataclasses import dataclass
from enum import StrEnum

from fleet.slowness import ProbePace
from fleet.states import State


class Verdict(StrEnum):
    """What a health check of an instance found."""

    PASSED = "passed"
    LOADING = "loading"  # reachable, but the ready line is not there yet
    FATAL = "fatal"  # the log of this boot holds a fatal line, or the host key changed
    FAILED = "failed"  # did not answer as a hot instance must
    UNKNOWN = "unknown"  # a fault of ours: the check could not be made


@dataclass(frozen=True)
class HealthCheck:
    """The result of one finished health check.

    in_flight: requests that the instance itself says it is working on. certificate: the machine's (PEM), when
    the check read it over ssh. answered: the machine itself did, although the check failed. stranger:
    somebody else answered. pace: of the test prompt that was answered. stalled: the machine took one and did
    not answer it in time.
    """

    label: str
    started_at: float
    verdict: Verdict
    why: str
    in_flight: int | None = None
    certificate: str | None = None
    answered: bool = False
    stranger: bool = False
    pace: ProbePace | None = None
    stalled: bool = False

    @property
    def met(self) -> bool:
        """Whether the check met the machine itself, and not nobody or a stranger."""
        by_verdict = self.verdict not in (Verdict.FAILED, Verdict.UNKNOWN)
        return not self.stranger and (self.answered or by_verdict)


@dataclass(frozen=True)
class HealthCheckOrder:
    """A health check that is to be made of an instance, and where.

    read_log: whether the log must be read; always, until the instance is hot. certificate: the machine's, as
    far as it is known; reading the log reads it anew. long_prompt: whether the test prompt is to be as long
    as those of clients, who accuse the machine. word: what the machine said last in this boot, signed, as
    "ready"; then the certificate is the one that it said, and the log is the second source.
    """

    label: str
    id: int
    state: State
    ssh: tuple[str, int] | None
    auth_url: str | None
    address: str | None
    read_log: bool
    certificate: str | None = None
    long_prompt: bool = False
    word: str = ""
