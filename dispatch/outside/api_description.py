"""The loadbalancer's routes, as GET /openapi.json describes them."""

from typing import Annotated, Any

from msgspec import Meta, Struct

from web.answers import Problem
from web.messages.hot_set import HotSet, HotSetTaken
from web.messages.leases import DoneBody, LeaseAnswer, LeaseBatch, PaceBody, RouteBody, WellAnswer, WellBody
from web.messages.reports import PushedReport, ReportTaken
from web.openapi import Operation, Page

AskedRoute = Annotated[
    RouteBody,
    Meta(
        extra_json_schema={
            "oneOf": [
                {
                    "required": ["work"],
                    "properties": {
                        "work": {"type": "number"},
                        "prompt_tokens": {"type": "null"},
                        "max_tokens": {"type": "null"},
                    },
                },
                {
                    "required": ["prompt_tokens"],
                    "properties": {"work": {"type": "null"}, "prompt_tokens": {"type": "integer"}},
                },
            ]
        }
    ),
]
"""A RouteBody with the rule that it has either work or tokens."""


class ModelAnswer(Struct, frozen=True):
    """Which model the fleet serves, and how many tokens a prompt with its answer may have; None: not told."""

    model: str
    max_model_len: int | None


class LoadBalancerHealth(Struct, frozen=True):
    """That the loadbalancer runs, and how many instances it may give requests."""

    status: str
    hot: int


class LoadBalancerStatus(Struct, frozen=True):
    """The loadbalancer as an operator may see it; docs/http-api.md says what else is in it."""

    loadbalancer: str
    heard_of_autoscaler_s_ago: float | None
    autoscaler_problem: str | None
    model: str
    busy: float
    demand: float
    held: int
    routed: int
    refused: int
    ends: dict[str, int]
    instances: list[dict[str, Any]]


class RouteProblem(Problem, frozen=True, kw_only=True):
    """Why no lease was given, and in how many seconds it is worth asking again."""

    retry_after_s: float = 1.0


OPERATIONS = (
    Operation(
        "POST",
        "/route",
        "An instance's address and a single-use token for one request, or `count` of them.",
        "client",
        (LeaseAnswer, LeaseBatch),
        body=AskedRoute,
        told={429: RouteProblem, 503: RouteProblem},
    ),
    Operation(
        "POST", "/done", "Say how the request of a lease ended.", "client", dict[str, Any], body=DoneBody
    ),
    Operation("POST", "/pace", "Say how fast answers came.", "client", dict[str, Any], body=PaceBody),
    Operation(
        "POST",
        "/well",
        "Which of these instances answer nothing any more.",
        "client",
        WellAnswer,
        body=WellBody,
    ),
    Operation("GET", "/model", "The model that the fleet serves.", "client", ModelAnswer, errors=(503,)),
    Operation(
        "POST",
        "/report",
        "What has started and ended on an instance.",
        "instance",
        ReportTaken,
        body=PushedReport,
        errors=(409,),
    ),
    Operation(
        "PUT",
        "/hot",
        "The hot set, as the autoscaler tells it.",
        "our servers",
        HotSetTaken,
        body=HotSet,
    ),
    Operation("GET", "/status", "Every instance, with its work and tokens.", "operator", LoadBalancerStatus),
    Operation("GET", "/health", "Whether the loadbalancer runs.", "anyone", LoadBalancerHealth),
    Operation("GET", "/metrics", "Figures for Prometheus.", "operator", Page("text/plain")),
    Operation("GET", "/openapi.json", "This description.", "anyone", dict[str, Any]),
)
"""Every route of the loadbalancer; a test compares them with those that it answers."""
