"""GET /openapi.json is true: it has every route, and generated requests are answered as it says."""

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from flask import Flask
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from dispatch.outside import api_description as of_loadbalancer
from fleet.outside import api_description as of_autoscaler
from tests.loadbalancer_app import CLIENT, CONTROL, TwoInstances, both_hot
from tests.loadbalancer_app import OPERATOR as LB_OPERATOR
from tests.paths import ROOT
from tests.process.test_autoscaler_server import OPERATOR, Face, ledger
from tests.web_server import served
from web.direct import DirectRoutes
from web.openapi import VERSION, Operation

__all__ = ["ledger"]

load_all_checks()
HELD_TO: list[Any] = [
    CHECKS.get_one(name)
    for name in (
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "unsupported_method",
    )
]
"""A 500 is in no description, so the first of them finds it."""

REFUSES_WRONG: Any = CHECKS.get_one("negative_data_rejection")

LENIENT = {"/busy", "/report"}
"""Reports of which a wrong part is left out, because the rest counts: it is named in the answer or a log."""

KEYS = {"client": CLIENT, "our servers": CONTROL, "instance": "no-signature", "anyone": ""}


class Server:
    """One server of ours with its description, and the key that each of its routes wants."""

    def __init__(
        self, app: Flask, operations: Sequence[Operation], operator: str, stock: Callable[[], None]
    ) -> None:
        self.app = app
        self.operations = operations
        self.keys = {**KEYS, "operator": operator}
        self._stock = stock

    async def begin(self) -> None:
        """Give the server what its answers need, in its own thread."""
        self._stock()


@pytest.fixture(params=["autoscaler", "loadbalancer"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    if request.param == "autoscaler":
        face = Face(request.getfixturevalue("ledger"), tmp_path, operator=frozenset({OPERATOR}))
        yield Server(face.app, of_autoscaler.OPERATIONS, OPERATOR, lambda: None)
    else:
        world = TwoInstances(frozenset({CLIENT}), frozenset({LB_OPERATOR}))
        hot = both_hot()
        yield Server(world.app, of_loadbalancer.OPERATIONS, LB_OPERATOR, lambda: world.supply(hot))


def answered(app: Flask) -> set[tuple[str, str]]:
    """(method, path) of all routes that the app answers."""
    found = {
        (method, re.sub(r"<(?:id:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    return found | {
        (method, path) for path, methods in DirectRoutes.of(app).by_path.items() for method in methods
    }


def test_the_description_has_exactly_the_routes_that_are_answered(server: Server) -> None:
    assert {(one.method, one.path) for one in server.operations} == answered(server.app)


def test_the_version_is_the_projects() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_generated_requests_are_answered_as_described(server: Server, mode: GenerationMode) -> None:
    """Right ones and wrong ones; among the answers are good ones and refusals."""
    statuses: Counter[int] = Counter()
    with served(server.app, [server.begin]) as port:
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
        for one in server.operations:
            operation = schema[one.path][one.method]
            if mode is GenerationMode.NEGATIVE and one.body is None and not one.query and "{" not in one.path:
                continue  # nothing in it can be wrong
            key = server.keys[one.who]
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            statuses += ask_as_generated(operation, mode, headers)
    assert statuses[400] > 40 if mode is GenerationMode.NEGATIVE else statuses[200] > 100, statuses


def ask_as_generated(
    operation: schemathesis.APIOperation[Any, Any, Any, Any], mode: GenerationMode, headers: dict[str, str]
) -> Counter[int]:
    """Send requests made from the description of an operation; return how often each status came."""
    statuses: Counter[int] = Counter()
    checks = HELD_TO if operation.path in LENIENT else [*HELD_TO, REFUSES_WRONG]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=25,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: schemathesis.Case[Any]) -> None:
        answer = case.call_and_validate(headers=headers, checks=checks, timeout=30)
        statuses[answer.status_code] += 1

    ask()
    return statuses
