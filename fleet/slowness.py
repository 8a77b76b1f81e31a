"""Machines that serve many times slower than their peers, although they pass test prompts.

    clients say so (dispatch/client_paces.py)    unknown: it gets single requests, a cold one takes its
                                                 place, and it is stopped when enough others serve
    and our own check finds the same             two kinds of evidence: broken
    or its own counters show the same            two kinds of evidence: broken

Our check of such a machine sends a test prompt as long as those of clients. It agrees when that prompt is
taken and not answered, or is out of the objective and takes SLOW_RATIO times as long for a token as those of
its peers. Its counters agree when the throughput measured by them is a SLOW_RATIO-th of its peers', each as a
share of what its GPU should do. Without peers nothing is known. A new boot begins with a clean record.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from engine.slo import Slo
from fleet.durations import median

SLOW_RATIO = 4.0
"""Times as slow as its peers; the same that loadbalancers go by."""

HEARD_S = 30.0
"""Seconds for which a loadbalancer's word is good: it is repeated each second."""

CONFIRMED_S = 45.0
"""Seconds for which clients must have found a machine slow before it is broken: three checks of a hot one."""

STOP_AFTER_S = 90.0
"""Seconds that a slow machine is left for our own checks, before it is stopped where others suffice."""

PROBE_TOKENS = 1000
"""Tokens of the longest test prompt: what its first token may take longer for."""


@dataclass(frozen=True)
class ProbePace:
    """How long a test prompt took: seconds in all, and how many tokens came."""

    took_s: float
    tokens: int

    @property
    def each_s(self) -> float:
        """Seconds for each token, with those before the first."""
        return self.took_s / max(1, self.tokens)

    @property
    def in_time(self) -> bool:
        """Whether the answer met the usual objective."""
        slo = Slo()
        return self.took_s <= slo.first_token_limit_s(PROBE_TOKENS) + slo.output_token_s * self.tokens


@dataclass
class Slowness:
    """What is known of the pace of one machine in its present boot, beside that of its peers.

    clients, check, word: what each says, in words; None: nothing. times: boots in which clients found it
    slow.
    """

    clients: str | None = None
    since: float = 0.0
    check: str | None = None
    word: str | None = None
    times: int = 0
    last: ProbePace | None = None  # test prompt that passed
    _heard_at: float = float("-inf")

    def note_clients(self, why: str | None, now: float) -> bool:
        """Note what a loadbalancer says that clients met; return whether that is news.

        why: None: nothing that is slow.
        """
        if why is None:
            if self.clients is not None and now - self._heard_at > HEARD_S:
                self.clients = self.check = self.word = None
            return False
        news = self.clients is None
        if news:
            self.since = now
            self.times += 1
        self.clients, self._heard_at = why, now
        return news

    def note_word(self, why: str | None) -> None:
        """Note whether the machine's own counters agree, in words."""
        self.word = why

    def note_stall(self, started_at: float) -> None:
        """Note that a test prompt was taken and not answered. started_at: when that check began."""
        if self.clients is not None and started_at > self.since:
            self.check = "a test prompt was taken and not answered"

    def note_pace(self, pace: ProbePace, peers: Iterable["Slowness"]) -> None:
        """Take in how long a test prompt took that was answered."""
        self.last = pace
        others = [one.last.each_s for one in peers if one.last is not None and one.clients is None]
        usual_s = median(others)
        self.check = None
        if usual_s is not None and not pace.in_time and pace.each_s >= SLOW_RATIO * usual_s:
            self.check = (
                f"a test prompt took {pace.took_s:.1f} s, {pace.each_s / usual_s:.1f} times its peers'"
            )

    @property
    def said(self) -> str | None:
        """All that is said against the machine, in words; None where clients say nothing."""
        if self.clients is None:
            return None
        return "; ".join(one for one in (self.clients, self.check, self.word) if one is not None)

    def begin_anew(self) -> "Slowness":
        """Return the record with which the next boot begins."""
        return Slowness(times=self.times)
