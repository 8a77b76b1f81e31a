"""Fixes that a child can run without, by name: the campaign must notice each, else its audit is nothing."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what is changed is imported where it is changed, after the child has said which
    from fleet.commands import AskPage, Performed


def _quorum() -> None:
    """C1: a machine that is silent past its deadline is broken, whatever our own network does."""
    from fleet import evidence

    def weigh_silence(a: evidence.Accusation, around: evidence.Circumstances) -> evidence.Ruling:  # noqa: ARG001
        broken = a.lasts_s > a.deadline_s
        return evidence.Ruling(evidence.Health.BROKEN if broken else evidence.Health.UNKNOWN, a.why, a.why)

    evidence._weigh_silence = weigh_silence


def _own_page() -> None:
    """C4: nobody asks for the own page of what the listings lack."""
    from fleet import planner

    def none(situation: planner.Situation) -> "Iterator[AskPage]":  # noqa: ARG001
        return iter(())

    planner._pages = none


def _absence() -> None:
    """C5: what believed listings lack for a while is gone, whatever its own page says."""
    from fleet.instance import Instance
    from fleet.reconcile import Reconciler
    from fleet.states import State

    asked = Reconciler._miss

    def miss(self: Reconciler, i: Instance, now: float) -> None:
        asked(self, i, now)
        lacked_s = 0.0 if i.absence.since is None else now - i.absence.since
        if self.listing.believed and lacked_s >= self.deadlines.absent_s and i.state is not State.GONE:
            self._move(i, State.GONE, "not listed", now)

    def finish_page(self: Reconciler, command: "AskPage", done: "Performed", now: float) -> None:  # noqa: ARG001
        if (i := self.instances.get(command.label)) is not None:
            i.absence.answer(now, shown=False)

    Reconciler._miss = miss  # type: ignore[method-assign]
    Reconciler.finish_page = finish_page  # type: ignore[method-assign]


def _silence() -> None:
    """A loadbalancer that does not answer is given up at once, by the gateways."""
    from fleet_client import retry

    retry.UNREACHABLE_S = 0.0


def _clock() -> None:
    """C7: times are those of the wall clock."""
    from process import clock

    def wall(offset: float | None = None) -> Callable[[], float]:  # noqa: ARG001
        return time.time

    clock.steady_clock = wall


UNDONE: Mapping[str, Callable[[], None]] = {
    "quorum": _quorum,
    "own-page": _own_page,
    "absence": _absence,
    "silence": _silence,
    "clock": _clock,
}
"""Each before the program imports what it changes."""


def undo(name: str) -> None:
    """Take that fix back in this process."""
    UNDONE[name]()
