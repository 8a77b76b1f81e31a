"""Whether a machine is well, and what it takes to call it broken: the whole rule, to be read in one place.

    well      its log has the ready line and a test prompt came back
    broken    it is given up: destroyed, and its machine not rented again for a while
    unknown   everything else: it gets no requests, and it stays in the fleet

A fault of ours (ledger, files, threads, DNS, network, an exception in our code) is never more than unknown.
Broken needs one of:

    two kinds of evidence of what does not pass by itself              a fatal line that we read in its log
    one kind, while another machine is well                            its container ended; the others run
    a deadline of its state that has passed                            while the listing is believed, and what
                                                                       accuses it is not our own network

A check that met nobody says nothing about whose fault that is. It counts against the machine when another
machine passed a check that began after it, or when the listing accuses the machine, too. Where neither is so,
all that we see may be our own network: then the silence must have lasted `together_s`, and a reachability
check of our own must have passed.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from fleet.slowness import Slowness


class Health(StrEnum):
    """Whether a machine is well, broken, or neither is known."""

    WELL = "well"
    BROKEN = "broken"
    UNKNOWN = "unknown"


class Source(StrEnum):
    """The kinds of evidence against a machine, by where they come from."""

    CHECK = "our check"
    WORD = "its own word"
    CLIENTS = "its clients"
    LISTING = "the listing"


@dataclass(frozen=True)
class Accusation:
    """What speaks against one machine, for `weigh`.

    why: in words. against: the kinds of evidence. lasts_s: for how long it has lasted. deadline_s: how long
    it may. final: it does not pass by itself. silent: our checks met nobody there, or could not be made.
    silent_s: for how long.
    """

    why: str
    against: frozenset[Source]
    lasts_s: float = 0.0
    deadline_s: float = float("inf")
    final: bool = False
    silent: bool = False
    silent_s: float = 0.0


@dataclass(frozen=True)
class Circumstances:
    """What is known besides an accusation, for `weigh`.

    believed: whether the listing is. others_well: another machine passed a check that began after this one's
    trouble, or, where this one is to start, another one has started since. reach: what our own reachability
    check found. together_s: how long we wait where all may be our network.
    """

    believed: bool
    others_well: bool
    reach: Health
    together_s: float


@dataclass(frozen=True)
class Ruling:
    """The verdict on an accused machine: its health, why in short, and the evidence in a sentence."""

    health: Health
    why: str
    evidence: str


def weigh(accusation: Accusation, around: Circumstances) -> Ruling:
    """Return whether the accused machine is broken; otherwise its health is unknown."""
    a = accusation
    kinds = " and ".join(sorted(a.against))
    if not around.believed:
        return Ruling(Health.UNKNOWN, a.why, f"{a.why}: the listing is not believed")
    if a.silent and not around.others_well and Source.LISTING not in a.against:
        return _weigh_silence(a, around)
    if a.final and len(a.against) > 1:
        return Ruling(Health.BROKEN, a.why, f"{a.why} ({kinds})")
    if a.final and around.others_well:
        return Ruling(Health.BROKEN, a.why, f"{a.why} ({kinds}, while others are well)")
    if a.lasts_s > a.deadline_s:
        beside = ", while others are well" if around.others_well else ""
        return Ruling(Health.BROKEN, a.why, f"{a.why} ({kinds} for {a.lasts_s:.0f} s{beside})")
    return Ruling(Health.UNKNOWN, a.why, f"{a.why} ({kinds})")


def _weigh_silence(a: Accusation, around: Circumstances) -> Ruling:
    """Weigh an accusation of silence where our own network could be what is broken."""
    if a.lasts_s <= a.deadline_s:
        return Ruling(Health.UNKNOWN, a.why, f"{a.why}: not for long enough to tell")
    if around.reach is not Health.WELL:
        return Ruling(Health.UNKNOWN, a.why, f"{a.why}: our own network is not known to work")
    if a.silent_s <= around.together_s:
        return Ruling(Health.UNKNOWN, a.why, f"{a.why}: no other machine shows that our own network works")
    return Ruling(
        Health.BROKEN,
        a.why,
        f"{a.why} (nobody answered for {a.silent_s:.0f} s, and our own network works: our check)",
    )


HOST_ERRORS = (
    "error response from daemon",
    "oci runtime create failed",
    "failed to inject cdi",
    "no space left on device",
    "failed to resolve reference",
)
"""Docker and host failures seen in status_msg (vast-contract 6.2), in lower case."""


@dataclass
class Trouble:
    """What our checks and the listing hold against one machine in its present boot, and since when."""

    passed_at: float = float("-inf")  # when the last check that passed began
    well_since: float = float("inf")  # when the first of the unbroken row of those began
    silent_at: float = float("-inf")  # when the last check that met nobody began
    failing: bool = False  # the last check did not pass
    silent_since: float | None = None  # when the first of an unbroken row that met nobody had ended
    ended_since: float | None = None  # the listing says that its container ended by itself
    host_error: str | None = None  # what status_msg says is wrong
    host_error_since: float | None = None
    given_up: int = 0  # listings in a row in which its host has given up loading it
    fatal: str | None = None  # what does not pass by itself, as our check found it
    word: str | None = None  # the same, as its own signed word has it
    word_since: float = 0.0
    clients_since: float | None = None  # clients, or the loadbalancer for them, met failures there
    slow: Slowness = field(default_factory=Slowness)

    def note_pass(self, started_at: float) -> None:
        """Note that the machine passed a check, which began at started_at."""
        self.passed_at = max(self.passed_at, started_at)
        self.well_since = min(self.well_since, started_at)
        self._forget_failures()

    def note_trouble(self, started_at: float, now: float, *, met: bool) -> None:
        """Note a check that the machine did not pass, which began at started_at. met: it answered itself."""
        self.failing, self.well_since = True, float("inf")
        if not met:
            self.silent_at = started_at
        self.silent_since = None if met else now if self.silent_since is None else self.silent_since

    def note_ended(self, now: float, *, ended: bool) -> None:
        """Note whether the listing shows the machine's container as ended by itself."""
        self.ended_since = None if not ended else now if self.ended_since is None else self.ended_since

    def note_status(self, status_msg: str | None, now: float) -> None:
        """Note what status_msg says, where that is a failure of docker or of the host."""
        words = (status_msg or "").lower()
        if not any(error in words for error in HOST_ERRORS):
            self.host_error = self.host_error_since = None
            return
        self.host_error = status_msg
        self.host_error_since = now if self.host_error_since is None else self.host_error_since

    def note_loading(self, *, given_up: bool) -> None:
        """Note whether the listing shows a machine that loads as meant to be stopped, which nobody asked."""
        self.given_up = self.given_up + 1 if given_up else 0

    def accuse(self, fatal: str) -> None:
        """Note a fault of the machine that does not pass by itself, such as a fatal line in its log."""
        self.fatal = fatal

    def note_word(self, word: str | None, now: float) -> None:
        """Note what the machine itself says is wrong and does not pass; None: it is well, or loads."""
        if word is None or self.word is None:
            self.word_since = now
        self.word = word

    def note_clients(self, now: float) -> None:
        """Note that clients report failures of the machine."""
        self.clients_since = now if self.clients_since is None else self.clients_since

    def forget(self) -> None:
        """Forget all trouble, because the machine begins a new boot."""
        self.passed_at, self.well_since, self.ended_since = float("-inf"), float("inf"), None
        self.slow = self.slow.begin_anew()
        self._forget_failures()

    def _forget_failures(self) -> None:
        self.failing, self.silent_since = False, None
        self.fatal = self.word = self.clients_since = None

    @property
    def said(self) -> tuple[str, ...]:
        """What is wrong with the machine in its own words, or docker's, from the surest source on."""
        return tuple(said for said in (self.fatal, self.word, self.host_error) if said is not None)

    def contrasts_with(self, other: "Trouble") -> bool:
        """Return whether this machine has been well since before the other's last check met nobody.

        When our own network comes back, one machine is the first to answer: that says nothing against those
        whose checks had begun before.
        """
        return (
            other.silent_since is not None
            and self.shows_well_since(other.silent_since)
            and self.well_since <= other.silent_at
        )

    @property
    def accused_by_clients(self) -> bool:
        """Whether clients met failures there, or find the machine slow."""
        return self.clients_since is not None or self.slow.clients is not None

    def shows_well_since(self, at: float) -> bool:
        """Return whether the machine is well by a check that began after that time."""
        return not self.failing and self.passed_at > at


REACH_LASTS_S = 90.0
"""Seconds for which a reachability check of our own says something."""


class Reachability:
    """What the last reachability check of our own found: whether our network works."""

    def __init__(self) -> None:
        """Begin with no check made."""
        self._health, self._at = Health.UNKNOWN, float("-inf")

    def note(self, health: Health, now: float) -> None:
        """Take in what a reachability check of our own found now."""
        self._health, self._at = health, now

    def at(self, now: float) -> Health:
        """Return whether our own network works now; UNKNOWN when the last check is too long ago."""
        return self._health if now - self._at <= REACH_LASTS_S else Health.UNKNOWN
