"""The autoscaler's routes, as GET /openapi.json describes them."""

from typing import Any

from msgspec import Struct

from fleet.outside.by_hand import Act
from fleet.outside.page_routes import ENGINE_LOG, FROM, INSTANCE, MARKET, OF_POINTS, TO, WHAT_IF
from fleet.outside.what_if_runs import SIDES
from web.answers import Problem
from web.messages.busy import BusyAnswer, BusyReport
from web.messages.hot_set import HotSet
from web.messages.operator import BanBody, ManageBody, PolicyBody, WhatIfBody
from web.messages.reports import ReadyBody
from web.openapi import Operation, Page
from web.page_files import KINDS


class ToldReason(Struct, frozen=True):
    """One reason why the autoscaler cannot do its job: a word for programs, and a sentence."""

    reason: str
    message: str


class AutoscalerHealth(Struct, frozen=True):
    """That the autoscaler does its job; last_good_turn_age_s: seconds since its last turn that went well."""

    status: str
    last_good_turn_age_s: float


class NotWell(Problem, frozen=True, kw_only=True):
    """Why the autoscaler cannot do its job."""

    reasons: list[ToldReason]
    last_good_turn_age_s: float


class HoldRow(Struct, frozen=True):
    """Why nothing is rented (or started) although the policy wants more, since when, and how that ends."""

    kind: str
    sentence: str
    since: float
    held: str
    ends: str


class InstanceRow(Struct, frozen=True):
    """One instance of the fleet. since: epoch seconds; price_usd_h: what it costs now, running_usd_h: hot.

    contract_ends: epoch seconds, None where nobody says.
    """

    id: int | None
    label: str
    machine_id: int | None
    state: str
    since: float
    why: str
    gpu_name: str
    num_gpus: int
    price_usd_h: float
    running_usd_h: float
    stopped_usd_h: float
    contract_ends: float | None
    address: str | None
    ssh: str | None


class InstancesAnswer(Struct, frozen=True):
    """The instances of the fleet, those that went last, and whether anything is ordered at all."""

    instances: list[InstanceRow]
    gone: list[InstanceRow]
    manage: bool


class BannedMachine(Struct, frozen=True):
    """A machine that is not rented until that time (epoch seconds), and on what evidence."""

    machine: int
    until: float
    evidence: str


class DecisionRow(Struct, frozen=True):
    """One decision: what was seen and wanted, and the orders that came of it. at: epoch seconds."""

    at: float
    seen: dict[str, Any] | None
    targets: dict[str, Any] | None
    commands: list[dict[str, Any]]
    notes: list[str]


class DecisionsAnswer(Struct, frozen=True):
    """Decisions and failed orders, newest first, what is held back, and the machines that are not rented."""

    holds: list[HoldRow]
    bans: list[BannedMachine]
    failures: list[dict[str, Any]]
    decisions: list[DecisionRow]


class CostsAnswer(Struct, frozen=True, rename={"from_s": "from", "to_s": "to"}):
    """What the window cost (usd: by what it was spent on), and what is being spent now."""

    from_s: float
    to_s: float
    known_from: float | None
    unwritten: bool
    unwatched: list[list[float]]
    usd: dict[str, float]
    burn_usd_h: float
    committed_usd_h: float
    budget_left_usd_h: float
    budgets: dict[str, dict[str, Any]]
    credit: dict[str, float | None]
    forecast_today_usd: float
    price_increases: list[dict[str, Any]]
    reconciled: list[dict[str, Any]]
    traffic: list[dict[str, Any]]
    intervals: list[dict[str, Any]]


class OverviewAnswer(Struct, frozen=True):
    """What the operator's page shows of the present."""

    now: float
    fleet: dict[str, Any]
    health: dict[str, Any]
    manage: bool
    policy: dict[str, Any]
    instances: list[dict[str, Any]]
    holds: list[HoldRow]
    decisions: list[dict[str, Any]]
    money: dict[str, Any]


class EngineLogAnswer(Struct, frozen=True):
    """The last lines that an engine wrote before it was ready; ready: they end with its being so."""

    lines: list[str]
    ready: bool


class MarketAnswer(Struct, frozen=True):
    """Offers of the cloud, the cheapest for its work first.

    at: when it was asked. found: how many in all. refused: how many more the operator does not want, and why.
    """

    at: float
    found: int
    refused: dict[str, int]
    offers: list[dict[str, Any]]


class WhatIfAnswer(Struct, frozen=True):
    """The last question and its answer: state is none, running, done or failed.

    sides: now and then, the figures of the fleet as it is and as it was asked for.
    """

    state: str
    asked: dict[str, Any] = {}
    seconds: float = 0.0
    message: str = ""
    sides: dict[str, dict[str, Any]] = {}


class ActTaken(Struct, frozen=True):
    """That the order by hand is taken, with the instance's label."""

    instance: int
    label: str
    act: str


class BanTaken(Struct, frozen=True):
    """That the machine is not rented for so many hours."""

    machine: int
    banned_hours: float


class Forgiven(Struct, frozen=True):
    """That the machine may be rented again, and whether it was banned."""

    machine: int
    was_banned: bool


class ManageTaken(Struct, frozen=True):
    """Whether the autoscaler starts and stops instances from now on."""

    manage: bool


class PolicyTaken(Struct, frozen=True):
    """The policy from now on, with its parameters."""

    name: str
    params: dict[str, Any]


class ReadyTaken(Struct, frozen=True):
    """The label of the instance that said how far its model is."""

    label: str


FILES = tuple(
    Operation("GET", f"/page/{name}", "A file of the page.", "anyone", Page(kind))
    for name, kind in KINDS.items()
)

OPERATIONS = (
    Operation("GET", "/", "The operator's page.", "anyone", Page("text/html")),
    *FILES,
    Operation(
        "GET",
        "/health",
        "Whether the autoscaler can do its job.",
        "anyone",
        AutoscalerHealth,
        told={503: NotWell},
    ),
    Operation("GET", "/instances", "Every instance.", "operator", InstancesAnswer),
    Operation("GET", "/decisions", "What was seen, wanted and ordered.", "operator", DecisionsAnswer),
    Operation(
        "GET",
        "/costs",
        "Dollars by what they were spent on.",
        "operator",
        CostsAnswer,
        errors=(503,),
        query=(FROM, TO),
    ),
    Operation("GET", "/overview", "How things stand.", "operator", OverviewAnswer, errors=(503,)),
    Operation(
        "GET",
        "/history",
        "The fleet over time, as columns.",
        "operator",
        dict[str, Any],
        errors=(503,),
        query=(FROM, TO, OF_POINTS),
    ),
    Operation(
        "GET",
        ENGINE_LOG,
        "What an instance's engine wrote before it was ready.",
        "operator",
        EngineLogAnswer,
        errors=(404, 502),
        query=(INSTANCE,),
    ),
    Operation("GET", "/metrics", "Figures for Prometheus.", "operator", Page("text/plain"), errors=(503,)),
    Operation(
        "GET", "/policy/curve", "What each goal cost yesterday.", "operator", dict[str, Any], errors=(404,)
    ),
    Operation(
        "POST",
        "/instances/{instance_id}/{act}",
        "Drain, replace or destroy an instance.",
        "operator",
        ActTaken,
        errors=(409,),
        words={"act": tuple(Act)},
    ),
    Operation(
        "POST",
        "/machines/{machine_id}/ban",
        "Rent that machine no more for so many hours.",
        "operator",
        BanTaken,
        body=BanBody,
    ),
    Operation("POST", "/machines/{machine_id}/forgive", "Rent that machine again.", "operator", Forgiven),
    Operation(
        "PUT", "/manage", "Whether instances are ordered at all.", "operator", ManageTaken, body=ManageBody
    ),
    Operation("PUT", "/policy", "Policy and parameters.", "operator", PolicyTaken, body=PolicyBody),
    Operation("GET", "/hot", "The hot set.", "our servers", HotSet, errors=(503,)),
    Operation("POST", "/busy", "A loadbalancer's report.", "our servers", BusyAnswer, body=BusyReport),
    Operation(
        "POST",
        "/ready",
        "How far the model of an instance is.",
        "instance",
        ReadyTaken,
        body=ReadyBody,
        errors=(409, 429),
    ),
    Operation("GET", MARKET, "What can be rented now.", "operator", MarketAnswer, errors=(404, 502)),
    Operation(
        "POST",
        WHAT_IF,
        "Play the last day in virtual time, otherwise.",
        "operator",
        WhatIfAnswer,
        body=WhatIfBody,
        errors=(404, 409, 503),
    ),
    Operation("GET", WHAT_IF, "What came of the last question.", "operator", WhatIfAnswer),
    Operation(
        "GET",
        f"{WHAT_IF}/{{which}}.html",
        "The report of one run, as a page.",
        "operator",
        Page("text/html"),
        words={"which": SIDES},
    ),
    Operation("GET", "/openapi.json", "This description.", "anyone", dict[str, Any]),
)
"""Every route of the autoscaler; a test compares them with those that it answers."""
