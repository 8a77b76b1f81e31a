"""Write the table of refusals and errors in docs/clients.md: `python -m tests.texts_page`, or `make texts`.

Each case is made to happen, and the text is what a program got; ports and instances' numbers are made alike.
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from fleet_client import AsyncFleetTransport, FleetTransport, connection_pool, loop_side, thread_transport
from fleet_client.asgi_server import AsgiServer
from fleet_client.gateway import Gateway
from fleet_client.listening import bind_socket
from fleet_client.transport import require_httpx2
from localcloud.paced.tool_use import NO_AUTO
from tests.fake_fleet import FakeFleet, FakeLoadbalancer, Out, Seen, fake_fleet
from tests.loadbalancer_app import HOT, LoadBalancerApp
from tests.messages import hot_set
from tests.paths import ROOT
from tests.unit.fleet_client.users import break_off, plan, says, silent, stall

PAGE = ROOT / "docs" / "clients.md"

BEGIN, END = "<!-- texts: made by `make texts`; a test compares -->\n", "<!-- end of texts -->\n"

PROGRAM, OPERATOR = "program", "operator"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


@dataclass(frozen=True)
class Case:
    """A thing that goes wrong. got: makes it happen; turn: who must do something; do: what."""

    what: str
    got: Callable[[pytest.MonkeyPatch], str]
    turn: str
    do: str


class OlderRequest:
    """A request of the older httpx package, as its Client gives it to a transport."""


OlderRequest.__module__, OlderRequest.__qualname__ = "httpx", "Request"


# -- what a program gets ---------------------------------------------------------------------------------


def told(answer: httpx2.Response) -> str:
    """Return status, word and text of an error."""
    error = answer.json()["error"]
    return f"{answer.status_code} {error['code']}: {error['message']}"


@contextmanager
def gateway(fleet: FakeFleet, keys: frozenset[str] = frozenset(), **more: Any) -> Iterator[httpx2.Client]:
    """Run a gateway in this process; gives a client of it."""
    sock = bind_socket("127.0.0.1", 0)
    made = Gateway(AsyncFleetTransport(fleet.url, **more), keys, loopback=True)
    server = AsgiServer(made, sock, background=[made.leases])
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", trust_env=False) as client:
            yield client
    finally:
        server.stop()
        thread.join(30)


@contextmanager
def fleet() -> Iterator[FakeFleet]:
    """Two instances and a loadbalancer."""
    made = fake_fleet()
    try:
        yield made
    finally:
        made.stop()


def by_gateway(
    prepare: Callable[[FakeFleet], object] = lambda _: None,
    path: str = "/v1/chat/completions",
    keys: frozenset[str] = frozenset(),
    **headers: str,
) -> Callable[[pytest.MonkeyPatch], str]:
    """Return a case of the gateway: a POST of a chat, or a GET of another path."""

    def got(_: pytest.MonkeyPatch) -> str:
        with fleet() as one, gateway(one, keys, wait_s=0.2) as client:
            prepare(one)
            chat = path.startswith("/v1/chat")
            return told(
                client.request("POST" if chat else "GET", path, json=CHAT if chat else None, headers=headers)
            )

    return got


def by_transport(
    prepare: Callable[[FakeFleet], object], *, timeout_s: float = 20.0, **more: Any
) -> Callable[[pytest.MonkeyPatch], str]:
    """Return a case of FleetTransport: a stream of a chat."""

    def got(patch: pytest.MonkeyPatch) -> str:
        for module in (connection_pool, loop_side):
            patch.setattr(module, "SILENT_S", 0.1)
            patch.setattr(module, "LOOK_S", 0.05)
        patch.setattr(thread_transport, "ASKED_S", 0.05)
        with fleet() as one, httpx2.Client(transport=FleetTransport(one.url, wait_s=0.2)) as client:
            prepare(one)
            try:
                answer = client.post(
                    "http://fleet/v1/chat/completions", timeout=timeout_s, **({"json": CHAT} | more)
                )
            except httpx2.RequestError as e:
                return f"{type(e).__name__}: {e}"
            return told(answer)

    return got


def frozen(act: Any) -> Callable[[FakeFleet], None]:
    """Return what lets all instances do that, and the loadbalancer say that they are silent."""

    def prepare(one: FakeFleet) -> None:
        plan(one, *[act] * 20)
        known = one.loadbalancer

        async def answer(seen: Seen, out: Out) -> None:
            if seen.target == "/well":
                await out.answer(200, {"out": {str(instance.number): "silent" for instance in one.instances}})
            else:
                await FakeLoadbalancer.act(known, seen, out)

        known.act = answer  # type: ignore[method-assign]

    return prepare


def without(one: FakeFleet) -> None:
    """Stop the loadbalancer."""
    one.loadbalancer.stop()


def no_parser(one: FakeFleet) -> None:
    """Let the engine say what vLLM does without the flags."""
    plan(one, says(400, {"error": {"message": NO_AUTO, "code": 400}}))


def locked(one: FakeFleet) -> None:
    """Let the loadbalancer want a key."""
    one.loadbalancer.key = "k" * 32


def by_loadbalancer(
    heard_s: float | None, instances: list[Any] | None = None, **asked: Any
) -> Callable[[pytest.MonkeyPatch], str]:
    """Return a case of POST /route. heard_s: since when the autoscaler has said nothing; None: never."""

    def got(_: pytest.MonkeyPatch) -> str:
        app = LoadBalancerApp()
        if heard_s is not None:
            app.service.hot_set(hot_set({**HOT, "instances": instances or [], "max_model_len": 4096}))
            now = app.service.clock() + heard_s
            app.service.clock = lambda: now
        answer = app.client.post("/route", json={"prompt_tokens": 100, **asked})
        said = answer.get_json()
        return f"{answer.status_code} {said['error']}: {said['message']}"

    return got


def older_httpx(_: pytest.MonkeyPatch) -> str:
    """Give the transport a request of another package."""
    try:
        require_httpx2(OlderRequest(), "httpx2.Client")
    except TypeError as e:
        return f"TypeError: {e}"
    raise AssertionError("it was taken")


def too_large(patch: pytest.MonkeyPatch) -> str:
    """Send a body of more bytes than may be."""
    return by_transport(lambda _: None, json=None, content=b"x" * (64 * 1024 * 1024 + 1))(patch)


AGAIN, BEGUN = "clients try again by themselves", "send it again: clients do not, once an answer has begun"
CASES = (
    Case(
        "the loadbalancer is not there (gateway)",
        by_gateway(without),
        OPERATOR,
        "start it; meanwhile programs try again",
    ),
    Case(
        "the loadbalancer is not there (transport)",
        by_transport(without),
        OPERATOR,
        "start it, or correct the URL",
    ),
    Case("the same, `GET /health` of the gateway", by_gateway(without, "/health"), OPERATOR, "start it"),
    Case("the same, `GET /v1/models`", by_gateway(without, "/v1/models"), OPERATOR, "start it"),
    Case(
        "nothing is hot, and no autoscaler was ever there",
        by_loadbalancer(None),
        OPERATOR,
        "start the autoscaler",
    ),
    Case(
        "nothing is hot, and the autoscaler is silent",
        by_loadbalancer(61.0),
        OPERATOR,
        "see `GET /health` of the autoscaler",
    ),
    Case(
        "nothing is hot yet",
        by_loadbalancer(0.0),
        PROGRAM,
        "ask again after Retry-After, or give a longer `--wait-s`",
    ),
    Case(
        "nothing is hot yet, and the request was held",
        by_loadbalancer(0.0, wait_s=0.01),
        PROGRAM,
        "ask again after Retry-After",
    ),
    Case(
        "the loadbalancer wants a key (gateway)",
        by_gateway(locked),
        OPERATOR,
        "`--client-key-file` of the gateway",
    ),
    Case(
        "the loadbalancer wants a key (transport)",
        by_transport(locked),
        PROGRAM,
        "`api_key=` of the transport",
    ),
    Case(
        "the gateway wants a key",
        by_gateway(keys=frozenset(["k" * 32])),
        PROGRAM,
        "the key of `--key-file`, as a bearer or in `x-api-key`",
    ),
    Case(
        "a reverse proxy with its own Host",
        by_gateway(host="llm.example"),
        OPERATOR,
        "`--key-file`, or the gateway's own Host",
    ),
    Case(
        "a page of another site",
        by_gateway(origin="https://evil.example"),
        OPERATOR,
        "nothing, or `--key-file`",
    ),
    Case("a body of more than 64 MiB", too_large, PROGRAM, "send less"),
    Case(
        "a prompt that the model can never take",
        by_loadbalancer(0.0, prompt_tokens=100_000),
        PROGRAM,
        "a shorter prompt",
    ),
    Case("a client of the older httpx", older_httpx, PROGRAM, "`httpx2.Client(transport=…)`"),
    Case(
        "tools, and a profile of your own names no parser",
        by_gateway(no_parser),
        OPERATOR,
        "both flags in `vllm_args` of the profile",
    ),
    Case("a machine freezes while it answers", by_transport(frozen(stall)), PROGRAM, BEGUN),
    Case("all machines freeze before they answer", by_transport(frozen(silent)), PROGRAM, AGAIN),
    Case("an answer breaks off", by_transport(lambda one: plan(one, break_off)), PROGRAM, BEGUN),
    Case(
        "the program's own timeout",
        by_transport(lambda one: plan(one, silent), timeout_s=0.3),
        PROGRAM,
        "a longer timeout, or again",
    ),
)


def text(case: Case) -> str:
    """Return what a program reads in that case."""
    with pytest.MonkeyPatch.context() as patch:
        return re.sub(
            r"\b(127\.0\.0\.1(?::|', ))\d+",
            r"\g<1>8200",
            re.sub(r"instance \d+", "instance 7", case.got(patch)),
        )


def table() -> str:
    """Return the table."""
    rows = ["| what happened | what the program reads | whose turn | what to do |\n", "|---|---|---|---|\n"]
    rows += [f"| {case.what} | `{text(case)}` | {case.turn} | {case.do} |\n" for case in CASES]
    return "".join(rows)


def main() -> None:
    """Write the table into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
