"""Whose fault it is that a machine did not become hot, or that a create was refused: the whole rule.

    machine      it is given up, and not rented again for a while (a ban): the usual case
    deployment   model, image or arguments: every machine would fail in the same way. No ban
    account      the cloud refuses the orders of this account or key. No ban

What is the deployment's: a reason with a sign of SIGNS; and any other reason of its own that two machines of
different hosts give in their first boot, while no machine is well.

    a machine says it ─► SUSPECTED: no creates, but one at once, on another host, to see what that one says
    two hosts say it  ─► SHARED: no creates, but one after trial_s, the next after twice that, up to LONGEST
    a machine becomes hot for the first time, `PUT /manage`, a restart ─► over, and all goes on

- Machines that were banned for a reason that turns out to be shared are forgiven.
- A host is somebody else's computer: a machine that alone gave a reason of SIGNS is banned when the next one
  becomes hot, since it was not so.
- While another machine is on its way for the first time, that one is the trial.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from fleet.commands import AccountFault, Performed, Reply
from fleet.deadlines import Deadlines
from fleet.holds import HeldOrders, HoldKind, Holds
from fleet.instance import Instance
from fleet.journal import Journal
from fleet.market import Market
from fleet_client.back_off import back_off_s
from vast.rows import Offer

LONGEST = 24
"""Longest pause before a trial, in times of Deadlines.trial_s: six hours."""

SET_TOKEN = "`python autoscaler_server.py secrets set HF_TOKEN`"  # noqa: S105 no password
GO_ON = "then `python autoscaler_server.py manage on`, or restart the autoscaler"
ENDS = "by `manage on`, a restart, or a machine that becomes hot; one is tried now and then"


@dataclass(frozen=True)
class Sign:
    """Words, in lower case, by which a reason is known to be the deployment's; what it means, what to do."""

    words: tuple[str, ...]
    means: str
    todo: str


SIGNS = (
    Sign(
        ("gated repo", "you must have access to it and be authenticated", "not in the authorized list"),
        "the model is gated, and the machines' token may not read it",
        f"accept its terms on the hub and set a token of that account with {SET_TOKEN}",
    ),
    Sign(
        ("invalid credentials in authorization header", "invalid user token"),
        "the hub refuses the machines' token",
        f"set another with {SET_TOKEN}",
    ),
    Sign(
        ("not a valid model identifier", "repositorynotfounderror", "invalid repository id"),
        "the hub does not show the machines such a model",
        f"correct the model's name, or, if it is private, set a token with {SET_TOKEN}",
    ),
    Sign(
        ("error: unrecognized arguments", "error: argument "),
        "vLLM refuses an argument of the profile",
        "correct the profile's arguments for the version of vLLM in the image",
    ),
    Sign(
        ("does not recognize this architecture", "model architectures"),
        "the vLLM in the image does not know the model's architecture",
        "take a newer image, or another model",
    ),
    Sign(
        ("chat template",),
        "the model has no chat template that vLLM can read",
        "give the profile's arguments a --chat-template",
    ),
    Sign(
        ("pull access denied", "authentication required", "no basic auth credentials", "denied: requested"),
        "the registry does not give the image to the hosts",
        "correct the image's name, or, if it is private, give --registry-login",
    ),
    Sign(
        (
            "manifest unknown",
            "manifest for ",
            "repository does not exist",
            ": not found",
            "invalid reference",
        ),
        "the image does not exist",
        "correct the image's name and tag",
    ),
)
"""The first that fits counts. Read off vLLM 0.32 with transformers 5.19 (2026-11), and off docker's texts."""

OF_HOST = ("toomanyrequests", "dial tcp", "no such host", "i/o timeout", "tls handshake")
"""Words of docker with which a host, and not the image, is at fault."""


@dataclass(frozen=True)
class Cause:
    """A reason without what varies from machine to machine. sign: None where it may be the machine's."""

    key: str
    said: str
    sign: Sign | None = None


def cause_of(said: str) -> Cause:
    """Return the cause that a machine's or the cloud's own words give."""
    words = said.lower()
    if not any(of_host in words for of_host in OF_HOST):
        for sign in SIGNS:
            if any(word in words for word in sign.words):
                return Cause(sign.means, said, sign)
    key = re.sub(r"0x[0-9a-f]+|[0-9a-f]{12,}|\d+(\.\d+)?", "#", words)
    return Cause(" ".join(key.split())[:200], said)


def _surest(said: Collection[str]) -> Cause | None:
    """Return the first cause with a sign, else the first one, of what a machine has said."""
    causes = [cause_of(one) for one in said]
    return next((cause for cause in causes if cause.sign is not None), causes[0] if causes else None)


@dataclass
class Given:
    """One reason, and the machines that gave it: (host, machine), with the evidence against those banned."""

    by: dict[str, tuple[int, int | None]] = field(default_factory=dict)  # label: (host, machine)
    banned: set[int] = field(default_factory=set)

    @property
    def hosts(self) -> set[int]:
        """The hosts whose machines gave the reason."""
        return {host for host, _ in self.by.values()}


class Blame:
    """Decides who is to blame, and bans machines or holds creates accordingly."""

    def __init__(self, holds: Holds, market: Market, journal: Journal, deadlines: Deadlines) -> None:
        """Begin with nobody blamed."""
        self._holds = holds
        self._market = market
        self._journal = journal
        self._trial_s = deadlines.trial_s
        self._given: dict[str, Given] = {}
        self._trials = 0
        self._held: Cause | None = None
        self._beforehand = False
        self._overruled = False  # a person says that what hub or registry refuse is mended

    def note_beforehand(self, refused: str, now: float) -> None:
        """Take in what hub or registry refuse before anything is rented; "": nothing."""
        if refused and not self._overruled:
            self._beforehand = True
            ends = "by itself, within a minute of being mended, or by `manage on`"
            self._holds.set(HoldKind.DEPLOYMENT, refused, now, ends=ends)
        elif self._beforehand and not refused:
            self._end()

    # -- machines --------------------------------------------------------------------------------------

    def fail(self, i: Instance, why: str, evidence: str, others: Collection[Instance], now: float) -> None:
        """Blame somebody for a machine that is given up. others: the fleet's other machines."""
        cause = _surest(i.trouble.said)
        if cause is not None and (cause.sign is not None or self._is_shared(cause, i, others)):
            given = self._give(cause, i)
            for machine in given.banned:
                self._forgive(machine, now)
            given.banned.clear()
            self._hold(cause, given, now)
            return
        if i.loaded and i.boot.no_gpu_since is not None:
            return  # another customer has its GPUs: the machine is well, and on the market when they are free
        if not i.loaded:
            self._market.note_create_failed(now, why)
        if i.machine_id is not None:
            self._ban(i.machine_id, evidence, now)
            if cause is not None and not i.loaded:
                self._give(cause, i).banned.add(i.machine_id)

    def _is_shared(self, cause: Cause, i: Instance, others: Collection[Instance]) -> bool:
        """Return whether a reason without a sign is that of a first boot on another host, too."""
        if i.loaded or any(o.boot.was_hot for o in others):
            return False
        given = self._given.get(cause.key)
        return given is not None and bool(given.hosts - {host_of(i)})

    def _give(self, cause: Cause, i: Instance) -> Given:
        given = self._given.setdefault(cause.key, Given())
        given.by[i.label] = host_of(i), i.machine_id
        return given

    def _hold(self, cause: Cause, given: Given, now: float) -> None:
        self._held = cause
        hosts = len(given.hosts)
        what, todo = (cause.sign.means, cause.sign.todo) if cause.sign else ("", "see the log of one")
        what = what or "machines fail in the same way, and no machine is well"
        who = f"machines of {hosts} hosts say" if hosts > 1 else "one machine says, and another is tried:"
        rest_s = back_off_s(max(1, self._trials), self._trial_s, LONGEST * self._trial_s)
        self._holds.set(
            HoldKind.DEPLOYMENT,
            f"{what} ({who} {cause.said!r}): {todo}, {GO_ON}",
            now,
            ends=ENDS,
            trial_at=now + rest_s if hosts > 1 else now,
            not_at=frozenset(given.hosts),
        )

    def note_create(self, now: float) -> None:
        """Note that a machine is rented: during a hold that is the trial, and the next comes later."""
        for hold in list(self._holds):
            if hold.kind in OURS:
                self._trials += 1
                rest_s = back_off_s(self._trials, self._trial_s, LONGEST * self._trial_s)
                self._holds.postpone(hold.kind, now + rest_s)

    def note_hot(self, i: Instance, now: float) -> None:
        """Note that a machine becomes hot; one that does so for the first time ends what was held."""
        self._market.note_create_worked()
        if i.loaded:
            return
        held = None if self._held is None else self._given.get(self._held.key)
        if held is not None and self._held is not None and len(held.hosts) == 1:
            for host, machine in held.by.values():
                if machine is not None and host != host_of(i):
                    self._ban(machine, f"it alone says: {self._held.said}; others become hot", now)
        self._end()

    def mended(self) -> None:
        """Go on with everything, because a person says that what was wrong is mended."""
        self._overruled = self._beforehand
        self._end()
        self._market.end_rest()

    def _end(self) -> None:
        self._given.clear()
        self._held, self._trials, self._beforehand = None, 0, False
        for kind in OURS:
            self._holds.clear(kind)

    def _ban(self, machine_id: int, evidence: str, now: float) -> None:
        until = self._market.avoid(machine_id, evidence, now)
        self._journal.add_bad_machine(machine_id, until, evidence)

    def _forgive(self, machine_id: int, now: float) -> None:
        if self._market.forgive(machine_id):
            self._journal.add_bad_machine(machine_id, now, "forgiven: others fail in the same way")

    # -- orders ----------------------------------------------------------------------------------------

    def note_search(self, done: Performed, now: float) -> None:
        """Take in how the cloud answered a search: a key that may not search can rent nothing."""
        if done.refusal in (AccountFault.KEY, AccountFault.SCOPE):
            self._market.note_create_failed(now, done.why)
            self._refuse(done.refusal, done.why, now)

    def note_order(self, done: Performed, now: float) -> None:
        """Take in how the cloud answered a create: what the account is refused is held until it is mended."""
        if done.reply is Reply.DONE:
            for kind in REFUSED_FOR.values():
                self._holds.clear(kind)
        elif done.reply is Reply.REFUSED and not done.offer_gone:
            if done.refusal is AccountFault.CREDIT:
                # fleet/money.py ends it, when the account was looked at.
                said = f"a create is refused for lack of credit ({done.why!r}): pay in"
                self._holds.set(HoldKind.NO_CREDIT, said, now, HeldOrders.CREATES_AND_STARTS)
                return
            self._market.note_create_failed(now, done.why)
            if done.refusal in REFUSED_FOR:
                self._refuse(done.refusal, done.why, now)

    def _refuse(self, fault: AccountFault, why: str, now: float) -> None:
        # To try costs nothing: the market's own pause is the back-off.
        until = self._market.resting_until
        self._holds.set(
            REFUSED_FOR[fault], f"{REFUSALS[fault]} ({why!r}); {GO_ON}", now, ends=ENDS, trial_at=until
        )


REFUSED_FOR = {
    AccountFault.KEY: HoldKind.REFUSED,
    AccountFault.SCOPE: HoldKind.REFUSED,
    AccountFault.IMAGE: HoldKind.REFUSED,
    AccountFault.SPEND_LIMIT: HoldKind.SPEND_LIMIT,
}
"""Which hold follows from which refusal of a create; that there is no credit is held by fleet/money.py."""

REFUSALS = {
    AccountFault.KEY: "the cloud refuses the API key: set the right one (docs/vast-ai.md)",
    AccountFault.SCOPE: "the API key lacks a permission: to rent it needs instance_write, to search misc",
    AccountFault.IMAGE: "the cloud does not know the image or template: correct its name",
    AccountFault.SPEND_LIMIT: "the cloud limits what a new account spends: wait, pay in, or ask its support",
}

OURS = (HoldKind.DEPLOYMENT, *dict.fromkeys(REFUSED_FOR.values()))
"""The kinds of holds that this file sets and clears."""


def host_of(of: Instance | Offer) -> int:
    """Return what stands for the host of a machine: its owner, or the machine where that is not known."""
    return of.host_id if of.host_id is not None else -(of.machine_id or 0)
