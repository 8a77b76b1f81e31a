"""The table of transitions."""

import ast

import pytest

from fleet.states import FROM_ANYWHERE, TRANSITIONS, IllegalTransition, State, check_transition
from tests.paths import ROOT


@pytest.mark.parametrize("frm", State)
@pytest.mark.parametrize("to", State)
def test_only_the_moves_of_the_table_are_possible(frm: State, to: State) -> None:
    legal = to is not frm and (to in TRANSITIONS[frm] or to in FROM_ANYWHERE)
    if legal:
        check_transition(frm, to)
    else:
        with pytest.raises(IllegalTransition):
            check_transition(frm, to)


def test_every_state_is_reached_from_somewhere_and_can_be_left() -> None:
    reached = {to for edges in TRANSITIONS.values() for to in edges} | set(FROM_ANYWHERE)
    assert reached == set(State) - {State.ORDERED}


def test_only_the_reconciler_moves_a_state() -> None:
    """h11's first rule: everything that changes a state lives in one file."""
    files = [ROOT / "autoscaler.py", *(ROOT / "fleet").rglob("*.py")]
    movers = {
        path.relative_to(ROOT).as_posix()
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "enter"
    }
    assert movers == {"fleet/reconcile.py"}
