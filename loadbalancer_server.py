"""The loadbalancer as a process: its flags and its routes.

python loadbalancer_server.py [flags]

Everything runs on one event loop and one thread: the views, and three background coroutines.

    clockwork     every 20 ms, while no request comes 200: fetch tokens, ask for load reports, serve waiters
    autoscaler    every second: say how busy it is, and fetch the hot set when it has changed
    ticks         every second: release what has expired

Nothing is locked because nothing is shared between threads; `LoadBalancerService` refuses every other thread.
"""

import asyncio
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from flask import Flask, Response, jsonify

from dispatch.allowance import MOST_UNUSED
from dispatch.chooser import FIRST_TOKEN_WEIGHT
from dispatch.outside.api_description import OPERATIONS
from dispatch.outside.background import BackgroundTasks
from dispatch.outside.metrics import LoadBalancerMetrics
from dispatch.outside.service import GRANT_AT_ONCE, LoadBalancerService
from dispatch.request_queue import LATE_BOUND_S
from dispatch.route_request import RouteRequest
from engine.slo import Slo
from fleet_client import flags, private_files
from fleet_client.flags import Parser, add_flags, check_flags, flag, server_url
from fleet_client.listening import bind_socket, check_bind
from fleet_client.network_trust import InTheClear, allow, clear_bind, clear_call
from fleet_client.own_tls import TrustedServer, scheme, server_tls
from fleet_client.service_manager import ServiceManager, set_up_logging
from fleet_client.trace_context import trace_id
from instance_client import request_id
from loadbalancer import LoadBalancer
from process.clock import steady_clock
from web.answers import Answer, JsonAnswer
from web.app import key_check, make_app
from web.bridge import serve_flask
from web.direct import Asker, DirectRoutes, Held, client_name, key_name
from web.keys import AccessKeys
from web.messages.decoding import decode
from web.messages.hot_set import MAX_HOT_BODY, HotSetTaken
from web.messages.leases import DoneBody, PaceBody, RouteBody, WellBody
from web.messages.reports import MAX_REPORT_BODY
from web.metrics import metrics_page
from web.openapi import add_openapi

log = logging.getLogger("loadbalancer")

PRIORITIES = {"high": 0, "normal": 1, "low": 2}

UNSAID_PRIORITY = "normal"
"""The highest priority of a client key whose line in the file says none. Without keys all is open: then the
clients are the operator's own programs."""


@dataclass(frozen=True)
class LoadBalancerConfig:
    """The settings of a loadbalancer process that an operator may give. Times in seconds."""

    host: str = flag("127.0.0.1", "address to listen on", metavar="ADDRESS")
    port: int = flag(8200, "port to listen on", least=1, most=65535)
    autoscaler: str = flag("http://127.0.0.1:8100", "where the autoscaler is", metavar="URL")
    label: str = flag(
        "fleet",
        "label of the fleet, as given to the autoscaler; names the state directory",
        metavar="LABEL",
    )
    state_dir: Path | None = flag(
        None,
        "directory of the control key, shared with the autoscaler",
        metavar="DIR",
        shown="~/.local/state/autoscaler-py/LABEL",
    )
    client_keys_file: Path | None = flag(
        None,
        "file of keys that /route, /done, /pace and /well then want, one a line, mode 0600; "
        "KEY priority=high may ask for high priority",
        shown="open on loopback",
    )
    operator_key_file: Path | None = flag(
        None,
        "file of keys that /status and /metrics then want, one a line, mode 0600",
        shown="open on loopback",
    )
    public_url: str | None = flag(
        None,
        "this server as instances reach it, so that they report by themselves",
        metavar="URL",
        shown="none but for instances on this machine",
    )
    tls_cert: Path | None = flag(
        None, "certificate to show, PEM, with its chain if it has one; the server then speaks https only"
    )
    tls_key: Path | None = flag(None, "its key, PEM, mode 0600")
    autoscaler_cert: Path | None = flag(
        None,
        "certificates that an https autoscaler may show, PEM, and no others",
        shown="what this machine's authorities vouch for",
    )
    trust_network: bool = flag(
        False,
        "speak plain HTTP beyond this machine, too: all who can listen there have the keys and the master "
        "tokens, and who can change what passes can read prompts",
    )
    # Clients start their requests within a second or so.
    lease_s: float = flag(
        60.0, "seconds after which a lease that was not started is void", least=1.0, most=600.0
    )
    max_held: int = flag(  # about 10 kB each
        5000,
        "requests with wait_s that wait at once, of one client nine times as many as are free; beyond it 503",
        least=0,
        most=100_000,
        unit="requests",
    )
    max_unused: int = flag(
        MOST_UNUSED,
        "leases that one client may have and not have used; beyond it 429",
        least=1,
        most=200_000,
        unit="leases",
    )
    late_lane: bool = flag(
        True,
        "requests that cannot be in time any more wait behind those that can; without it all wait in "
        "one line",
    )
    late_bound_s: float = flag(
        LATE_BOUND_S, "seconds after which a late request goes before all others", least=0.0, most=86_400.0
    )
    first_token_weight: float = flag(
        FIRST_TOKEN_WEIGHT,
        "seconds of whole latency that a second of first token is worth when an instance is chosen",
        least=0.0,
        most=1000.0,
        unit="s/s",
    )
    first_token_s: float = flag(
        Slo().first_token_s,
        "a request is in time when its first token comes within so many seconds",
        least=1e-3,
        most=3600.0,
    )
    prompt_token_s: float = flag(
        Slo().prompt_token_s, "seconds more for each token of its prompt", least=0.0, most=1.0, unit="s/token"
    )
    # With up to 200 working instances; with more they get older.
    poll_interval_s: float = flag(
        1.0, "seconds between load reports of a working instance", least=0.1, most=60.0
    )

    def checked(self) -> "LoadBalancerConfig":
        """Return this configuration, or raise ConfigError naming the flag, the value and the range."""
        check_flags(self)
        server_url("--autoscaler", self.autoscaler)
        if self.public_url is not None:
            server_url("--public-url", self.public_url)
        return self

    @property
    def slo(self) -> Slo:
        """The latency objective: after it a request counts as late."""
        return Slo(self.first_token_s, self.prompt_token_s)

    def report_to(self, auth_url: str) -> str | None:
        """Return the URL to which the instance with that auth_server sends its reports; None: it cannot."""
        if self.public_url is not None:
            return f"{self.public_url.rstrip('/')}/report"
        # Beside us on one machine, as with a local cloud; a rented one would talk to itself.
        near = urlsplit(auth_url).hostname == "127.0.0.1" and self.host in ("127.0.0.1", "0.0.0.0")  # noqa: S104
        return f"{scheme(self.tls_cert)}://127.0.0.1:{self.port}/report" if near else None

    def in_the_clear(self) -> list[InTheClear]:
        """Return what goes over a network unencrypted with this configuration."""
        keys = "the control key and all master tokens"
        clients = f"{keys}, the clients' keys and their leases, by which prompts find their way,"
        return [
            *clear_bind(self.host, clients, encrypted=self.tls_cert is not None),
            *clear_call("--autoscaler", self.autoscaler, keys),
            *clear_call("--public-url", self.public_url or "", "how busy each instance is"),
        ]


# -- the routes ------------------------------------------------------------------------------------------


def create_app(service: LoadBalancerService, keys: AccessKeys) -> Flask:
    """Make the loadbalancer's Flask app with its routes.

    Views check, act and answer; what is decided is decided in `loadbalancer.py`.
    """
    app = make_app("loadbalancer", large_bodies={"/hot": MAX_HOT_BODY, "/report": MAX_REPORT_BODY})
    direct = DirectRoutes(app)
    highest = {key_name(k): PRIORITIES[keys.priorities.get(k, UNSAID_PRIORITY)] for k in keys.clients}

    def route(raw: bytes, asker: Asker) -> JsonAnswer | Held:
        said, client = decode(raw, RouteBody), client_name(asker) if keys.for_clients() else asker.peer
        trace = trace_id(asker.said.get(b"traceparent", b""))
        ask = _ask(service.balancer, said, client, highest, trace)
        return service.route(ask, said.wait_s or 0.0, said.count)

    direct.add("POST", "/route", route, key_check(keys.for_clients))

    direct.post("/done", DoneBody, keys.for_clients)(service.done)

    direct.post("/pace", PaceBody, keys.for_clients)(service.pace)

    direct.post("/well", WellBody, keys.for_clients)(service.well)

    direct.get("/model", keys.for_clients)(service.model)

    @direct.put("/hot", keys.for_control)
    async def hot(raw: bytes) -> JsonAnswer:
        news = await service.take_hot_set(await service.reader.read(raw))
        now = service.balancer.instances.hot_set
        epoch, version = (now.epoch, now.version) if now else (None, None)
        return JsonAnswer(HotSetTaken(news, epoch, version, service.name))

    def report(raw: bytes, asker: Asker) -> JsonAnswer:
        return service.report(raw, asker.authorization)

    # Its body is signed, so it must be read to be sure; only that of an instance that is known is.
    direct.add("POST", "/report", report, service.report_refusal)

    direct.get("/status", keys.for_operator)(service.status)

    @app.get("/health")
    def health() -> Response:
        return jsonify(status="ok", hot=service.balancer.instances.hot)

    @direct.get("/metrics", keys.for_operator)
    async def metrics(accept: str) -> Answer:
        figures = await LoadBalancerMetrics.read(service)
        # 10,000 instances take 0.3 s to write; the loop then waits for Python's lock 5 ms at a time.
        return await asyncio.to_thread(metrics_page, figures, accept)

    add_openapi(app, "loadbalancer", OPERATIONS)
    return app


def _ask(
    balancer: LoadBalancer, said: RouteBody, client: str, highest: Mapping[str, int], trace: str
) -> RouteRequest | None:
    """Return the request that a `POST /route` body asks for; None if the model can never take its prompt.

    highest: the priority that each client may ask for. trace: the id of the client's trace.
    """
    prompt = balancer.possible_prompt(said.prompt_tokens or 0, said.prompts or 1)
    if prompt is None:
        return None
    return RouteRequest(
        balancer.work_of(prompt, said.max_tokens) if said.work is None else said.work,
        said.max_tokens,
        frozenset(said.avoid or ()),
        prompt,
        tuple(said.affinity or ()),
        max(PRIORITIES[said.priority or "normal"], highest.get(client, 0)),
        client,
        trace,
    )


def make_balancer(config: LoadBalancerConfig) -> LoadBalancer:
    """Return the LoadBalancer with the settings of the operator."""
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


def serve(config: LoadBalancerConfig) -> None:
    """Run a loadbalancer until SIGTERM or Ctrl-C.

    Its leases and tokens are forgotten then: clients hold what they need.
    """
    config = config.checked()
    rights = private_files.load_key_rights(config.client_keys_file, "priority", tuple(PRIORITIES))
    clients = frozenset(rights)
    operator = frozenset(private_files.load_named_keys(config.operator_key_file))
    check_bind(config.host, config.port, keys_present=bool(clients) and bool(operator))
    allow(config.in_the_clear(), trust_network=config.trust_network)
    tls = server_tls(config.tls_cert, config.tls_key)
    trusted = TrustedServer("--autoscaler-cert", config.autoscaler_cert)
    state_dir = private_files.make_private_dir(
        config.state_dir or private_files.default_state_dir(config.label)
    )
    said = {key: priority for key, priority in rights.items() if priority is not None}
    keys = AccessKeys(private_files.load_or_make_key(state_dir / "control.key"), clients, operator, said)
    sock = bind_socket(config.host, config.port)
    service = LoadBalancerService(make_balancer(config), steady_clock())
    tasks = BackgroundTasks(service, config.autoscaler, keys.control, config.report_to, trusted)
    manager = ServiceManager()

    async def service_manager() -> None:
        await manager.keep_informed(lambda: service.heard_at is not None)

    log.info("loadbalancer of fleet %s on %s://%s:%d", config.label, scheme(tls), config.host, config.port)
    serve_flask(
        create_app(service, keys),
        sock,
        background=[tasks.clockwork, tasks.ticks, tasks.autoscaler, service_manager],
        any_host=bool(clients and operator),
        tls=tls,
    )


def parser() -> Parser:
    """Return the parser of the loadbalancer's flags."""
    found = Parser(
        prog="loadbalancer_server.py",
        environment="LOADBALANCER_",
        description=(__doc__ or "").split("\n")[0],
        epilog="Listening off loopback needs both key files.",
    )
    add_flags(found, LoadBalancerConfig)
    return found


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and run the loadbalancer."""
    args = parser().parse_args(argv)
    set_up_logging()
    serve(LoadBalancerConfig(**vars(args)))


if __name__ == "__main__":
    flags.run_main(main)
