"""The loadbalancer as a process: flags, Flask face, and what it asks of the autoscaler and the instances.

python loadbalancer_server.py [flags]

Everything runs on one event loop and one thread: the views, and three background coroutines.

    clockwork     every 20 ms, while nobody asks 200: fetch tokens, ask for load reports, serve who waits
    autoscaler    every second: say how busy it is, and fetch the hot set when it has changed
    ticks         every second: release what has expired

Nothing is locked because nothing is shared between threads; `LoadBalancerService` refuses every other thread.
"""

import argparse
import logging
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flask import Flask, Response, jsonify

from dispatch.allowance import MOST_UNUSED
from dispatch.chooser import FIRST_TOKEN_WEIGHT
from dispatch.outside.background import Errands
from dispatch.outside.service import GRANT_AT_ONCE, LoadBalancerService
from dispatch.request_queue import LATE_BOUND_S
from dispatch.route_request import RouteRequest
from engine.slo import Slo
from fleet_client import flags, private_files
from fleet_client.flags import Parser, server_url, within
from fleet_client.listening import bind_socket, check_bind
from instance_client import request_id
from loadbalancer import LoadBalancer
from process.clock import steady_clock
from web.answers import JsonAnswer
from web.app import make_app, requires
from web.bodies import Choice, Field, ListOf, Number, Text, Whole
from web.bridge import serve_flask
from web.direct import Held, awaited, direct, signed
from web.messages.decoding import BadField
from web.messages.hot_set import MAX_HOT_BODY
from web.messages.reports import MAX_REPORT_BODY

log = logging.getLogger("loadbalancer")

MAX_TOKENS, MAX_WORK, MAX_WAIT_S, MAX_AVOID = 10_000_000, 1e7, 600.0, 64
"""Bounds of a request: ten times the longest context there is; ten minutes; more than anybody retries."""

MAX_COUNT, MAX_AFFINITY = 64, 256
"""Leases in one answer, 20 kB of them; hashes of a prompt's beginnings, 65,536 tokens of it."""

PRIORITIES = {"high": 0, "normal": 1, "low": 2}

NO_FAULT = re.compile("status_4..")
"""How a request may fail through no fault of the instance: a token that is too old, a request that is wrong,
more than it can take. All else says that it refuses, times out or breaks."""


@dataclass(frozen=True)
class Config:
    """Everything an operator may set. Times in seconds."""

    host: str = "127.0.0.1"
    port: int = 8200
    autoscaler: str = "http://127.0.0.1:8100"
    label: str = "fleet"  # names the state directory, as for the autoscaler
    state_dir: Path | None = None  # control key; default below ~/.local/state
    client_keys_file: Path | None = None  # who may call /route and /done
    operator_key_file: Path | None = None  # who may call /status and /metrics
    lease_s: float = 60.0  # a lease not started by then is void; clients start within a second or so
    max_held: int = 5000  # requests that wait at once; about 10 kB each
    poll_interval_s: float = 1.0  # age of a load report at most, with up to 200 working instances
    public_url: str | None = None  # of this server, as instances reach it: then they report by themselves
    late_lane: bool = True  # who cannot be in time any more waits behind those who can; else one line of all
    max_unused: int = MOST_UNUSED  # leases that one client may have and not have used
    late_bound_s: float = LATE_BOUND_S  # a late request waits no longer before it goes before all others
    first_token_weight: float = (
        FIRST_TOKEN_WEIGHT  # seconds of whole latency that one of first token is worth
    )
    first_token_s: float = Slo().first_token_s  # in time: the first token comes within this ...
    prompt_token_s: float = Slo().prompt_token_s  # ... and this for each token of the prompt

    def checked(self) -> "Config":
        """Itself, or ConfigError naming the flag, the value and the range."""
        within("--port", self.port, 1, 65535)
        within("--lease-s", self.lease_s, 1.0, 600.0)
        within("--max-held", self.max_held, 0, 100_000)
        within("--max-unused", self.max_unused, 1, 200_000)
        within("--poll-interval-s", self.poll_interval_s, 0.1, 60.0)
        within("--late-bound-s", self.late_bound_s, 0.0, 86_400.0)
        within("--first-token-weight", self.first_token_weight, 0.0, 1000.0)
        within("--first-token-s", self.first_token_s, 1e-3, 3600.0)
        within("--prompt-token-s", self.prompt_token_s, 0.0, 1.0)
        server_url("--autoscaler", self.autoscaler)
        if self.public_url is not None:
            server_url("--public-url", self.public_url)
        return self

    @property
    def slo(self) -> Slo:
        """What late means."""
        return Slo(self.first_token_s, self.prompt_token_s)

    def report_to(self, auth_url: str) -> str | None:
        """Where the instance with that auth_server is to send its reports, if it can reach us at all."""
        if self.public_url is not None:
            return f"{self.public_url.rstrip('/')}/report"
        # Beside us on one machine, as with a local cloud; a rented one would talk to itself.
        near = urlsplit(auth_url).hostname == "127.0.0.1" and self.host in ("127.0.0.1", "0.0.0.0")  # noqa: S104
        return f"http://127.0.0.1:{self.port}/report" if near else None


# -- the face --------------------------------------------------------------------------------------------

_ROUTE: dict[str, Field] = {
    "prompt_tokens": Whole(0, MAX_TOKENS, optional=True),
    "max_tokens": Whole(1, MAX_TOKENS, optional=True),
    "work": Number(1e-3, MAX_WORK, optional=True),
    "wait_s": Number(0.0, MAX_WAIT_S, optional=True),
    "avoid": ListOf(Whole(0, 2**53), MAX_AVOID, optional=True),
    "affinity": ListOf(
        Text(8, 32, form=(re.compile("[0-9a-f]*"), "hex digits a-f")), MAX_AFFINITY, optional=True
    ),
    "priority": Choice(tuple(PRIORITIES), optional=True),
    "count": Whole(1, MAX_COUNT, optional=True),
}

_DONE: dict[str, Field] = {
    "request_id": Text(1, 64),
    "outcome": Choice(("finished", "failed", "unused")),
    "why": Text(0, 40, optional=True),
}


@dataclass(frozen=True)
class Keys:
    """Who may call what. With no client or operator key those routes are open, which is for loopback only."""

    control: str
    clients: frozenset[str] = frozenset()
    operator: frozenset[str] = frozenset()


def create_app(desk: LoadBalancerService, keys: Keys) -> Flask:
    """The routes. Views check, act and answer; what is decided is decided in `loadbalancer.py`."""
    app = make_app("loadbalancer", large_bodies={"/hot": MAX_HOT_BODY, "/report": MAX_REPORT_BODY})
    operator = requires(lambda: keys.operator and keys.operator | {keys.control})

    @direct(app, "/route", _ROUTE, lambda: keys.clients)
    def route(said: dict[str, Any], client: str) -> JsonAnswer | Held:
        return desk.route(_ask(desk.balancer, said, client), said.get("wait_s", 0.0), said.get("count"))

    @direct(app, "/done", _DONE, lambda: keys.clients)
    def done(said: dict[str, Any], client: str) -> JsonAnswer:  # noqa: ARG001
        why = said.get("why", "")
        if not re.fullmatch(r"[a-z0-9_]*", why):
            raise BadField("why", "wanted one word of a-z, 0-9 and _: a sentence could quote a prompt")
        known = desk.balancer.end_lease(
            said["request_id"],
            said["outcome"],
            desk.clock(),
            blame=not NO_FAULT.fullmatch(why),
            impostor=why == "wrong_certificate",
        )
        if known and said["outcome"] == "failed":
            log.warning("a client's request %s failed: %s", said["request_id"], why or "no reason given")
        desk.activity.set()
        desk.serve_waiting()
        return JsonAnswer({})

    @signed(app, "/report")
    def report(raw: bytes, authorization: str | None) -> JsonAnswer:
        return desk.report(raw, authorization)

    @awaited(app, "PUT", "/hot", lambda: frozenset({keys.control}))
    async def hot(raw: bytes) -> JsonAnswer:
        news = desk.hot_set(await desk.reader.read(raw))
        now = desk.balancer.instances.hot_set
        return JsonAnswer({"taken": news, "epoch": now and now.epoch, "version": now and now.version})

    @app.get("/status")
    @operator
    def status() -> Response:
        return jsonify(status_of(desk))

    @app.get("/health")
    def health() -> Response:
        return jsonify(status="ok", hot=desk.balancer.instances.hot)

    @app.get("/metrics")
    @operator
    def metrics() -> Response:
        return Response(metrics_text(desk), mimetype="text/plain; version=0.0.4")

    return app


def _ask(balancer: LoadBalancer, said: Mapping[str, Any], client: str) -> RouteRequest:
    """What a checked `POST /route` body asks for."""
    work: float | None = said.get("work")
    prompt: int | None = said.get("prompt_tokens")
    max_tokens: int | None = said.get("max_tokens")
    if work is not None:
        if prompt is not None or max_tokens is not None:
            raise BadField("work", "goes alone, without prompt_tokens and max_tokens")
    elif prompt is None:
        raise BadField("prompt_tokens", "is missing (or give work)")
    return RouteRequest(
        balancer.work_of(prompt or 0, max_tokens) if work is None else work,
        max_tokens,
        frozenset(said.get("avoid", ())),
        prompt or 0,
        tuple(said.get("affinity", ())),
        PRIORITIES[said.get("priority", "normal")],
        client,
    )


def status_of(desk: LoadBalancerService) -> dict[str, Any]:
    """`GET /status`: everything but tokens and keys."""
    now = desk.clock()
    return {
        "loadbalancer": desk.name,
        "heard_of_autoscaler_s_ago": None if desk.heard_at is None else round(now - desk.heard_at, 1),
        **desk.balancer.describe(now),
    }


def metrics_text(desk: LoadBalancerService) -> str:
    """`GET /metrics` in Prometheus' text format."""
    status = status_of(desk)
    lines: list[str] = []
    for name, kind, key in (
        ("busy", "gauge", "busy"),
        ("demand", "gauge", "demand"),
        ("held", "gauge", "held"),
        ("held_work", "gauge", "held_work"),
        ("held_late", "gauge", "held_late"),
        ("turned_late_total", "counter", "turned_late"),
        ("oldest_wait_seconds", "gauge", "oldest_wait_s"),
        ("arrivals_total", "counter", "arrivals"),
        ("arrived_work_total", "counter", "arrived_work"),
        ("routed_total", "counter", "routed"),
        ("refused_total", "counter", "refused"),
        ("too_many_unused_total", "counter", "too_many_unused"),
    ):
        lines += [f"# TYPE loadbalancer_{name} {kind}", f"loadbalancer_{name} {status[key]:.9g}"]
    lines += ["# TYPE loadbalancer_hot gauge", f"loadbalancer_hot {desk.balancer.instances.hot}"]
    lines.append("# TYPE loadbalancer_lease_ends_total counter")
    lines += [f'loadbalancer_lease_ends_total{{how="{how}"}} {n}' for how, n in status["ends"].items()]
    for name, kind, key in (
        ("unfinished", "gauge", "unfinished"),
        ("work", "gauge", "work"),
        ("capacity_work", "gauge", "capacity_work"),
        ("throughput_work_s", "gauge", "throughput_work_s"),
        ("tokens_in_stock", "gauge", "tokens_in_stock"),
        ("working_seconds_total", "counter", "working_s"),
        ("failures_total", "counter", "failures"),
    ):
        lines.append(f"# TYPE loadbalancer_instance_{name} {kind}")
        lines += [
            f'loadbalancer_instance_{name}{{instance="{i["id"]}"}} {i[key]:.9g}' for i in status["instances"]
        ]
    return "\n".join(lines) + "\n"


def make_balancer(config: Config) -> LoadBalancer:
    """What decides, as the operator wants it."""
    return LoadBalancer(
        random.Random(),
        request_id,
        config.lease_s,
        config.max_held,
        config.poll_interval_s,
        config.slo,
        config.late_bound_s if config.late_lane else None,
        max_unused=config.max_unused,
        first_token_weight=config.first_token_weight,
        grant_at_once=GRANT_AT_ONCE,
    )


def serve(config: Config) -> None:
    """Run until SIGTERM or Ctrl-C. Leases and tokens are forgotten then: clients hold what they need."""
    config = config.checked()
    clients = private_files.load_keys(config.client_keys_file)
    operator = private_files.load_keys(config.operator_key_file)
    check_bind(config.host, config.port, keys_present=bool(clients) and bool(operator))
    state_dir = private_files.make_private_dir(
        config.state_dir or private_files.default_state_dir(config.label)
    )
    keys = Keys(private_files.load_or_make_key(state_dir / "control.key"), clients, operator)
    sock = bind_socket(config.host, config.port)
    desk = LoadBalancerService(make_balancer(config), steady_clock())
    errands = Errands(desk, config.autoscaler, keys.control, config.report_to)
    log.info("loadbalancer of fleet %s on http://%s:%d", config.label, config.host, config.port)
    serve_flask(
        create_app(desk, keys),
        sock,
        background=[errands.clockwork, errands.ticks, errands.autoscaler],
        any_host=bool(clients and operator),
    )


def _parser() -> argparse.ArgumentParser:
    d = Config()
    parser = Parser(
        prog="loadbalancer_server.py",
        description=(__doc__ or "").split("\n")[0],
        epilog="Listening off loopback needs both key files.",
    )
    add = parser.add_argument
    add("--host", default=d.host, help="address to listen on (default %(default)s)")
    add("--port", type=int, default=d.port, help="port to listen on (default %(default)s)")
    add("--autoscaler", default=d.autoscaler, metavar="URL", help="the autoscaler (default %(default)s)")
    add(
        "--label",
        default=d.label,
        help="label of the fleet, as given to the autoscaler (default %(default)s)",
    )
    add(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="holds the control key, shared with the autoscaler (default ~/.local/state/autoscaler-py/LABEL)",
    )
    add(
        "--client-keys",
        "--client-keys-file",
        dest="client_keys_file",
        type=Path,
        metavar="FILE",
        help="keys that /route and /done then want, one a line, mode 0600 (default: open on loopback)",
    )
    add(
        "--operator-key",
        "--operator-key-file",
        dest="operator_key_file",
        type=Path,
        metavar="FILE",
        help="keys that /status and /metrics then want, one a line, mode 0600 (default: open on loopback)",
    )
    add(
        "--public-url",
        metavar="URL",
        help="this server as instances reach it, so that they report by themselves "
        "(default: none but for instances on this machine)",
    )
    add(
        "--lease-s",
        type=float,
        default=d.lease_s,
        metavar="S",
        help="seconds after which a lease that was not started is void (default %(default)g)",
    )
    add(
        "--max-held",
        type=int,
        default=d.max_held,
        metavar="N",
        help="requests with wait_s that wait at once; beyond it 503 (default %(default)d)",
    )
    add(
        "--max-unused",
        type=int,
        default=d.max_unused,
        metavar="N",
        help="leases that one client may have and not have used; beyond it 429 (default %(default)d)",
    )
    add(
        "--late-lane",
        action=argparse.BooleanOptionalAction,
        default=d.late_lane,
        help="who cannot be in time any more waits behind those who can; without it all wait in one line "
        "(default --late-lane)",
    )
    for flag, default, text in (
        ("--late-bound-s", d.late_bound_s, "seconds after which a late request goes before all others"),
        (
            "--first-token-weight",
            d.first_token_weight,
            "seconds of whole latency that a second of first token is worth in a choice",
        ),
        ("--first-token-s", d.first_token_s, "in time is a first token within so many seconds"),
        ("--prompt-token-s", d.prompt_token_s, "and so many more for each token of the prompt"),
    ):
        add(flag, type=float, default=default, metavar="S", help=f"{text} (default %(default)g)")
    add(
        "--poll-interval-s",
        type=float,
        default=d.poll_interval_s,
        metavar="S",
        help="seconds between load reports of a working instance (default %(default)g)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and serve."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    serve(Config(**vars(args)))


if __name__ == "__main__":
    flags.run_main(main)
