"""Which instances are slow by what clients met there, beside the other instances of the same time.

An instance that answers reports and test prompts well may still let clients wait: a host that knows our
checks, or a GPU that is throttled. Clients tell how long the first part of an answer took, and each further
one (POST /pace). Each is divided by what was expected when the lease was given, from the step times that the
hot set tells of that GPU, the prompts before it and its own, or by 1 / SLOW_RATIO of the objective if that is
more. So more work, longer prompts and another GPU make no instance slow, and what is in time is not slow. An
instance is slow when of one of the two

    its usual ratio    >= SLOW_RATIO * the median of its peers' usual ratios, and >= SLOW_RATIO

by at least LEAST answers of the last WINDOW_S seconds, of two clients where two are there. The usual ratio is
what USUAL of a client's answers are below, so that a host which is slow for some of them is found, too; of
several clients the lower median: one client alone says nothing where there are others.
Without a peer that is judged, too, nothing is known. A slow instance gets one lease now and then, whose
answer shows whether it has recovered; at most a share of the instances at a time (WORD_SHARE), since all of
this is clients' word; and as many as others while no other can serve.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median, median_low

from dispatch.answer_times import AnswerTimes
from dispatch.hot_instances import HotInstances
from dispatch.instance import ServingInstance
from dispatch.instance_failures import InstanceFailures
from dispatch.lease import Lease
from dispatch.lease_book import LeaseBook
from engine.forward import LEFT, PROMPT
from engine.slo import Slo

SLOW_RATIO, GOOD_RATIO = 4.0, 2.0
"""Times as slow as its peers from which an instance counts as slow, and below which its probes are good."""

USUAL = 0.7
"""Share of a client's answers that are as fast as what is usual, or faster."""

LEAST, LEAST_EACH = 8, 3
"""Answers that are needed of an instance, and of a client there that counts."""

WINDOW_S = 120.0
"""Seconds for which an answer says something."""

KEPT, MOST_PEERS, MOST_CLIENTS = 64, 64, 256
"""Answers of an instance, peers that are looked at, and clients that are remembered: the latest of each."""

GOOD_PROBES = 3
"""Good answers in a row after which an instance is as others again."""

WAY_S = 0.5
"""Seconds that are added to what is expected of a first part: the way there under TLS, a busy client."""

MOST_RATIO = 1000.0
"""A ratio counts at most so much."""

FEW_PIECES = 8
"""Fewest parts by which the time of the rest is divided: of two parts one may have waited for a prompt."""

WORDS = ("its answers begin after {0:.1f} s", "its tokens come each {0:.2f} s")


@dataclass(frozen=True, slots=True)
class Met:
    """What a client met once. seconds, ratios: of the first part, and of each other one if there were."""

    at: float
    client: str
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Usual:
    """What clients usually meet at one instance: ratio and seconds, by so many answers and clients."""

    ratio: float
    seconds: float
    answers: int
    clients: int


@dataclass(eq=False, slots=True)
class InstancePace:
    """What clients met at one instance in one boot. good: good answers in a row since it is slow."""

    inst: ServingInstance
    boot_id: str | None
    met: deque[Met] = field(default_factory=lambda: deque(maxlen=KEPT))
    good: int = 0

    def usual(self, which: int, clients: int, now: float) -> Usual | None:
        """Return what is usual of the first part (0) or the others (1); None: not known.

        clients: how many must have met it.
        """
        by_client: dict[str, list[Met]] = {}
        for one in self.met:
            if now - one.at <= WINDOW_S and which < len(one.ratios):
                by_client.setdefault(one.client, []).append(one)
        counted = [some for some in by_client.values() if len(some) >= LEAST_EACH]
        answers = sum(map(len, counted))
        if answers < LEAST or len(counted) < clients:
            return None
        ratio = median_low(_usual([one.ratios[which] for one in some]) for some in counted)
        seconds = _usual([one.seconds[which] for some in counted for one in some])
        return Usual(ratio, seconds, answers, len(counted))

    def count_good(self, *, good: bool) -> bool:
        """Count an answer of a slow instance; return whether it has recovered."""
        self.good = self.good + 1 if good else 0
        return self.good >= GOOD_PROBES

    def begin_anew(self) -> None:
        """Forget what was met: the instance is slow from now on, or is not any more."""
        self.met.clear()
        self.good = 0


class ClientPaces:
    """What clients met at all instances, and which of those are held back for it. Times are epoch seconds."""

    def __init__(
        self, instances: HotInstances, leases: LeaseBook, failures: InstanceFailures, slo: Slo
    ) -> None:
        """Start without answers. leases: whose they are; failures: bounds how many are held back.

        slo: the objective; what is in time is not slow.
        """
        self._instances = instances
        self._leases = leases
        self._failures = failures
        self.slo = slo
        self.times = AnswerTimes(slo)
        self._paces: dict[int, InstancePace] = {}  # by instance; the latest heard of last
        self._fresh: set[int] = set()  # heard of since the last tick
        self._clients: dict[str, deque[float]] = {}  # when each met its last answers; the latest last

    # -- what is met

    def hear(
        self, request_id: str, client: str, first_s: float, rest_s: float, pieces: int, now: float
    ) -> None:
        """Take in how fast the answer to a client's request came, once for each of its own leases.

        first_s: seconds until the first part. rest_s: for all others. pieces: parts, 0 where it came in one.
        """
        lease = self._leases.take_pace(request_id, client)
        if lease is None:
            return
        self.times.add(lease, first_s, rest_s, pieces)
        due_s, each_due_s = self._due_s(lease)
        if not pieces:
            whole_s = due_s + lease.row.item(LEFT) * each_due_s
            self._note(lease, (first_s + rest_s,), (whole_s,), now)
            return
        each_s = rest_s / max(pieces, FEW_PIECES)
        self._note(lease, (first_s, each_s), (due_s, each_due_s), now)

    def give_up(self, request_id: str, client: str, now: float) -> None:
        """Take in that a client has given up waiting for the first part of an answer."""
        lease = self._leases.take_pace(request_id, client)
        if lease is not None:
            self._note(lease, (now - lease.given_at,), self._due_s(lease)[:1], now)

    def _due_s(self, lease: Lease) -> tuple[float, float]:
        """Return in how many seconds the first part of an answer is due, and each other one."""
        first_s = self.slo.first_token_limit_s(lease.row.item(PROMPT)) / SLOW_RATIO
        return (
            max(WAY_S + lease.first_token_s + lease.token_s, first_s),
            max(lease.token_s, self.slo.output_token_s / SLOW_RATIO),
        )

    def _note(self, lease: Lease, took_s: tuple[float, ...], due_s: tuple[float, ...], now: float) -> None:
        inst = self._instances.by_id.get(lease.instance_id)
        if inst is None or inst.boot_id != lease.boot_id:
            return
        ratios = tuple(min(MOST_RATIO, took / due) for took, due in zip(took_s, due_s, strict=True))
        pace = self._paces.pop(inst.id, None)
        if pace is None or pace.inst is not inst or pace.boot_id != inst.boot_id:
            pace = InstancePace(inst, inst.boot_id)
        self._paces[inst.id] = pace
        pace.met.append(Met(now, lease.client, took_s, ratios))
        times = self._clients.pop(lease.client, None) or deque(maxlen=LEAST)
        times.append(now)
        self._clients[lease.client] = times
        if len(self._clients) > MOST_CLIENTS:
            del self._clients[next(iter(self._clients))]
        if inst.circuit.slow is None:
            self._fresh.add(inst.id)
        elif pace.count_good(good=all(self._is_good(pace, n, one, now) for n, one in enumerate(ratios))):
            inst.circuit.trust_pace()
            pace.begin_anew()
            self._instances.index.update(inst, now)

    def _is_good(self, pace: InstancePace, which: int, ratio: float, now: float) -> bool:
        return ratio < GOOD_RATIO * max(1.0, self._of_peers(pace, which, now) or 1.0)

    # -- what follows from it

    def tick(self, now: float) -> None:
        """Judge the instances that were heard of; spare what is slow while no other can serve."""
        for instance_id in self._fresh:
            pace = self._paces.get(instance_id)
            why = self._why_slow(pace, now) if pace is not None and self._is_present(pace) else None
            if pace is not None and why is not None and self._failures.hold_back(pace.inst, why, now):
                pace.begin_anew()
                self._instances.index.update(pace.inst, now)
        self._fresh.clear()
        for inst in self._failures.held_back():
            if inst.circuit.spare(alone=not self._others_serve(inst), boot_id=inst.boot_id):
                self._instances.index.update(inst, now)
        if len(self._paces) > len(self._instances):
            self._paces = {i: pace for i, pace in self._paces.items() if self._is_present(pace)}

    def _is_present(self, pace: InstancePace) -> bool:
        inst = pace.inst
        return self._instances.by_id.get(inst.id) is inst and inst.boot_id == pace.boot_id

    def _others_serve(self, inst: ServingInstance) -> bool:
        others = (one for one in self._instances if one is not inst and not one.draining)
        return any(one.circuit.slow is None and one.circuit.left > 0 for one in others)

    def _why_slow(self, pace: InstancePace, now: float) -> str | None:
        """Return in words why an instance is slow beside its peers; None: it is not, or nobody knows."""
        if pace.inst.circuit.slow is not None:
            return None
        for which, words in enumerate(WORDS):
            own = pace.usual(which, self._clients_needed(now), now)
            if own is None or own.ratio < SLOW_RATIO:
                continue
            peers = self._of_peers(pace, which, now)
            if peers is None or own.ratio < SLOW_RATIO * peers:
                continue
            return (
                f"{words.format(own.seconds)}, {own.ratio:.1f} times what is due there; those of its peers "
                f"{peers:.1f} times ({own.answers} answers, {own.clients} clients)"
            )
        return None

    def _clients_needed(self, now: float) -> int:
        several = sum(1 for times in self._clients.values() if _is_there(times, now)) > 1
        return 2 if several else 1

    def _of_peers(self, pace: InstancePace, which: int, now: float) -> float | None:
        """Return the median of the usual ratios of an instance's peers; None: there is no peer."""
        found = [one.usual(which, 1, now) for one in self._peers(pace)]
        known = [one.ratio for one in found if one is not None]
        return median(known) if known else None

    def _peers(self, pace: InstancePace) -> Iterator[InstancePace]:
        looked_at = 0
        for one in reversed(self._paces.values()):
            if one is pace or one.inst.circuit.slow is not None or not self._is_present(one):
                continue
            looked_at += 1
            if looked_at > MOST_PEERS:
                return
            yield one


def _usual(values: list[float]) -> float:
    return sorted(values)[round(USUAL * (len(values) - 1))]


def _is_there(times: deque[float], now: float) -> bool:
    return len(times) == LEAST and now - times[0] <= WINDOW_S
