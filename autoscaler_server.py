"""The autoscaler as a process: flags, Flask face, threads; and its errands, `prepare` and `destroy-fleet`.

python autoscaler_server.py [flags]                     serve: keep the fleet as the policy wants it
python autoscaler_server.py prepare --count N [flags]   rent N instances, load the model, stop them
python autoscaler_server.py destroy-fleet [flags]       end everything that carries the label, after asking
"""

import argparse
import asyncio
import fcntl
import logging
import math
import os
import re
import secrets
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from flask import Flask, Response, jsonify, request

import command_line
import http_face
import private_files
from autoscaler import Autoscaler, InstanceSet
from command_line import Parser, within
from demand import Demand, Report
from errors import CloudError, ConfigError
from fleet_keys import FleetKeys
from health import CheckOrder, HealthChecker
from instance_client import InstanceClient
from instance_messages import name_and_key, signer
from instance_states import Deadlines, Limits, State
from ledger import Ledger
from model_timing import told_timing
from orders import Command, LookForOffers, Performer
from policies import POLICIES, Fixed, Policy, make_policy, parse_params
from profiles import PROFILES, Profile, get_profile
from slo import Slo
from ssh_log import SshLog
from steady_clock import steady_clock
from tuner import NoCurve, Tuner
from vast import Vast, VastSettings, find_api_key

log = logging.getLogger("autoscaler")

GIVEN_UP = frozenset({State.FAILED, State.DESTROYING})

MAX_BUSY_BODY = 4 * 2**20
"""Bytes of a loadbalancer's report: 10,000 instances at up to 0.2 kB."""

SLOW_ROUTES = frozenset({"/costs", "/metrics"})
"""They read the whole ledger: in a thread, so that nothing else waits for it."""

HOT_PUSH_S = 0.25
"""How long a loadbalancer does not know of a changed hot set, at most; a passed check is told at once."""

CHECK_TICK_S = 0.25
"""How often it is looked which health checks are due, if nobody says that one is."""

MIN_TURN_S = 1.0
"""Between two listings, at least."""


@dataclass(frozen=True)
class Config:
    """Everything an operator may set. Times in seconds, money in dollars per hour."""

    model: str = "vllm-13"
    label: str = "fleet"  # instances are labelled <label>/<random>; nothing else is ever touched
    state_dir: Path | None = None  # keys, ledger, vastai configuration; default below ~/.local/state
    host: str = "127.0.0.1"
    port: int = 8100
    loadbalancer: tuple[str, ...] = ("http://127.0.0.1:8200",)
    manage: bool = True
    policy: str = "objective"
    policy_params: tuple[str, ...] = ()
    goal: float | None = None  # short for the policy that keeps it: the share of requests served in time
    replay_every_s: float = (
        1800.0  # from one replay of the last day to the next, which sets the level; 0: none
    )
    max_instances: int = 8  # hard limit, stopped ones counted
    max_dollars_per_hour: float = 10.0  # hard limit on what all orders together may cost
    poll_interval_s: float = 5.0  # one listing each; the CLI costs 0.5 s of processor a call
    check_hot_every_s: float = 15.0
    check_boot_every_s: float = 5.0
    check_timeout_s: float = 15.0  # for a whole health check, ssh and prompt together
    local: bool = False  # a localcloud instead of Vast.ai
    cloud_url: str = "http://127.0.0.1:8500"  # of the localcloud
    speedup: float = 1.0  # deadlines and policy times are divided by it; local cloud only
    operator_key_file: Path | None = None
    public_url: str | None = None  # of this server, as instances reach it: then they say when they are ready

    def make_policy(self) -> Policy:
        """The policy with its parameters; raises ConfigError."""
        params = parse_params("--policy-param", self.policy_params)
        if self.goal is None:
            return make_policy(POLICIES, self.policy, params, self.speedup)
        if "goal" in params:
            raise ConfigError("--goal and --policy-param goal=…: wanted one of them")
        return make_policy(POLICIES, "objective", params | {"goal": self.goal}, self.speedup)

    @property
    def ready_url(self) -> str | None:
        """Where an instance says that it is ready, if it can reach us at all."""
        if self.public_url is None and self.local:
            return f"http://127.0.0.1:{self.port}/ready"
        return None if self.public_url is None else f"{self.public_url}/ready"

    def checked(self) -> "Config":
        """Itself, or ConfigError naming the flag, the value and the range."""
        within("--port", self.port, 1, 65535)
        within("--max-instances", self.max_instances, 1, 10_000)
        within("--max-dollars-per-hour", self.max_dollars_per_hour, 0.0, 100_000.0)
        within("--poll-interval-s", self.poll_interval_s, 0.5, 600.0)
        within("--check-hot-every-s", self.check_hot_every_s, 0.5, 3600.0)
        within("--check-boot-every-s", self.check_boot_every_s, 0.5, 600.0)
        within("--check-timeout-s", self.check_timeout_s, 1.0, 300.0)
        within("--replay-every-s", self.replay_every_s, 0.0, 86_400.0)
        within("--speedup", self.speedup, 1.0, 10_000.0)
        if self.speedup != 1.0 and not self.local:
            raise ConfigError("--speedup is for --local only: real machines take their time")
        # Narrower than what the cloud allows, so that a label is one word in every message and command.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", self.label):
            raise ConfigError(f"--label {self.label!r}: wanted 1 to 64 of A-Z a-z 0-9 _ . -, first no . or -")
        for url in self.loadbalancer:
            if not _is_base_url(url):
                raise ConfigError(f"--loadbalancer {url!r}: wanted http://HOST:PORT")
        if self.public_url is not None and not _is_base_url(self.public_url):
            raise ConfigError(f"--public-url {self.public_url!r}: wanted http://HOST:PORT")
        return self


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return named and not (parts.path or parts.query or parts.fragment or parts.username)


def local_cloud_key(environ: Mapping[str, str], home: Path) -> str:
    """The key of the localcloud; ConfigError if there is none. Never the operator's Vast.ai key."""
    if key := environ.get("LOCALCLOUD_API_KEY", "").strip():
        return key
    state = Path(environ.get("XDG_STATE_HOME") or home / ".local" / "state")
    path = state / "autoscaler-py" / "localcloud" / "api.key"
    if not path.exists():
        raise ConfigError(
            f"no key of the local cloud in {path}: `python -m localcloud` makes it when it starts; "
            "for one with another --root set LOCALCLOUD_API_KEY"
        )
    keys = private_files.load_keys(path)
    if len(keys) != 1:
        raise ConfigError(f"key file {path}: wanted one key, got {len(keys)}")
    return next(iter(keys))


# -- the face --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Keys:
    """Who may call what: the control key is the loadbalancer's, the operator keys are the operator's.

    With no operator key the operator's routes are open; that is allowed on loopback only.
    """

    control: str
    operator: frozenset[str] = frozenset()


def create_app(
    scaler: Autoscaler,
    profile: Profile,
    keys: Keys,
    poll_interval_s: float,
    master_token: Callable[[str], str],
    nudge: Callable[[], None] = lambda: None,
    tuner: Tuner | None = None,
) -> Flask:
    """The routes of design section 4. Views fetch, check, act and answer; nothing is decided here.

    nudge: a health check has become due. tuner: whom to ask for the curve, and to tell of a new policy.
    """
    app = http_face.make_app("autoscaler", large_bodies={"/busy": MAX_BUSY_BODY})
    control = http_face.requires(lambda: frozenset({keys.control}))
    operator = http_face.requires(lambda: keys.operator and keys.operator | {keys.control})
    started = scaler.clock()

    @app.get("/health")
    def health() -> tuple[Response, int]:
        last = scaler.last_good_turn
        age = scaler.clock() - (started if last is None else last)
        if age <= max(60.0, 5 * poll_interval_s) and (last is not None):
            return jsonify(status="ok", last_good_turn_age_s=round(age, 1)), 200
        return (
            jsonify(
                error="no_good_turn",
                message=f"no listing worked for {age:.0f} s: {scaler.last_error}",
                last_good_turn_age_s=round(age, 1),
            ),
            503,
        )

    @app.get("/instances")
    @operator
    def instances() -> Response:
        with scaler.lock:
            now, manage = scaler.clock(), scaler.fleet.manage
            there, gone = scaler.fleet.describe(now), scaler.fleet.describe_gone(now)
        return jsonify(instances=there, gone=gone, manage=manage)

    @app.get("/hot")
    @control
    def hot() -> tuple[Response, int]:
        answer = hot_set(scaler, profile, master_token)
        if answer is None:
            return jsonify(error="not_ready", message="the fleet is not known yet: just started"), 503
        return jsonify(answer), 200

    @app.post("/busy")
    @control
    def busy() -> Response:
        said = http_face.check_fields(http_face.json_body(MAX_BUSY_BODY), _BUSY)
        report, measured = parse_report(said)
        scaler.heard(report, measured)
        with scaler.lock:
            version, expected_s = scaler.fleet.version, scaler.fleet.expected_hot_s(scaler.clock())
        return jsonify(hot_epoch=scaler.epoch, hot_version=version, expected_hot_s=expected_s)

    @app.post("/ready")
    def ready() -> Response:
        raw = request.get_data(cache=False)
        with scaler.lock:
            labels = list(scaler.fleet.instances)
        names, label_of = {}, {}
        for one in labels:
            name, names[name] = name_and_key(master_token(one))
            label_of[name] = one
        said_by = signer(request.headers.get("Authorization"), "/ready", raw, names)
        if said_by is None:
            return http_face.error(401, "unauthorized", "wanted the signature of an instance of the fleet")
        label = label_of[said_by]
        said = http_face.check_fields(http_face.parse_json(raw), _READY)
        why = f"{said['state']}: {said['why']}" if said.get("why") else said["state"]
        if not scaler.told(label, said["boot_id"], said["number"], why):
            return http_face.error(409, "heard_before", "this message, or one after it, was heard before")
        log.info("%s says: %s", label, why)
        nudge()
        return jsonify(label=label)

    @app.get("/decisions")
    @operator
    def decisions() -> Response:
        with scaler.lock:
            found, failures = list(scaler.decisions), list(scaler.failures)
        return jsonify(
            failures=[
                {"at": f.at, **_shown(f.command), "reply": f.reply, "why": f.why} for f in failures[::-1]
            ],
            decisions=[
                {
                    "at": d.at,
                    "seen": d.seen
                    and {k: v for k, v in asdict(d.seen).items() if k not in ("demand", "arriving")}
                    | {"demand": d.seen.demand[-1][1] if d.seen.demand else 0.0},
                    "targets": d.targets and asdict(d.targets),
                    "commands": [_shown(c) | {"why": c.why} for c in d.commands],
                    "notes": d.notes,
                }
                for d in found[::-1]
            ],
        )

    @app.get("/costs")
    @operator
    def costs() -> Response:
        now = scaler.clock()
        from_s = http_face.query_number("from", 0.0, 0.0, 1e12)
        to_s = min(now, http_face.query_number("to", now, 0.0, 1e12))
        return jsonify(cost_answer(scaler, from_s, to_s))

    @app.put("/manage")
    @operator
    def manage() -> Response:
        wanted = http_face.body({"manage": http_face.Boolean()})["manage"]
        with scaler.lock:
            scaler.fleet.manage = wanted
        log.info("manage is now %s", wanted)
        return jsonify(manage=wanted)

    @app.put("/policy")
    @operator
    def policy() -> Response:
        wanted = http_face.body({"name": http_face.Text(1, 64), "params": http_face.Mapping(optional=True)})
        try:
            params = wanted.get("params") or {}
            made = make_policy(POLICIES, wanted["name"], params, scaler.fleet.speedup)
        except ConfigError as e:
            raise http_face.BadField("name" if "unknown policy" in str(e) else "params", str(e)) from e
        with scaler.lock:
            scaler.policy = made
        log.info("policy is now %r", made)
        if tuner is not None:
            tuner.policy_was_set()
        fields = asdict(made)  # type: ignore[call-overload]
        return jsonify(name=wanted["name"], params={k: v for k, v in fields.items() if math.isfinite(v)})

    @app.get("/policy/curve")
    @operator
    def policy_curve() -> Response:
        if tuner is None:
            return http_face.error(404, "no_curve", "this process makes no replays")
        try:
            return jsonify(tuner.curve())
        except NoCurve as e:
            return http_face.error(404, "no_curve", str(e))

    @app.get("/metrics")
    @operator
    def metrics() -> Response:
        return Response(metrics_text(scaler), mimetype="text/plain; version=0.0.4")

    return app


def _shown(command: Command) -> dict[str, str]:
    """An order for people."""
    shown = {"do": type(command).__name__.lower()}
    return shown if isinstance(command, LookForOffers) else shown | {"label": command.label}


_READY: dict[str, Any] = {
    "state": http_face.Choice(("loading", "ready", "failed")),
    "why": http_face.Text(0, 300, optional=True),
    "boot_id": http_face.Text(1, 64),
    "number": http_face.Whole(0, 2**63),
}

_BUSY: dict[str, Any] = {
    "loadbalancer": http_face.Text(1, 64),
    "hot_epoch": http_face.Text(0, 64, optional=True),
    "hot_version": http_face.Whole(0, 2**53, optional=True),
    "busy": http_face.Number(0.0, 1e6),
    "demand": http_face.Number(0.0, 1e6),
    "held": http_face.Whole(0, 10**9),
    "held_work": http_face.Number(0.0, 1e15),
    "arrivals": http_face.Whole(0, 2**53),
    "arrived_work": http_face.Number(0.0, 1e18),
    "instances": http_face.Mapping(),
    "traffic": http_face.Mapping(optional=True),  # an older loadbalancer does not send it
}

_TRAFFIC: dict[str, Any] = {
    "prompt_tokens": http_face.Whole(0, 2**53),
    "output_tokens": http_face.Number(0.0, 1e18),
    "in_flight": http_face.Whole(0, 10**9),
    "late": http_face.Whole(0, 10**9),
    "held_prompt_tokens": http_face.Whole(0, 2**53),
    "oldest_wait_s": http_face.Number(0.0, 1e9),
    "turned_late": http_face.Whole(0, 2**53),
    "first_token_s": http_face.Number(1e-3, 3600.0),
    "prompt_token_s": http_face.Number(0.0, 1.0),
    "late_bound_s": http_face.Number(0.0, 86_400.0, optional=True),
}

_BUSY_INSTANCE: dict[str, Any] = {
    "unfinished": http_face.Whole(0, 10**9),
    "work": http_face.Number(0.0, 1e15),
    "working_s": http_face.Number(0.0, 1e12),
    "throughput_work_s": http_face.Number(0.0, 1e9),
    "failures": http_face.Whole(0, 2**53),
}


def parse_report(said: Mapping[str, Any]) -> tuple[Report, dict[int, float]]:
    """A checked `POST /busy` body as a Report, and the measured work per second by instance id."""
    unfinished: dict[int, int] = {}
    working: dict[int, float] = {}
    failures: dict[int, int] = {}
    measured: dict[int, float] = {}
    for key, one in said["instances"].items():
        if not re.fullmatch(r"[0-9]{1,16}", key):
            raise http_face.BadField("instances", f"wanted ids of instances as keys, got {key[:60]!r}")
        instance_id, told = int(key), http_face.check_fields(one, _BUSY_INSTANCE, f"instances.{key}.")
        unfinished[instance_id] = told["unfinished"]
        working[instance_id] = told["working_s"]
        failures[instance_id] = told["failures"]
        if told["throughput_work_s"] > 0.0:
            measured[instance_id] = told["throughput_work_s"]
    traffic: Mapping[str, Any] = {}
    if said.get("traffic") is not None:
        traffic = http_face.check_fields(said["traffic"], _TRAFFIC, "traffic.")
    report = Report(
        loadbalancer=said["loadbalancer"],
        hot_epoch=said.get("hot_epoch"),
        hot_version=said.get("hot_version"),
        busy=said["busy"],
        demand=said["demand"],
        held=said["held"],
        arrivals=said["arrivals"],
        arrived_work=said["arrived_work"],
        unfinished=unfinished,
        working_s=working,
        failures=failures,
        held_work=said["held_work"],
        arrived_prompt_tokens=traffic.get("prompt_tokens", 0),
        arrived_output_tokens=traffic.get("output_tokens", 0.0),
        in_flight=traffic.get("in_flight", sum(unfinished.values())),
        late=traffic.get("late", 0),
        held_prompt_tokens=traffic.get("held_prompt_tokens", 0),
        oldest_wait_s=traffic.get("oldest_wait_s", 0.0),
        turned_late=traffic.get("turned_late", 0),
        slo=Slo(traffic["first_token_s"], traffic["prompt_token_s"]) if traffic else Slo(),
        late_bound_s=traffic.get("late_bound_s"),
    )
    return report, measured


def hot_set(
    scaler: Autoscaler, profile: Profile, master_token: Callable[[str], str]
) -> dict[str, Any] | None:
    """What a loadbalancer must know, or None while the fleet is not known yet. Secrets are in it."""
    now = scaler.clock()
    with scaler.lock:
        if not scaler.fleet.knows_fleet():
            return None
        serving = [replace(i) for i in scaler.fleet.serving()]
        version, expected = scaler.fleet.version, scaler.fleet.expected_hot_s(now)
    return {
        "epoch": scaler.epoch,
        "version": version,
        "model": profile.name,
        "prefill_weight": profile.prefill_weight,
        "expected_output_tokens": profile.expected_output_tokens,
        "expected_hot_s": expected,
        "instances": [
            {
                "id": i.id,
                "state": str(i.state),
                "address": i.address,
                "auth_url": i.auth_url,
                "certificate": i.certificate,
                "master_token": master_token(i.label),
                "throughput_work_s": i.throughput_work_s,
                "capacity_work": profile.throughput_on(i.gpu_name, i.num_gpus) * profile.hold_s,
                "timing": told_timing(profile.name, i.gpu_name, i.num_gpus),
            }
            for i in serving
        ],
    }


def cost_answer(scaler: Autoscaler, from_s: float, to_s: float) -> dict[str, Any]:
    """`GET /costs`: dollars of the window, the stretches behind them, and what is being spent now."""
    scaler.write_counts()
    costs = scaler.ledger.costs(from_s, to_s)
    took = scaler.ledger.took(from_s, to_s)
    with scaler.lock:
        burn = sum(i.price_usd_h for i in scaler.fleet.instances.values())
        committed = scaler.fleet.committed_usd_h()
        limit = scaler.fleet.limits.max_usd_h

    def count(kind: str) -> int:
        return sum(k == kind for k, _, _ in took)

    return {
        "from": from_s,
        "to": to_s,
        "usd": {
            "total": costs.total,
            "hot_working": costs.hot_working,
            "hot_idle": costs.hot_idle,
            "loading": costs.loading,
            "stopped": costs.stopped,
            "lost": costs.lost,
        },
        "usd_if_all_hot": costs.usd_if_all_hot,
        "utilisation": costs.utilisation,
        "burn_usd_h": burn,
        "committed_usd_h": committed,
        "budget_left_usd_h": limit - committed,
        "starts": count("start"),
        "stops": count("stop"),
        "creates": count("create"),
        "destroys": count("destroyed"),
        "order_to_hot_s": [round(s, 3) for kind, _, s in took if kind in ("boot", "load")],
        "intervals": [
            {
                "instance": s.instance,
                "label": s.label,
                "machine": s.machine,
                "state": s.state,
                "from": s.from_s,
                "to": s.to_s,
                "usd_h": s.usd_h,
                "usd": s.usd_h * s.seconds_within(from_s, to_s) / 3600.0,
                "why": s.why,
            }
            for s in costs.stretches
        ],
    }


def metrics_text(scaler: Autoscaler) -> str:
    """Prometheus text: instances by state, demand, busy, burn rate, dollars so far, age of the last turn."""
    now = scaler.clock()
    scaler.write_counts()
    costs = scaler.ledger.costs(0.0, now, with_stretches=False)
    with scaler.lock:
        states = dict.fromkeys(State, 0)
        for i in scaler.fleet.instances.values():
            states[i.state] += 1
        burn = sum(i.price_usd_h for i in scaler.fleet.instances.values())
        demand, busy, held = scaler.demand.demand, scaler.demand.busy, scaler.demand.held
        arrivals = scaler.demand.arrivals
    lines = ["# TYPE autoscaler_instances gauge"]
    lines += [f'autoscaler_instances{{state="{s}"}} {n}' for s, n in states.items()]
    single: list[tuple[str, str, float]] = [
        ("autoscaler_demand_instances", "gauge", demand),
        ("autoscaler_busy_instances", "gauge", busy),
        ("autoscaler_held_requests", "gauge", held),
        ("autoscaler_arrivals_total", "counter", arrivals),
        ("autoscaler_burn_usd_per_hour", "gauge", burn),
        ("autoscaler_last_good_turn_age_seconds", "gauge", now - (scaler.last_good_turn or 0.0)),
    ]
    for name, kind, value in single:
        lines += [f"# TYPE {name} {kind}", f"{name} {value:.9g}"]
    lines.append("# TYPE autoscaler_spent_usd_total counter")
    for kind in ("hot_working", "hot_idle", "loading", "stopped", "lost"):
        lines.append(f'autoscaler_spent_usd_total{{on="{kind}"}} {getattr(costs, kind):.9g}')
    return "\n".join(lines) + "\n"


# --- outside world ---------------------------------------------------------------------------------


class Bell:
    """Wakes those of one event loop who wait for it. Ring it in that loop."""

    def __init__(self) -> None:
        """Nobody waits."""
        self._waiting: set[asyncio.Future[None]] = set()

    def ring(self) -> None:
        """All who wait go on."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self, timeout_s: float) -> None:
        """Until it rings, or for so long."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await asyncio.wait((future,), timeout=timeout_s)
        finally:
            self._waiting.discard(future)


class Process:
    """One autoscaler process: its state directory (locked), its keys, its ledger and its threads."""

    def __init__(self, config: Config, *, told_nobody: bool = False, policy: Policy | None = None) -> None:
        """Open everything; raises ConfigError when something an operator must mend is wrong."""
        self.config = config.checked()
        self.profile = get_profile(config.model)
        self.state_dir = config.state_dir or private_files.default_state_dir(config.label)
        private_files.make_private_dir(self.state_dir)
        self._lock_file = _only_one(self.state_dir / "autoscaler.lock")
        self.keys = FleetKeys(self.state_dir)
        find_key = local_cloud_key if config.local else find_api_key
        self.vast = Vast(
            VastSettings(
                url=config.cloud_url if config.local else None,
                api_key=find_key(os.environ, Path.home()),
                local=config.local,
                state_dir=self.state_dir,
                speedup=config.speedup,
            )
        )
        try:
            self.ledger = Ledger(self.state_dir / "ledger.sqlite")
        except (sqlite3.Error, OSError) as e:
            raise ConfigError(f"{self.state_dir / 'ledger.sqlite'} cannot be used: {e}") from e
        clock = steady_clock()
        demand = Demand(secrets.token_hex(8), told_nobody=told_nobody, began=clock())
        fleet = InstanceSet(
            config.label,
            self.profile,
            Limits(config.max_instances, config.max_dollars_per_hour),
            Deadlines.for_profile(self.profile, config.speedup),
            config.speedup,
            config.check_hot_every_s,
            config.check_boot_every_s,
        )
        fleet.manage = config.manage
        self.scaler = Autoscaler(
            fleet,
            policy or config.make_policy(),
            demand,
            self.vast,
            Performer(self.vast, self.profile, self.keys.master_token, config.ready_url),
            self.ledger,
            clock,
        )
        self.tuner = Tuner(self.scaler, self.state_dir, config.replay_every_s)
        self.due, self.hot_changed = Bell(), Bell()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def check_account(self) -> None:
        """The key works and the account has our ssh key; raises ConfigError."""
        try:
            self.vast.check_key()
            self.vast.register_ssh_key(self.keys.ssh_public_key)
        except CloudError as e:
            raise ConfigError(f"the cloud cannot be used: {e}") from e

    def start(self) -> None:
        """Start the turn thread, the one that sends orders and the one that tunes the policy."""
        for target in (self._run_turns, self._run_orders, self.tuner.run):
            thread = threading.Thread(target=target, name=target.__qualname__, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Stop ordering. What was begun and not sent is in the ledger: the next process goes on from it."""
        self._stop.set()
        self.scaler.look.set()
        self.scaler.stop_performing()
        self.tuner.stop()
        for thread in self._threads:
            thread.join(timeout=30.0)
        try:
            self.scaler.write_counts()
        except sqlite3.Error:
            log.exception("the arrivals of the last seconds are lost")

    def start_health_checks(self) -> None:
        """Make them on a thread of their own until `stop`, where there is no server's loop for them."""

        async def until_stopped() -> None:
            while not self._stop.is_set():
                task = asyncio.create_task(self.run_health_checks())
                while not self._stop.is_set() and not task.done():
                    await asyncio.sleep(0.1)
                task.cancel()
                (error,) = await asyncio.gather(task, return_exceptions=True)
                if not self._stop.is_set():
                    log.error("health checks failed, they start again", exc_info=error)
                    await asyncio.sleep(1.0)

        thread = threading.Thread(target=lambda: asyncio.run(until_stopped()), name="health", daemon=True)
        thread.start()
        self._threads.append(thread)

    def close(self) -> None:
        """Let go of the ledger and the state directory."""
        self.ledger.close()
        os.close(self._lock_file)

    def _run_turns(self) -> None:
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                self.scaler.turn()
            except Exception as e:  # the loop must live: what it does not do now it does next turn
                self.scaler.last_error = f"a turn failed: {type(e).__name__}: {e}"
                log.exception("a turn failed")
            # An instance that speaks up before the listing showed it makes us look, but not without a pause.
            self._stop.wait(min(MIN_TURN_S, self.config.poll_interval_s))
            self.scaler.look.wait(max(0.0, self.config.poll_interval_s - (time.monotonic() - begun)))
            self.scaler.look.clear()

    def _run_orders(self) -> None:
        while True:
            try:
                if not self.scaler.perform_next():
                    return
            except Exception:
                log.exception("an order failed; the listing will show what became of it")

    async def run_health_checks(self) -> None:
        """Make the checks that are due, all at once; never returns."""
        async with InstanceClient() as client:
            checker = HealthChecker(
                client,
                SshLog(self.keys.ssh_key, self.ledger.remember_host_key),
                self.keys.master_token,
                self.profile.name,
                self.config.check_timeout_s,
                self.scaler.clock,
            )
            running: dict[str, asyncio.Task[None]] = {}

            async def one(order: CheckOrder) -> None:
                try:
                    check = await checker.check(order)
                    await asyncio.get_running_loop().run_in_executor(None, self.scaler.judge, check)
                except sqlite3.Error:
                    log.exception("what a health check changed is not written down yet")
                finally:
                    del running[order.label]
                    self.due.ring()
                    self.hot_changed.ring()

            try:
                while True:
                    # One at a time of each: a machine that hangs would gather more and more of them.
                    for order in self.scaler.checks_due(running.keys()):
                        running[order.label] = asyncio.create_task(one(order))
                    await self.due.wait(CHECK_TICK_S)
            finally:
                tasks = list(running.values())
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def run_hot_push(self) -> None:
        """Tell the loadbalancers of a changed hot set at once; they also ask by themselves."""
        key = private_files.load_or_make_key(self.state_dir / "control.key")
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=3.0),
            trust_env=False,
            headers={"Authorization": f"Bearer {key}"},
        ) as session:
            await asyncio.gather(*(self._push_hot(session, url) for url in self.config.loadbalancer))

    async def _push_hot(self, session: aiohttp.ClientSession, url: str) -> None:
        told: int | None = None
        complaint: str | None = None
        while True:
            answer = None
            if told != self.scaler.fleet.version:
                answer = hot_set(self.scaler, self.profile, self.keys.master_token)
            if answer is not None:
                trouble: str | None = None
                try:
                    async with session.put(f"{url}/hot", json=answer, allow_redirects=False) as reply:
                        if reply.status == 200:
                            told = answer["version"]
                        else:
                            trouble = f"refused the hot set: {reply.status}"
                except (aiohttp.ClientError, TimeoutError, OSError) as e:
                    trouble = f"is not there: {type(e).__name__}"
                if trouble is not None and trouble != complaint:
                    log.warning("loadbalancer %s %s; it will ask when it can", url, trouble)
                complaint = trouble
            await self.hot_changed.wait(HOT_PUSH_S)


def _only_one(path: Path) -> int:
    """Hold the lock of a state directory; two autoscalers on one fleet would undo each other's orders."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise ConfigError(f"another autoscaler runs on {path.parent}: stop it first") from None
    return fd


def serve(config: Config) -> None:
    """Run until SIGTERM or Ctrl-C. The fleet goes on running: it is found again at the next start."""
    operator_keys = private_files.load_keys(config.operator_key_file)
    http_face.check_bind(config.host, config.port, keys_present=bool(operator_keys))
    sock = http_face.bind_socket(config.host, config.port)
    process = Process(config)
    keys = Keys(private_files.load_or_make_key(process.state_dir / "control.key"), operator_keys)
    process.check_account()
    app = create_app(
        process.scaler,
        process.profile,
        keys,
        config.poll_interval_s,
        process.keys.master_token,
        process.due.ring,
        process.tuner,
    )
    log.info(
        "autoscaler of fleet %s (%s) on http://%s:%d", config.label, config.model, config.host, config.port
    )
    process.start()
    try:
        http_face.serve(
            app,
            sock,
            background=[process.run_health_checks, process.run_hot_push],
            blocking=SLOW_ROUTES,
            any_host=bool(operator_keys),
        )
    finally:
        process.stop()
        process.close()


def prepare(config: Config, count: int) -> None:
    """Rent count instances, wait until each has loaded the model, stop them. Progress goes to stdout.

    It is the ordinary loop with a policy that wants them in all but not hot. What an interrupted run left
    half done counts among the new ones. Ctrl-C leaves nothing unlabelled and says what is still rented.
    """
    within("--count", count, 1, config.max_instances)
    process = Process(replace(config, manage=True), told_nobody=True, policy=Fixed(0, 0))
    try:
        process.check_account()
        process.scaler.fleet.manage = False  # until it is known what is there
        process.start()
        process.start_health_checks()
        _prepare(process, count)
    except KeyboardInterrupt:
        print("\ninterrupted: waiting for the order under way", flush=True)
        process.stop()
        fleet = process.scaler.fleet
        with process.scaler.lock:
            rented = [f"{i.id or 'ordered'} ({i.label}) {i.state}" for i in fleet.instances.values()]
        print(f"Still rented, all labelled {config.label}/…: {', '.join(rented) or 'nothing'}")
        print(
            "`python autoscaler_server.py destroy-fleet` ends them; `prepare` or an autoscaler goes on.",
            flush=True,
        )
        raise SystemExit(130) from None
    finally:
        process.stop()
        process.close()


def _prepare(process: Process, count: int) -> None:
    fleet = process.scaler.fleet
    wanted = kept_hot = 0
    shown = ""
    while True:
        time.sleep(0.5)
        with process.scaler.lock:
            if not fleet.knows_fleet():
                continue
            seen = fleet.see(process.scaler.demand, process.scaler.clock())
            if not wanted:
                # What is hot already stays hot, what is loaded stays loaded.
                loaded = sum(i.loaded and i.state not in GIVEN_UP for i in fleet.instances.values())
                wanted, kept_hot = loaded + count, seen.hot
                if wanted > fleet.limits.max_instances:
                    raise ConfigError(
                        f"--count {count}: {loaded} are loaded already, and --max-instances is "
                        f"{fleet.limits.max_instances}"
                    )
                process.scaler.policy = Fixed(kept_hot, max(wanted, seen.total))
                fleet.manage = True
            states: dict[str, int] = {}
            for i in fleet.instances.values():
                states[i.state] = states.get(i.state, 0) + 1
            notes = process.scaler.decisions[-1].notes if process.scaler.decisions else ()
            cold = sum(i.state is State.COLD and i.loaded for i in fleet.instances.values())
            # A new one is hot for a moment before it is stopped: it is not ready before that.
            ready = cold + min(kept_hot, seen.hot)
        line = ", ".join(f"{n} {state}" for state, n in sorted(states.items())) or "nothing rented yet"
        line = f"prepared {min(ready, wanted)} of {wanted}: {line}" + "".join(f" ({n})" for n in notes)
        if line != shown:
            print(line, flush=True)
            shown = line
        if ready >= wanted:
            print(f"{cold} instances are stopped with {process.config.model} on their disks.", flush=True)
            return


def destroy_fleet(config: Config, *, ask: Callable[[str], str] | None) -> None:
    """End every instance that carries the label, and see that none is left. ask None: do not ask."""
    process = Process(replace(config, manage=False), told_nobody=True, policy=Fixed(0, 0))
    try:
        process.check_account()
        _destroy_fleet(process, ask)
    except KeyboardInterrupt:
        print("\ninterrupted: run destroy-fleet again to be sure that nothing is left", flush=True)
        raise SystemExit(130) from None
    finally:
        process.stop()
        process.close()


def _destroy_fleet(process: Process, ask: Callable[[str], str] | None) -> None:
    scaler, label = process.scaler, process.config.label
    try:
        rows = process.vast.list_instances(label + "/")
    except CloudError as e:
        raise ConfigError(f"the cloud cannot be used: {e}") from e
    if not rows:
        print(f"nothing is rented with the label {label}/…", flush=True)
    elif ask is not None:
        for r in rows:
            print(f"  {r.id}  {r.label}  {r.gpu_name}  {r.actual_status}  {r.price_now_usd_h:.3f} $/h")
        try:
            answer = ask(f"destroy these {len(rows)} instances and their disks? [y/N] ")
        except EOFError:
            raise ConfigError("destroy-fleet asks before it destroys: answer, or give --yes") from None
        if answer.strip().lower() not in ("y", "yes"):
            print("nothing was destroyed", flush=True)
            return
    with scaler.lock:
        scaler.fleet.observe(rows, (), scaler.clock())  # a later listing that lacks them hides none
    shown = ""
    process.start()
    while True:
        scaler.destroy_all("destroy-fleet")
        with scaler.lock:
            left = [f"{i.id or 'ordered'} {i.state}" for i in scaler.fleet.instances.values()]
        if not left and _lists_none(process):
            print(f"destroyed: {len(rows)} instances; the listing shows none any more", flush=True)
            return
        line = f"{len(left)} left: {', '.join(left)}"
        if left and line != shown:
            print(line, flush=True)
            shown = line
        time.sleep(0.5)


def _lists_none(process: Process) -> bool:
    """Whether the cloud says itself that nothing of the fleet is left."""
    try:
        return not process.vast.list_instances(process.config.label + "/")
    except CloudError as e:
        log.warning("is anything left? %s", e)
        return False


def _parser() -> argparse.ArgumentParser:
    d = Config()
    common = Parser(add_help=False)
    add = common.add_argument
    add(
        "--model",
        default=d.model,
        metavar="NAME",
        help=f"profile, one of {', '.join(PROFILES)} (default %(default)s)",
    )
    add("--label", default=d.label, help="of the fleet's instances, LABEL/… (default %(default)s)")
    add(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="keys and ledger (default ~/.local/state/autoscaler-py/LABEL)",
    )
    add("--local", action="store_true", help="a localcloud instead of Vast.ai (default: Vast.ai)")
    add(
        "--public-url",
        metavar="URL",
        help="this server as instances reach it, so that they say when they are ready (default: none)",
    )
    add("--cloud-url", default=d.cloud_url, metavar="URL", help="the localcloud (default %(default)s)")
    for flag, kind, unit, text in (
        ("--speedup", float, "X", "of the localcloud, a factor: divides deadlines"),
        ("--max-instances", int, "N", "hard limit on instances, stopped ones counted"),
        ("--max-dollars-per-hour", float, "USD", "hard limit on all orders together, $/h"),
        ("--poll-interval-s", float, "S", "seconds between listings"),
        ("--check-hot-every-s", float, "S", "seconds between test prompts to a hot instance"),
        ("--check-boot-every-s", float, "S", "seconds between checks of a booting or draining instance"),
        ("--check-timeout-s", float, "S", "seconds for one health check in all"),
    ):
        default = getattr(d, flag[2:].replace("-", "_"))
        add(flag, type=kind, default=default, metavar=unit, help=f"{text} (default %(default)g)")
    parser = Parser(prog="autoscaler_server.py", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve_it = commands.add_parser(
        "serve",
        parents=[common],
        description="Keep the fleet as the policy wants it. This is what runs without a command.",
        epilog="Other commands: prepare, destroy-fleet; each has a --help of its own.",
        help="keep the fleet as the policy wants it (default)",
    )
    serve_it.add_argument("--host", default=d.host, help="address to listen on (default %(default)s)")
    serve_it.add_argument("--port", type=int, default=d.port, help="port to listen on (default %(default)d)")
    serve_it.add_argument(
        "--loadbalancer",
        action="append",
        metavar="URL",
        help=f"whom to tell of the hot set; may be repeated (default {d.loadbalancer[0]})",
    )
    serve_it.add_argument(
        "--manage",
        action=argparse.BooleanOptionalAction,
        default=d.manage,
        help="start, stop, create and destroy instances, or only watch them (default --manage)",
    )
    serve_it.add_argument("--policy", metavar="NAME", help=f"{', '.join(POLICIES)} (default {d.policy})")
    serve_it.add_argument(
        "--policy-param",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="a parameter of the policy; may be repeated (default: the policy's own)",
    )
    serve_it.add_argument(
        "--goal",
        type=float,
        metavar="SHARE",
        help="short for --policy objective --policy-param goal=SHARE: of the requests so many shall be in "
        "time, as 0.99 (default: none)",
    )
    serve_it.add_argument(
        "--replay-every-s",
        type=float,
        default=d.replay_every_s,
        metavar="S",
        help="seconds from one replay of the last day, which sets the level of a policy with a goal, to the "
        "next; 0: none (default %(default)g)",
    )
    serve_it.add_argument(
        "--operator-key-file",
        "--operator-key",
        type=Path,
        metavar="FILE",
        help="keys of the operator's routes, one a line, mode 0600; needed off loopback (default: none)",
    )
    prepare_it = commands.add_parser("prepare", parents=[common], help="rent, load the model, stop")
    prepare_it.add_argument(
        "--count", type=int, required=True, metavar="N", help="how many loaded instances to add (no default)"
    )
    destroy_it = commands.add_parser("destroy-fleet", parents=[common], help="end all that carries the label")
    destroy_it.add_argument("--yes", action="store_true", help="do not ask (default: ask)")
    return parser


def _config(args: argparse.Namespace) -> Config:
    given = vars(args)
    names = Config.__dataclass_fields__
    chosen = {k: v for k, v in given.items() if k in names and v is not None and k != "loadbalancer"}
    if given.get("loadbalancer"):
        chosen["loadbalancer"] = tuple(given["loadbalancer"])
    if given.get("goal") is not None and given.get("policy") not in (None, "objective"):
        raise ConfigError(f"--goal and --policy {given['policy']}: only objective has a goal")
    if given.get("policy_param"):
        chosen["policy_params"] = tuple(given["policy_param"])
    return Config(**chosen)


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and run; `serve` is the default command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0].startswith("-"):
        argv.insert(0, "serve")
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    config = _config(args)
    if args.command == "prepare":
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        prepare(config, args.count)
    elif args.command == "destroy-fleet":
        destroy_fleet(config, ask=None if args.yes else input)
    else:
        serve(config)


if __name__ == "__main__":
    command_line.run_main(main)
