"""The autoscaler as a process: flags, Flask face, threads; and its errands, `prepare` and `destroy-fleet`.

python autoscaler_server.py [flags]                     serve: keep the fleet as the policy wants it
python autoscaler_server.py prepare --count N [flags]   rent N instances, load the model, stop them
python autoscaler_server.py destroy-fleet [flags]       end everything that carries the label, after asking
"""

import argparse
import logging
import math
import re
import signal
import sys
from collections.abc import Callable
from collections.abc import Mapping as MappingType
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flask import Flask, Response, jsonify, request

from engine.profiles import PROFILES, Profile
from engine.slo import Slo
from fleet.commands import Command, LookForOffers
from fleet.demand import Report
from fleet.outside.destroy_fleet import destroy_fleet
from fleet.outside.prepare import prepare
from fleet.outside.process import AutoscalerConfig, AutoscalerProcess, hot_set
from fleet.outside.tuner import NoCurve, Tuner
from fleet.outside.turns import Autoscaler
from fleet.states import State
from fleet_client import flags, private_files
from fleet_client.flags import Parser
from fleet_client.listening import bind_socket, check_bind
from policies import POLICIES, make_policy
from process.errors import ConfigError
from web.answers import error
from web.app import make_app, requires
from web.bodies import (
    Boolean,
    Choice,
    Mapping,
    Number,
    Text,
    Whole,
    body,
    check_fields,
    json_body,
    parse_json,
    query_number,
)
from web.bridge import serve_flask
from web.messages.decoding import BadField
from web.signatures import name_and_key, signer

log = logging.getLogger("autoscaler")

MAX_BUSY_BODY = 4 * 2**20
"""Bytes of a loadbalancer's report: 10,000 instances at up to 0.2 kB."""

REPLAY = (sys.executable, "-m", "simulation.virtual.replay")
"""What replays the fleet's last day for the tuner, in a process of its own."""

SLOW_ROUTES = frozenset({"/costs", "/metrics"})
"""They read the whole ledger: in a thread, so that nothing else waits for it."""


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
    app = make_app("autoscaler", large_bodies={"/busy": MAX_BUSY_BODY})
    control = requires(lambda: frozenset({keys.control}))
    operator = requires(lambda: keys.operator and keys.operator | {keys.control})
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
            now, manage = scaler.clock(), scaler.instances.manage
            there, gone = scaler.instances.describe(now), scaler.instances.describe_gone(now)
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
        said = check_fields(json_body(MAX_BUSY_BODY), _BUSY)
        report, measured = parse_report(said)
        scaler.record_report(report, measured)
        with scaler.lock:
            version, expected_s = (
                scaler.instances.hot_version,
                scaler.instances.expected_hot_s(scaler.clock()),
            )
        return jsonify(hot_epoch=scaler.epoch, hot_version=version, expected_hot_s=expected_s)

    @app.post("/ready")
    def ready() -> Response:
        raw = request.get_data(cache=False)
        with scaler.lock:
            labels = [i.label for i in scaler.instances]
        names, label_of = {}, {}
        for one in labels:
            name, names[name] = name_and_key(master_token(one))
            label_of[name] = one
        said_by = signer(request.headers.get("Authorization"), "/ready", raw, names)
        if said_by is None:
            return error(401, "unauthorized", "wanted the signature of an instance of the fleet")
        label = label_of[said_by]
        said = check_fields(parse_json(raw), _READY)
        why = f"{said['state']}: {said['why']}" if said.get("why") else said["state"]
        if not scaler.record_message(label, said["boot_id"], said["number"], why):
            return error(409, "heard_before", "this message, or one after it, was heard before")
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
        from_s = query_number("from", 0.0, 0.0, 1e12)
        to_s = min(now, query_number("to", now, 0.0, 1e12))
        return jsonify(cost_answer(scaler, from_s, to_s))

    @app.put("/manage")
    @operator
    def manage() -> Response:
        wanted = body({"manage": Boolean()})["manage"]
        with scaler.lock:
            scaler.instances.set_manage(wanted)
        log.info("manage is now %s", wanted)
        return jsonify(manage=wanted)

    @app.put("/policy")
    @operator
    def policy() -> Response:
        wanted = body({"name": Text(1, 64), "params": Mapping(optional=True)})
        try:
            params = wanted.get("params") or {}
            made = make_policy(POLICIES, wanted["name"], params, scaler.instances.speedup)
        except ConfigError as e:
            raise BadField("name" if "unknown policy" in str(e) else "params", str(e)) from e
        with scaler.lock:
            scaler.set_policy(made)
        log.info("policy is now %r", made)
        if tuner is not None:
            tuner.policy_was_set()
        fields = asdict(made)  # type: ignore[call-overload]
        return jsonify(name=wanted["name"], params={k: v for k, v in fields.items() if math.isfinite(v)})

    @app.get("/policy/curve")
    @operator
    def policy_curve() -> Response:
        if tuner is None:
            return error(404, "no_curve", "this process makes no replays")
        try:
            return jsonify(tuner.curve())
        except NoCurve as e:
            return error(404, "no_curve", str(e))

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
    "state": Choice(("loading", "ready", "failed")),
    "why": Text(0, 300, optional=True),
    "boot_id": Text(1, 64),
    "number": Whole(0, 2**63),
}

_BUSY: dict[str, Any] = {
    "loadbalancer": Text(1, 64),
    "hot_epoch": Text(0, 64, optional=True),
    "hot_version": Whole(0, 2**53, optional=True),
    "busy": Number(0.0, 1e6),
    "demand": Number(0.0, 1e6),
    "held": Whole(0, 10**9),
    "held_work": Number(0.0, 1e15),
    "arrivals": Whole(0, 2**53),
    "arrived_work": Number(0.0, 1e18),
    "instances": Mapping(),
    "traffic": Mapping(optional=True),  # an older loadbalancer does not send it
}

_TRAFFIC: dict[str, Any] = {
    "prompt_tokens": Whole(0, 2**53),
    "output_tokens": Number(0.0, 1e18),
    "in_flight": Whole(0, 10**9),
    "late": Whole(0, 10**9),
    "held_prompt_tokens": Whole(0, 2**53),
    "oldest_wait_s": Number(0.0, 1e9),
    "turned_late": Whole(0, 2**53),
    "first_token_s": Number(1e-3, 3600.0),
    "prompt_token_s": Number(0.0, 1.0),
    "late_bound_s": Number(0.0, 86_400.0, optional=True),
}

_BUSY_INSTANCE: dict[str, Any] = {
    "unfinished": Whole(0, 10**9),
    "work": Number(0.0, 1e15),
    "working_s": Number(0.0, 1e12),
    "throughput_work_s": Number(0.0, 1e9),
    "failures": Whole(0, 2**53),
}


def parse_report(said: MappingType[str, Any]) -> tuple[Report, dict[int, float]]:
    """A checked `POST /busy` body as a Report, and the measured work per second by instance id."""
    unfinished: dict[int, int] = {}
    working: dict[int, float] = {}
    failures: dict[int, int] = {}
    measured: dict[int, float] = {}
    for key, one in said["instances"].items():
        if not re.fullmatch(r"[0-9]{1,16}", key):
            raise BadField("instances", f"wanted ids of instances as keys, got {key[:60]!r}")
        instance_id, told = int(key), check_fields(one, _BUSY_INSTANCE, f"instances.{key}.")
        unfinished[instance_id] = told["unfinished"]
        working[instance_id] = told["working_s"]
        failures[instance_id] = told["failures"]
        if told["throughput_work_s"] > 0.0:
            measured[instance_id] = told["throughput_work_s"]
    traffic: MappingType[str, Any] = {}
    if said.get("traffic") is not None:
        traffic = check_fields(said["traffic"], _TRAFFIC, "traffic.")
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


def cost_answer(scaler: Autoscaler, from_s: float, to_s: float) -> dict[str, Any]:
    """`GET /costs`: dollars of the window, the intervals behind them, and what is being spent now."""
    scaler.write_counts()
    costs = scaler.ledger.costs(from_s, to_s)
    took = scaler.ledger.durations(from_s, to_s)
    with scaler.lock:
        burn = sum(i.price_usd_h for i in scaler.instances)
        committed = scaler.instances.committed().usd_h
        limit = scaler.instances.limits.max_usd_h

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
            for s in costs.intervals
        ],
    }


def metrics_text(scaler: Autoscaler) -> str:
    """Prometheus text: instances by state, demand, busy, burn rate, dollars so far, age of the last turn."""
    now = scaler.clock()
    scaler.write_counts()
    costs = scaler.ledger.costs(0.0, now)
    with scaler.lock:
        states = dict.fromkeys(State, 0)
        for i in scaler.instances:
            states[i.state] += 1
        burn = sum(i.price_usd_h for i in scaler.instances)
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


def serve(config: AutoscalerConfig) -> None:
    """Run until SIGTERM or Ctrl-C. The fleet goes on running: it is found again at the next start."""
    operator_keys = private_files.load_keys(config.operator_key_file)
    check_bind(config.host, config.port, keys_present=bool(operator_keys))
    sock = bind_socket(config.host, config.port)
    process = AutoscalerProcess(config, replay=REPLAY)
    keys = Keys(private_files.load_or_make_key(process.state_dir / "control.key"), operator_keys)
    process.check_account()
    app = create_app(
        process.scaler,
        process.profile,
        keys,
        config.poll_interval_s,
        process.keys.master_token,
        process.check_wakeup.wake,
        process.tuner,
    )
    log.info(
        "autoscaler of fleet %s (%s) on http://%s:%d", config.label, config.model, config.host, config.port
    )
    process.start()
    try:
        serve_flask(
            app,
            sock,
            background=[process.run_health_checks, process.run_hot_push],
            blocking=SLOW_ROUTES,
            any_host=bool(operator_keys),
        )
    finally:
        process.stop()
        process.close()


def _parser() -> argparse.ArgumentParser:
    d = AutoscalerConfig()
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


def _config(args: argparse.Namespace) -> AutoscalerConfig:
    given = vars(args)
    names = AutoscalerConfig.__dataclass_fields__
    chosen = {k: v for k, v in given.items() if k in names and v is not None and k != "loadbalancer"}
    if given.get("loadbalancer"):
        chosen["loadbalancer"] = tuple(given["loadbalancer"])
    if given.get("goal") is not None and given.get("policy") not in (None, "objective"):
        raise ConfigError(f"--goal and --policy {given['policy']}: only objective has a goal")
    if given.get("policy_param"):
        chosen["policy_params"] = tuple(given["policy_param"])
    return AutoscalerConfig(**chosen)


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
    flags.run_main(main)
