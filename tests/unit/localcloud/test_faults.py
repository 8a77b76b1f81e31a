"""Faults as values: flags, parameters, and what is refused."""

from typing import Any

import pytest

from localcloud.faults import FAULTS, BadFault, Faults, Scope, limits_of, parse_flag, table


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("no-such", {}),
        ("offline", {"odd": 1}),
        ("offline", {"count": 0}),
        ("offline", {"count": 1.5}),
        ("offline", {"count": True}),
        ("offline", {"seconds": "soon"}),
        ("api-error", {"status": 200}),
        ("api-error", {"when": "later"}),
        ("slow-pull", {"factor": 0.5}),
        ("credit-zero", {"instance_id": 1}),
        ("docker-error", {"msg": ""}),
    ],
)
def test_a_fault_that_cannot_be_is_refused(name: str, args: dict[str, Any]) -> None:
    faults = Faults()
    with pytest.raises(BadFault, match=name):
        faults.add(name, args, 0.0)
    assert faults.shown(0.0) == []


def test_a_flag_names_a_fault_and_its_parameters() -> None:
    assert parse_flag("list-500") == ("list-500", {})
    assert parse_flag("api-error:status=502,when=after") == ("api-error", {"status": "502", "when": "after"})
    assert parse_flag("docker-error:msg=a, b") == ("docker-error", {"msg": "a, b"})
    for wrong in ("x:y", "x:a=1,a=2", "x:"):
        with pytest.raises(BadFault):
            parse_flag(wrong)


def test_every_fault_has_a_line_for_people() -> None:
    lines = list(table())
    assert [line.split(" ")[0] for line in lines] == list(FAULTS)
    assert all("seconds" in limits_of(kind) for kind in FAULTS.values())
    assert "instance_id" not in limits_of(FAULTS["list-500"])
    assert FAULTS["offline"].scope is Scope.INSTANCE
