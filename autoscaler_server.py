"""The autoscaler as a process: its flags and its routes; and its commands `prepare` and `destroy-fleet`.

python autoscaler_server.py [flags]                     serve: keep the fleet as the policy wants it
python autoscaler_server.py plan --count N [flags]      what that would rent and cost; nothing is ordered
python autoscaler_server.py profile add ORG/MODEL       make a profile of a model: docs/models.md
python autoscaler_server.py prepare --count N [flags]   rent N instances, load the model, stop them
python autoscaler_server.py destroy-fleet [flags]       end everything that carries the label, after asking
python autoscaler_server.py status [flags]              how a fleet stands; also decisions, costs
python autoscaler_server.py drain ID [flags]            by hand; also replace, destroy, ban, forgive
python autoscaler_server.py logs ID [flags]             an instance's engine log; also ssh
"""

import argparse
import logging
import signal
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from flask import Flask, Response, jsonify, request

from engine.profiles import use_own_profiles
from fleet.outside.api_description import OPERATIONS
from fleet.outside.config import PRODUCTION_URL, SERVE_ONLY, AutoscalerConfig
from fleet.outside.costs import account_health, cost_answer
from fleet.outside.decisions import decisions_answer
from fleet.outside.destroy_fleet import destroy_fleet
from fleet.outside.hot_set_push import current_hot_set
from fleet.outside.metrics import AutoscalerMetrics
from fleet.outside.operator_acts import OperatorActs
from fleet.outside.operator_commands import (
    ACT,
    MACHINES,
    REACH,
    SHOW,
    SWITCH,
    OperatorConfig,
    run_operator_command,
)
from fleet.outside.overview import FleetPlace, Overview
from fleet.outside.page_routes import ENGINE_LOG, FROM, MARKET, TO, WHAT_IF, add_page, asked_by
from fleet.outside.plan import PlanConfig, add_plan, plan
from fleet.outside.prepare import prepare
from fleet.outside.process import AutoscalerProcess
from fleet.outside.profile_command import NewProfile, add_profile, profile_command
from fleet.outside.ready_route import add_ready, hear_ready
from fleet.outside.reasons import OwnReasons
from fleet.outside.secrets_command import DOES, run_secrets_command
from fleet.outside.standing import StandingOrders
from fleet.outside.tuner import NoCurve, Tuner
from fleet.outside.turns import Autoscaler
from fleet_client import flags, private_files
from fleet_client.flags import Parser, add_flags
from fleet_client.listening import bind_socket, check_bind
from fleet_client.network_trust import allow
from fleet_client.own_tls import scheme, server_tls
from fleet_client.service_manager import ServiceManager, set_up_logging
from process.errors import ConfigError
from process.own_profiles import read_own_profiles
from process.safe_text import safe_text
from web.answers import JsonAnswer, error, problem, response
from web.app import body, check_query, make_app, requires
from web.bridge import serve_flask
from web.keys import AccessKeys
from web.messages.busy import LOADBALANCER, MAX_BUSY_BODY, BusyAnswer, read_busy
from web.messages.decoding import BadField
from web.messages.operator import ManageBody, PolicyBody
from web.metrics import metrics_page
from web.openapi import add_openapi
from web.page_files import PageToken

log = logging.getLogger("autoscaler")

ENVIRONMENT = "AUTOSCALER_"
"""Beginning of the flags' names in the environment, for all commands."""

OPERATOR_ENVIRONMENT = "OPERATOR_"
"""The same for the commands that ask an autoscaler which runs already."""

REPLAY = (sys.executable, "-m", "simulation.virtual.replay")
"""What replays the fleet's last day for the tuner, in a process of its own."""

VIRTUAL = (sys.executable, "sim.py", "--virtual")
"""What plays the fleet's last day in virtual time for an operator, in a process of its own."""

SLOW_ROUTES = frozenset({"/costs", "/metrics", "/overview", "/history", ENGINE_LOG, MARKET, WHAT_IF})
"""They read the whole ledger, or ask an instance: in a thread, so that nothing else waits for it."""


# -- the routes ------------------------------------------------------------------------------------------


def create_app(
    scaler: Autoscaler,
    keys: AccessKeys,
    poll_interval_s: float,
    master_token: Callable[[str], str],
    nudge: Callable[[], None] = lambda: None,
    tuner: Tuner | None = None,
    place: FleetPlace | None = None,
    acts: OperatorActs | None = None,
) -> Flask:
    """Make the autoscaler's Flask app with its routes. Views fetch, check, act and answer.

    nudge: called when a health check has become due. tuner: gives the curve, and is told of a new policy.
    place: what the operator's page says of this process. acts: carry out what a person asks.
    """
    app = make_app("autoscaler", large_bodies={"/busy": MAX_BUSY_BODY})
    app.register_error_handler(sqlite3.Error, _ledger_fails)
    health = _add_health(app, scaler, poll_interval_s)
    place = place or FleetPlace("fleet", "", local=False, speedup=1.0)
    token = PageToken()
    acts = acts or OperatorActs.of(scaler, tuner=tuner)
    add_page(app, Overview(scaler, place, tuner, acts.audit, acts.what_if), acts, keys, token, health)
    _add_loadbalancer_routes(app, scaler, keys, master_token)
    add_ready(app, scaler, master_token, nudge)
    _add_operator_views(app, scaler, keys, health)
    _add_operator_orders(app, keys, token, acts.standing, tuner)
    add_openapi(app, "autoscaler", OPERATIONS)
    return app


def _ledger_fails(e: Exception) -> Response:
    return error(503, "ledger_not_readable", f"the ledger cannot be read: {e}")


def _add_health(app: Flask, scaler: Autoscaler, poll_interval_s: float) -> Callable[[], dict[str, Any]]:
    """Register GET /health; return the function that makes its answer, with an `error` where it is 503."""
    own = OwnReasons(scaler, poll_interval_s)

    def answer() -> dict[str, Any]:
        reasons = own.now()
        more: dict[str, Any] = {"last_good_turn_age_s": round(own.good_turn_age_s, 1)}
        if scaler.own.restarts:
            more["restarted_threads"] = dict(scaler.own.restarts)
        if scaler.own.clock_steps:
            more["clock_steps"] = [{"at": at, "by_s": round(by_s, 1)} for at, by_s in scaler.own.clock_steps]
        if holds := [hold.shown() for hold in scaler.instances.holds]:
            more["holds"] = holds
        more |= account_health(scaler)
        if not reasons:
            return {"status": "ok", **more}
        said = [{"reason": r.code, "message": safe_text(r.message)} for r in reasons]
        message = "; ".join(one["message"] for one in said)
        return problem(503, reasons[0].code, message, reasons=said, **more)

    @app.get("/health")
    def health() -> Response:
        said = answer()
        return response(JsonAnswer(said, 503 if "error" in said else 200))

    return answer


def _add_loadbalancer_routes(
    app: Flask,
    scaler: Autoscaler,
    keys: AccessKeys,
    master_token: Callable[[str], str],
) -> None:
    control = requires(keys.for_control)

    def note_contact() -> None:
        scaler.own.note_contact(safe_text(request.headers.get(LOADBALANCER, ""), 64), scaler.clock())

    @app.get("/hot")
    @control
    def hot() -> Response:
        note_contact()
        found = current_hot_set(scaler, master_token)
        if found is None:
            return error(503, "not_ready", "the fleet is not known yet: just started")
        return response(JsonAnswer(found))

    @app.post("/busy")
    @control
    def busy() -> Response:
        note_contact()
        report, odd = read_busy(request.get_data(cache=False))
        scaler.record_report(report)
        with scaler.lock:
            version = scaler.instances.hot_version
            expected_s = scaler.instances.expected_hot_s(scaler.clock())
        return response(JsonAnswer(BusyAnswer(scaler.demand.epoch, version, expected_s, odd)))


def _add_operator_views(
    app: Flask, scaler: Autoscaler, keys: AccessKeys, health: Callable[[], dict[str, Any]]
) -> None:
    operator = requires(keys.for_operator)
    figures = AutoscalerMetrics(scaler, lambda: [r["reason"] for r in health().get("reasons", ())])

    @app.get("/instances")
    @operator
    def instances() -> Response:
        with scaler.lock:
            now, manage = scaler.clock(), scaler.instances.manage
            there, gone = scaler.instances.describe(now, scaler.demand.out())
        return jsonify(instances=there, gone=gone, manage=manage)

    @app.get("/decisions")
    @operator
    def decisions() -> Response:
        return jsonify(decisions_answer(scaler))

    @app.get("/costs")
    @operator
    def costs() -> Response:
        check_query(FROM, TO)
        now = scaler.clock()
        from_s = FROM.asked(0.0)
        to_s = min(now, TO.asked(now))
        return jsonify(cost_answer(scaler, from_s, to_s))

    @app.get("/metrics")
    @operator
    def metrics() -> Response:
        return response(metrics_page(figures, request.headers.get("Accept", "")))


def _add_operator_orders(
    app: Flask, keys: AccessKeys, token: PageToken, standing: StandingOrders, tuner: Tuner | None
) -> None:
    operator = requires(keys.for_operator)

    @app.put("/manage")
    @operator
    @token.required
    def manage() -> Response:
        wanted = body(ManageBody).manage
        standing.set_manage(wanted, asked_by(keys))
        return jsonify(manage=wanted)

    @app.put("/policy")
    @operator
    @token.required
    def policy() -> Response:
        wanted = body(PolicyBody)
        try:
            params = standing.set_policy(wanted.name, wanted.params or {}, asked_by(keys))
        except ConfigError as e:
            raise BadField("name" if "unknown policy" in str(e) else "params", str(e)) from e
        return jsonify(name=wanted.name, params=params)

    @app.get("/policy/curve")
    @operator
    def policy_curve() -> Response:
        if tuner is None:
            return error(404, "no_curve", "this process makes no replays")
        try:
            return jsonify(tuner.curve())
        except NoCurve as e:
            return error(404, "no_curve", str(e))


# -- the process -----------------------------------------------------------------------------------------


def serve(config: AutoscalerConfig) -> None:
    """Run an autoscaler until SIGTERM or Ctrl-C.

    The fleet goes on running: it is found again at the next start.
    """
    names = private_files.load_named_keys(config.operator_key_file)
    operator_keys = frozenset(names)
    check_bind(config.host, config.port, keys_present=bool(operator_keys))
    allow(config.in_the_clear(), trust_network=config.trust_network)
    tls = server_tls(config.tls_cert, config.tls_key)
    sock = bind_socket(config.host, config.port)
    process = AutoscalerProcess(config, replay=REPLAY, virtual=VIRTUAL)
    process.check_account()
    process.check_beforehand()
    app = create_app(
        process.scaler,
        AccessKeys(
            process.control_key,
            operator=operator_keys,
            names={key: name for key, name in names.items() if name is not None},
        ),
        config.poll_interval_s,
        process.keys.master_token,
        process.health_rounds.wakeup.wake,
        process.tuner,
        FleetPlace(
            config.label, config.cloud_url if config.local else PRODUCTION_URL, config.local, config.speedup
        ),
        process.acts,
    )
    own, manager = OwnReasons(process.scaler, config.poll_interval_s), ServiceManager()

    async def service_manager() -> None:
        await manager.keep_informed(lambda: own.turns_go_well, lambda: own.turns_go_well)

    url = f"{scheme(tls)}://{config.host}:{config.port}"
    log.info("autoscaler of fleet %s (%s) on %s", config.label, config.model, url)
    process.start()
    try:
        serve_flask(
            app,
            sock,
            background=[process.health_rounds.run, process.hot_push.run, service_manager],
            blocking=SLOW_ROUTES,
            any_host=bool(operator_keys),
            tls=tls,
        )
    finally:
        process.stop()
        process.close()


def parser() -> argparse.ArgumentParser:
    """Return the parser of the autoscaler's flags and commands."""
    found = Parser(prog="autoscaler_server.py", description=(__doc__ or "").split("\n")[0])
    commands = found.add_subparsers(dest="command", metavar="COMMAND")
    serve_it = commands.add_parser(
        "serve",
        environment=ENVIRONMENT,
        description="Keep the fleet as the policy wants it. This is what runs without a command.",
        epilog="Other commands, each with a --help: "
        f"{', '.join(('plan', 'profile', 'prepare', 'destroy-fleet', 'secrets'))}, "
        f"{', '.join((*SHOW, *REACH, *ACT, *SWITCH))}.",
        help="keep the fleet as the policy wants it (default)",
    )
    add_flags(serve_it, AutoscalerConfig)
    prepare_it = commands.add_parser(
        "prepare",
        environment=ENVIRONMENT,
        description="Rent instances, load the model onto their disks, and stop them.",
        epilog="--count is for the command line only. --port and --tls-cert are the autoscaler's: local "
        "instances are told once where they report.",
        help="rent, load the model, stop",
    )
    add_flags(prepare_it, AutoscalerConfig, without=SERVE_ONLY - {"host"})
    prepare_it.add_argument(
        "--count", type=int, required=True, metavar="N", help="how many loaded instances to add (no default)"
    )
    add_plan(commands, ENVIRONMENT)
    add_profile(commands, ENVIRONMENT)
    destroy_it = commands.add_parser(
        "destroy-fleet",
        environment=ENVIRONMENT,
        description="End every instance that carries the label, with its disk, after asking.",
        epilog="--yes is for the command line only.",
        help="end all that carries the label",
    )
    add_flags(destroy_it, AutoscalerConfig, without=SERVE_ONLY)
    destroy_it.add_argument("--yes", action="store_true", help="do not ask (default: ask)")
    secrets_it = commands.add_parser(
        "secrets",
        environment=ENVIRONMENT,
        description="The account's secret variables (HF_TOKEN), which every container of the account gets. "
        "The value is read from standard input, or asked for.",
        epilog="set, list, delete and the name are for the command line only.",
        help="set, list or delete the account's secret variables",
    )
    secrets_it.add_argument("does", choices=DOES, help="what to do (no default)")
    secrets_it.add_argument("name", nargs="?", help="the variable, as HF_TOKEN (default: none, to list)")
    add_flags(secrets_it, AutoscalerConfig, without=SERVE_ONLY)
    _add_operator_commands(commands)
    return found


def _add_operator_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    for name, does in (SHOW | REACH | ACT | SWITCH).items():
        it = commands.add_parser(
            name,
            environment=OPERATOR_ENVIRONMENT,
            description=f"Of an autoscaler that runs: {does}.",
            help=does,
        )
        if name in SWITCH:
            it.add_argument("of", choices=("on", "off"), help="whether anything new is ordered (no default)")
        elif name not in SHOW:
            what = "machine_id" if name in MACHINES else "id of the instance"
            it.add_argument("of", type=int, metavar="ID", help=f"{what}, as `status` shows it")
        unused = {*(("watch",) if name not in SHOW else ()), *(("state_dir",) if name not in REACH else ())}
        add_flags(it, OperatorConfig, without=tuple(unused))


def _config(args: argparse.Namespace) -> AutoscalerConfig:
    given = vars(args)
    if given.get("goal") is not None and given.get("policy", "objective") != "objective":
        raise ConfigError(f"--goal and --policy {given['policy']}: only objective has a goal")
    config = AutoscalerConfig(**{f.name: given[f.name] for f in fields(AutoscalerConfig) if f.name in given})
    if given["command"] != "profile":  # that makes the file, where there is none
        state_dir = config.state_dir or private_files.default_state_dir(config.label)
        use_own_profiles(*read_own_profiles(config.profiles, state_dir))
    return config


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and run the command that they name; `serve` is the default."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0].startswith("-"):
        argv.insert(0, "serve")
    args = parser().parse_args(argv)
    set_up_logging()
    if args.command in SHOW | REACH | ACT | SWITCH:
        given = {f.name: vars(args)[f.name] for f in fields(OperatorConfig) if f.name in args}
        run_operator_command(args.command, getattr(args, "of", None), OperatorConfig(**given))
        return
    config = _config(args)
    if args.command == "profile":
        profile_command(NewProfile.of(args), config)
    elif args.command == "prepare":
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        prepare(config, args.count, lambda process: hear_ready(process, config))
    elif args.command == "secrets":
        run_secrets_command(config, args.does, args.name)
    elif args.command == "plan":
        asked = PlanConfig(args.count, args.json, args.trace, args.yesterday, args.fits)
        plan(config, asked, VIRTUAL)
    elif args.command == "destroy-fleet":
        destroy_fleet(config, ask=None if args.yes else input)
    else:
        serve(config)


if __name__ == "__main__":
    flags.run_main(main)
