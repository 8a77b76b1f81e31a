"""The gateway: the fleet for programs that only take a base URL and a key."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fleet_client import AsyncFleetTransport, gateway
from fleet_client.asgi_server import AsgiServer
from fleet_client.connection_pool import Header
from fleet_client.gateway import Gateway, GatewayConfig
from fleet_client.gateway_access import from_loopback, preflight, refusal
from fleet_client.listening import bind_socket
from process.errors import ConfigError
from tests.commands import run_command
from tests.fake_fleet import Act, FakeFleet, Out, Seen, fake_fleet, make_certificate
from tests.paths import ROOT
from tests.ports import free_port
from tests.waiting import wait_for

SECRET = "the quick brown fox and his secret"
KEY = "k" * 32
ALL = "one two three four five"


# -- who may ask ---------------------------------------------------------------------------------------


def status(*headers: Header, keys: frozenset[str] = frozenset(), loopback: bool = True) -> int:
    """That of the refusal, 200 without one."""
    reply = refusal(headers, keys, loopback=loopback)
    return 200 if reply is None else reply.status


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"host", b"127.0.0.1:8300")],
        [(b"host", b"localhost:8300")],
        [(b"host", b"[::1]:8300")],
        [(b"host", b"127.0.0.1:8300"), (b"origin", b"http://localhost:3000")],
        [(b"origin", b"https://127.0.0.1")],
        [(b"origin", b"http://localhost:3000"), (b"sec-fetch-site", b"cross-site")],
        [(b"sec-fetch-site", b"none")],
        [(b"sec-fetch-site", b"same-origin")],
    ],
    ids=str,
)
def test_programs_and_pages_of_this_machine_may_ask(headers: list[Header]) -> None:
    assert status(*headers) == 200


@pytest.mark.parametrize(
    "headers",
    [
        [(b"host", b"evil.example:8300")],
        [(b"host", b"127.0.0.1.evil.example")],
        [(b"host", b"localhost:8300"), (b"host", b"evil.example")],
        [(b"host", b"")],
        [(b"origin", b"https://evil.example")],
        [(b"origin", b"null")],
        [(b"origin", b"")],
        [(b"origin", b"file://")],
        [(b"origin", b"http://localhost.evil.example")],
        [(b"origin", b"http://evil.example:80@localhost")],
        [(b"origin", b"http://localhost@evil.example")],
        [(b"origin", b"chrome-extension://localhost")],
        [(b"origin", b"http://localhost"), (b"origin", b"http://evil.example")],
        [(b"sec-fetch-site", b"cross-site")],
        [(b"sec-fetch-site", b"Cross-Site")],
        [(b"sec-fetch-site", b"same-site")],
    ],
    ids=str,
)
def test_pages_from_elsewhere_may_not(headers: list[Header]) -> None:
    assert status(*headers) == 403


def test_with_keys_the_key_is_the_proof_and_nothing_else() -> None:
    keys = frozenset({KEY, "m" * 32})
    good = (b"authorization", b"Bearer " + KEY.encode())
    for more in ([], [(b"host", b"gateway.example")], [(b"origin", b"https://app.example")]):
        assert status(good, *more, keys=keys) == 200
        assert status(*more, keys=keys) == 401
    assert status(good, good, keys=keys) == 401
    assert status((b"authorization", b"Bearer " + b"x" * 32), keys=keys) == 401
    assert status((b"authorization", KEY.encode()), keys=keys) == 401
    assert status((b"authorization", b"Bearer \xff"), keys=keys) == 401
    for name in (b"x-api-key", b"api-key"):  # as anthropic's package says it, and Azure's
        assert status((name, KEY.encode()), keys=keys) == 200
        assert status((name, b"x" * 32), keys=keys) == 401
        assert status((name, KEY.encode()), (b"authorization", b"Bearer " + b"x" * 32), keys=keys) == 401


def test_who_is_refused_for_his_host_is_told_what_to_do() -> None:
    reply = refusal([(b"host", b"gateway.example")], (), loopback=True)
    assert reply is not None
    assert b"give the gateway --key-file" in (reply.body or b"")


def test_off_loopback_a_host_has_any_name() -> None:
    assert status((b"host", b"box.lan:8300"), loopback=False) == 200


def test_a_page_of_this_machine_is_told_that_it_may_ask() -> None:
    asks = (b"access-control-request-method", b"POST")
    named = (b"access-control-request-headers", b"authorization,content-type")
    reply = preflight([(b"origin", b"http://localhost:3000"), asks, named])
    assert reply is not None
    assert (b"Access-Control-Allow-Origin", b"http://localhost:3000") in reply.headers
    assert (b"Access-Control-Allow-Headers", b"authorization,content-type") in reply.headers
    assert preflight([(b"origin", b"https://evil.example"), asks]) is None
    assert preflight([(b"origin", b"http://localhost:3000")]) is None
    assert preflight([asks]) is None
    assert not from_loopback(b"localhost")


# -- settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"port": 0}, "--port 0: wanted 1 to 65535"),
        ({"ahead": 257}, "--ahead 257"),
        ({"wait_s": -1.0}, "--wait-s -1"),
        ({"max_tries": 0}, "--max-tries 0"),
        ({"loadbalancer": "127.0.0.1:8200"}, "--loadbalancer"),
        ({"priority": "urgent"}, "--priority urgent: wanted high, normal or low"),
    ],
)
def test_wrong_values_name_the_flag_and_the_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        GatewayConfig(**wrong).checked()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_it_does_not_listen_off_loopback_without_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="needs keys"):
        gateway.serve(GatewayConfig(host=host))


def test_leases_in_the_clear_need_a_word_of_the_user() -> None:
    with pytest.raises(ConfigError, match=r"plain HTTP beyond.* the leases.*--trust-network"):
        gateway.serve(GatewayConfig(loadbalancer="http://192.0.2.1:8200"))


# -- running -------------------------------------------------------------------------------------------


@pytest.fixture
def fleet() -> Iterator[FakeFleet]:
    """Two instances with TLS."""
    made = fake_fleet()
    yield made
    made.stop()


@contextmanager
def running(fleet: FakeFleet, keys: frozenset[str] = frozenset(), **more: Any) -> Iterator[int]:
    """A gateway in this process; gives its port."""
    sock = bind_socket("127.0.0.1", 0)
    port: int = sock.getsockname()[1]
    made = Gateway(AsyncFleetTransport(fleet.url, **more), keys, loopback=True)
    server = AsgiServer(made, sock, background=[made.leases])
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield port
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


def client(port: int, key: str = "any-text", **more: Any) -> openai.OpenAI:
    """openai's own, which knows a base URL and a key."""
    http = httpx2.Client(trust_env=False, timeout=30.0)
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key=key, http_client=http, max_retries=0, **more
    )


def chat(one: openai.OpenAI, **more: Any) -> Any:
    """An answer to the secret prompt."""
    messages: Any = [{"role": "user", "content": SECRET}]
    return one.chat.completions.create(model="m", messages=messages, **more)


def text(one: openai.OpenAI) -> str:
    """That of a streamed answer."""
    return "".join(part.choices[0].delta.content for part in chat(one, stream=True))


class Raw:
    """One connection, written and read byte by byte."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), 20)

    def send(self, method: str, target: str, body: bytes = b"", **headers: str) -> None:
        pairs = {"Host": "127.0.0.1", "Content-Length": str(len(body))} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in pairs.items() if value)
        self.sock.sendall(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body)

    def until(self, end: bytes) -> bytes:
        """What comes up to there."""
        got = b""
        while not got.endswith(end):
            more = self.sock.recv(65536)
            assert more, got
            got += more
        return got

    def rest(self) -> bytes:
        """What comes until the connection ends."""
        got = b""
        while more := self.sock.recv(65536):
            got += more
        return got


def ask(port: int, method: str, target: str, body: bytes = b"", **headers: str) -> tuple[int, bytes, bytes]:
    """(status, head, body) of an answer on a connection of its own."""
    raw = Raw(port)
    raw.send(method, target, body, **({"Connection": "close"} | headers))
    with raw.sock:
        head, _, rest = raw.rest().partition(b"\r\n\r\n")
    return int(head.split()[1]), head, rest


def plan(fleet: FakeFleet, act: Act) -> None:
    """Whichever instance the next request comes to, it does this; after that, too."""
    for instance in fleet.instances:
        instance.plan.extend([act] * 20)


def test_openai_works_with_nothing_but_a_base_url(fleet: FakeFleet) -> None:
    with running(fleet) as port, client(port, key="sk-any-key") as one:
        assert chat(one).choices[0].message.content == ALL
        assert text(one) == ALL
        assert one.completions.create(model="m", prompt=SECRET).choices[0].text == ALL
        assert [model.id for model in one.models.list()] == ["vllm-13"]
    assert SECRET.encode() not in fleet.loadbalancer.received
    assert all(b"sk-any-key" not in instance.received for instance in fleet.instances)
    tokens = [f"Bearer {given.token}" for given in fleet.loadbalancer.given]
    assert sorted(tokens) == sorted(str(seen.header("authorization")) for seen in fleet.requests)


def test_an_answer_passes_as_it_is_but_for_the_headers_of_its_connection(fleet: FakeFleet) -> None:
    async def odd(seen: Seen, out: Out) -> None:
        headers = {
            "Content-Type": "application/x-odd",
            "X-Two": "1\r\nX-Two: 2",
            "Server": "odd/1",
            "Date": "yesterday",
            "Connection": "keep-alive, X-Hop",
            "X-Hop": "1",
            "Keep-Alive": "timeout=5",
        }
        await out.answer(418, b"\x00\xff" + seen.target.encode() + b" " + seen.body, headers)

    plan(fleet, odd)
    with running(fleet) as port:
        got, head, body = ask(
            port,
            "PATCH",
            "/v1/a%2Fb//c?x=%20&y",
            b"\x01\x02",
            X_Mine="1",
            Connection="close, X-Gone",
            X_Gone="1",
        )
    assert (got, body) == (418, b"\x00\xff/v1/a%2Fb//c?x=%20&y \x01\x02")
    lines = head.decode().lower().split("\r\n")[1:]
    assert [line for line in lines if line.startswith("x-")] == ["x-two: 1", "x-two: 2"]
    assert {"server: odd/1", "date: yesterday", "content-type: application/x-odd"} <= set(lines)
    seen = fleet.requests[0]
    assert seen.header("x-mine") == "1"
    assert seen.header("x-gone") is None
    assert seen.header("host") != "127.0.0.1"
    assert {name.lower() for name, _ in seen.headers} == {"host", "content-length", "x-mine", "authorization"}


@pytest.mark.parametrize("code", [400, 404, 422, 500])
def test_errors_pass_as_they_are(fleet: FakeFleet, code: int) -> None:
    async def error(seen: Seen, out: Out) -> None:
        await out.answer(code, {"error": {"message": "as it is", "code": code}}, {"X-Request-Id": "7"})

    plan(fleet, error)
    with running(fleet) as port:
        got, head, body = ask(port, "POST", "/v1/completions", b"{}")
    assert (got, json.loads(body)) == (code, {"error": {"message": "as it is", "code": code}})
    assert b"x-request-id: 7" in head


def test_a_stream_passes_event_by_event(fleet: FakeFleet) -> None:
    for instance in fleet.instances:
        instance.pause_s = 60.0
    with running(fleet) as port:
        raw = Raw(port)
        raw.send("POST", "/v1/completions", b'{"model": "m", "prompt": "x", "stream": true}')
        assert b'"text": "one"' in raw.until(b"\n\n\r\n")  # the second event is a minute away
        raw.sock.close()
        wait_for("the instance sees it", lambda: sum(one.disconnects for one in fleet.instances) == 1)


def test_when_its_client_goes_before_the_answer_the_instance_learns_of_it(fleet: FakeFleet) -> None:
    async def silent(seen: Seen, out: Out) -> None:
        await out.gone.wait()

    plan(fleet, silent)
    with running(fleet) as port:
        raw = Raw(port)
        raw.send("POST", "/v1/completions", b'{"model": "m", "prompt": "x"}')
        wait_for("the request", lambda: len(fleet.requests) == 1)
        raw.sock.close()
        wait_for("the connection is gone", lambda: not any(one.open for one in fleet.instances))


def test_an_answer_that_breaks_off_breaks_off_here_too(fleet: FakeFleet) -> None:
    async def break_off(seen: Seen, out: Out) -> None:
        await out.start(200, {"Content-Type": "text/event-stream"})
        await out.chunk(b'data: {"choices": [{"index": 0, "delta": {"content": "one"}}]}\n\n')
        out.abort()

    plan(fleet, break_off)
    with running(fleet) as port:
        raw = Raw(port)
        raw.send("POST", "/v1/completions", b"{}")
        got = raw.rest()
        raw.sock.close()
        with client(port) as one, pytest.raises(openai.APIConnectionError):
            text(one)
    assert got.endswith(b'"one"}}]}\n\n\r\n')  # and no end
    wait_for("both are told", lambda: len(fleet.loadbalancer.dones) == 2)


def test_what_no_instance_answers_is_openais_own_error(fleet: FakeFleet) -> None:
    async def hang_up(seen: Seen, out: Out) -> None:
        out.abort()

    plan(fleet, hang_up)
    with running(fleet, wait_s=0.5) as port, client(port) as one:
        with pytest.raises(openai.InternalServerError, match="instance ") as e:
            chat(one)
        assert (e.value.status_code, e.value.code) == (502, "instance_failed")
        fleet.loadbalancer.refusals.append((503, 40))
        with pytest.raises(openai.InternalServerError, match="every instance is busy") as e:
            chat(one)
        assert (e.value.status_code, e.value.response.headers["retry-after"]) == (503, "40")


async def redirects_to_itself(seen: Seen, out: Out) -> None:
    """Say what uvicorn would, and more."""
    netloc = seen.header("host") or ""
    headers = {"Location": f"https://{netloc}/v1/models", "Link": f"<https://{netloc}/>", "X-By": netloc}
    await out.answer(307, b"", {**headers, "Alt-Svc": f'h3="{netloc}"', "Content-Location": f"//{netloc}/"})


async def hangs_up(seen: Seen, out: Out) -> None:
    """End the connection without a word."""
    out.abort()


async def speaks_no_http(seen: Seen, out: Out) -> None:
    """Answer with a head that is none."""
    await out.raw(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n")


async def is_full(seen: Seen, out: Out) -> None:
    """Have no room."""
    netloc = seen.header("host") or ""
    await out.answer(503, {"error": {"message": "no room"}}, {"X-By": netloc})


def test_no_answer_names_an_instance(fleet: FakeFleet) -> None:
    """Whatever happens: every byte that a client gets is looked at."""
    got = b""
    closed = free_port()
    ports = [closed, *(instance.port for instance in fleet.instances)]
    with running(fleet, wait_s=0.2, max_tries=2) as port:
        for act in (redirects_to_itself, hangs_up, speaks_no_http, is_full):
            plan(fleet, act)
            got += b"".join(ask(port, "POST", "/v1/completions/", b"{}")[1:])
            for instance in fleet.instances:
                instance.plan.clear()
        for wrong in (
            {"address": f"https://127.0.0.1:{closed}"},
            {"certificate": make_certificate()[0]},
            {"certificate": None},
            {"address": f"{fleet.instances[0].address}/v1"},
            {"token": "wrong"},
        ):
            fleet.loadbalancer.wrong = dict.fromkeys((1, 2), wrong)
            got += b"".join(ask(port, "POST", "/v1/completions", b"{}")[1:])
    assert got.count(b"307 Temporary Redirect") == 1
    assert got.count(b"instance_failed") == 6
    assert [one for one in ports if str(one).encode() in got] == []


def test_a_client_that_follows_a_redirect_takes_a_lease_of_its_own(fleet: FakeFleet) -> None:
    """It sends the prompt on to where Location says, as curl -L does."""
    for instance in fleet.instances:
        instance.plan.append(redirects_to_itself)
    url = "http://127.0.0.1:%d/v1/completions/"
    with running(fleet) as port, httpx2.Client(trust_env=False, follow_redirects=True) as one:
        response = one.post(url % port, json={"model": "m", "prompt": "x"})
        assert response.status_code == 200
        assert str(response.url) == f"http://127.0.0.1:{port}/v1/models"
    tokens = [f"Bearer {given.token}" for given in fleet.loadbalancer.given]
    assert len(tokens) >= 2
    assert sorted(str(seen.header("authorization")) for seen in fleet.requests) == sorted(tokens)


def test_a_missing_key_of_the_gateway_is_not_the_users(fleet: FakeFleet) -> None:
    fleet.loadbalancer.key = KEY
    with running(fleet, wait_s=0.5) as port, client(port) as one:
        with pytest.raises(openai.InternalServerError, match="--client-key-file of the gateway") as e:
            chat(one)
        assert (e.value.status_code, e.value.code) == (502, "loadbalancer_key")


def test_a_loadbalancer_that_is_not_there_is_called_so_and_can_be_tried_again(fleet: FakeFleet) -> None:
    with running(fleet, wait_s=0.2) as port, client(port) as one:
        fleet.loadbalancer.stop()
        with pytest.raises(
            openai.InternalServerError, match=f"loadbalancer {fleet.url} does not answer"
        ) as e:
            chat(one)
        assert (e.value.status_code, e.value.code) == (503, "loadbalancer_unreachable")
        assert e.value.response.headers["retry-after"] == "1"
        assert "ssl" not in str(e.value)
        assert "ConnectionRefusedError" in str(e.value)


def test_another_instance_is_tried_before_the_first_byte(fleet: FakeFleet) -> None:
    async def full(seen: Seen, out: Out) -> None:
        await out.answer(503, {"error": {"message": "no room"}})

    fleet.instances[0].plan.append(full)
    fleet.instances[1].plan.append(full)
    with running(fleet) as port, client(port) as one:
        for instance in fleet.instances[:1]:
            instance.plan.clear()
        assert text(one) == ALL
        assert text(one) == ALL
    assert [done["why"] for done in fleet.loadbalancer.dones] == ["status_503"]


def test_pages_from_elsewhere_spend_nothing(fleet: FakeFleet) -> None:
    with running(fleet) as port:
        assert ask(port, "GET", "/v1/models", Host="evil.example")[0] == 403
        assert ask(port, "POST", "/v1/completions", b"{}", Origin="https://evil.example")[0] == 403
        assert ask(port, "POST", "/v1/completions", b"{}", Origin="null", Content_Type="text/plain")[0] == 403
        assert ask(port, "GET", "/v1/models", Sec_Fetch_Site="cross-site")[0] == 403
        asks = {"Origin": "https://evil.example", "Access_Control_Request_Method": "POST"}
        assert ask(port, "OPTIONS", "/v1/completions", b"", **asks)[0] == 403
        assert fleet.loadbalancer.routes == []


def test_a_page_of_this_machine_may_ask_and_read(fleet: FakeFleet) -> None:
    with running(fleet) as port:
        here = {"Origin": "http://localhost:3000"}
        got, head, _ = ask(
            port, "OPTIONS", "/v1/completions", b"", **here, Access_Control_Request_Method="POST"
        )
        assert got == 204
        assert fleet.loadbalancer.routes == []
        got, head, _ = ask(port, "GET", "/v1/models", b"", **here)
        assert got == 200
        assert b"access-control-allow-origin: http://localhost:3000" in head


def test_with_a_key_requests_need_it(fleet: FakeFleet) -> None:
    with running(fleet, keys=frozenset({KEY})) as port:
        with client(port, key="wrong") as one, pytest.raises(openai.AuthenticationError, match="its own key"):
            chat(one)
        assert ask(port, "GET", "/health")[0] == 200
        assert fleet.loadbalancer.routes == []
        with client(port, key=KEY) as one:
            assert text(one) == ALL
        assert all(KEY.encode() not in instance.received for instance in fleet.instances)


def test_health_is_its_own_and_the_loadbalancers(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(fleet) as port:
        got, _, body = ask(port, "GET", "/health")
        assert (got, json.loads(body)) == (200, {"status": "ok"})
        fleet.loadbalancer.stop()
        assert ask(port, "GET", "/health")[0] == 200, "it was asked a moment ago"
        monkeypatch.setattr(gateway, "HEALTH_KEPT_S", 0.0)
        wait_for("it is asked again", lambda: ask(port, "GET", "/health")[0] == 503)
        said = json.loads(ask(port, "GET", "/health")[2])["error"]
    assert said["code"] == "loadbalancer_unwell"
    assert said["message"].startswith(f"loadbalancer {fleet.url} does not answer (")
    assert fleet.loadbalancer.routes == []


def test_the_model_is_told_at_once_with_nothing_hot(fleet: FakeFleet) -> None:
    """Programs that list models at their start would hang for as long as a start takes."""
    fleet.loadbalancer.room = 0
    with running(fleet, wait_s=60.0) as port:
        with client(port) as one:
            (card,) = one.models.list().data
        assert (card.id, card.owned_by, card.object) == ("vllm-13", "fleet", "model")
        assert json.loads(ask(port, "GET", "/v1/models")[2])["data"][0]["max_model_len"] == 4096
        for said, status, code in (
            ((503, {"error": "not_ready", "message": "no hot set"}), 503, "loadbalancer_unwell"),
            ((401, {"error": "unauthorized", "message": "no"}), 502, "loadbalancer_key"),
            ((200, []), 502, "loadbalancer_unwell"),
        ):
            fleet.loadbalancer.model = said
            got, _, body = ask(port, "GET", "/v1/models")
            assert (got, json.loads(body)["error"]["code"]) == (status, code)
        assert fleet.loadbalancer.routes == []
        fleet.loadbalancer.stop()
        assert ask(port, "GET", "/v1/models")[0] == 503


def test_the_models_of_a_loadbalancer_that_is_older_are_asked_of_an_instance(fleet: FakeFleet) -> None:
    fleet.loadbalancer.model = (404, {"error": "not_found", "message": "no"})
    with running(fleet) as port:
        ask(port, "GET", "/v1/models")
    assert [seen.target for seen in fleet.requests] == ["/v1/models"]


def test_its_metrics_are_its_own_and_cost_no_lease(fleet: FakeFleet) -> None:
    plan(fleet, break_off_after_a_word)
    with running(fleet, max_tries=1) as port:
        assert ask(port, "GET", "/metrics")[0] == 200
        assert fleet.loadbalancer.routes == []
        with client(port) as one, pytest.raises((openai.APIError, httpx2.RemoteProtocolError)):
            text(one)
        for instance in fleet.instances:
            instance.plan.clear()
        with client(port) as one:
            assert text(one) == ALL
        wait_for("the end", lambda: b"gateway_open_requests 0.0" in ask(port, "GET", "/metrics")[2])
        page = ask(port, "GET", "/metrics")[2].decode()
    found = {s.name: s.value for f in text_string_to_metric_families(page) for s in f.samples}
    assert found["gateway_answers_total"] == 2.0
    assert found["gateway_broken_answers_total"] == 1.0
    assert found["gateway_setbacks_total"] == 1.0
    assert found["gateway_first_byte_seconds_count"] == 2.0
    assert "vllm" not in page


async def break_off_after_a_word(seen: Seen, out: Out) -> None:
    """An answer that ends in the middle."""
    await out.start(200, {"Content-Type": "text/event-stream"})
    await out.chunk(b'data: {"choices": [{"delta": {"content": "one"}}]}\n\n')
    out.abort()


def test_a_body_that_is_too_large_is_refused(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "MAX_BODY", 100_000)
    with running(fleet) as port:
        got, _, body = ask(port, "POST", "/v1/completions", b"x" * 200_000)
        assert (got, json.loads(body)["error"]["code"]) == (413, "request_too_large")
        assert fleet.loadbalancer.routes == []


def test_a_large_body_and_a_chunked_one_arrive_whole(fleet: FakeFleet) -> None:
    large = json.dumps({"model": "m", "prompt": "x" * 3_000_000}).encode()
    with running(fleet) as port:
        assert ask(port, "POST", "/v1/completions", large)[0] == 200
        raw = Raw(port)
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (b'{"prompt": ', b'"x"}'))
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw.sock.sendall(head + chunks + b"0\r\n\r\n")
        assert b"one two" in raw.until(b"}}")
        raw.sock.close()
    assert {seen.body for seen in fleet.requests} == {large, b'{"prompt": "x"}'}


def test_connections_of_a_program_are_kept_alive(fleet: FakeFleet) -> None:
    with running(fleet) as port:
        raw = Raw(port)
        for _ in range(3):
            raw.send("POST", "/v1/completions", b'{"model": "m", "prompt": "x"}')
            assert b"200 OK" in raw.until(b"}}")
        raw.sock.close()


def test_a_program_that_reads_slowly_gets_all_of_it(fleet: FakeFleet) -> None:
    piece = b"x" * 65536

    async def long(seen: Seen, out: Out) -> None:
        await out.start(200)
        for _ in range(200):
            await out.chunk(piece)
        await out.end()

    plan(fleet, long)
    with running(fleet) as port, socket.create_connection(("127.0.0.1", port), 20) as sock:
        sock.sendall(b"GET /v1/x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        time.sleep(0.2)  # everything between is full by now; nothing depends on it
        size = 0
        while more := sock.recv(65536):
            size += len(more)
    assert size > 200 * len(piece)


def test_who_waits_for_a_lease_is_told_when_it_ends(fleet: FakeFleet) -> None:
    async def hold(seen: Seen, out: Out) -> None:
        fleet.loadbalancer.routes.append(seen.json)
        await out.gone.wait()

    fleet.loadbalancer.act = hold  # type: ignore[method-assign]
    answers: list[tuple[int, bytes, bytes]] = []
    with running(fleet) as port:
        thread = threading.Thread(target=lambda: answers.append(ask(port, "POST", "/tokenize")))
        thread.start()
        wait_for("it waits", lambda: fleet.loadbalancer.routes)
    thread.join(20)
    assert answers[0][0] == 503
    assert b"shutting_down" in answers[0][2]


def test_leases_ahead_make_the_round_trip_unnecessary_and_go_back_at_the_end(fleet: FakeFleet) -> None:
    with running(fleet, ahead=3) as port, client(port) as one:
        assert text(one) == ALL
        wait_for("three leases", lambda: len(fleet.loadbalancer.given) >= 4)
    used = [token for instance in fleet.instances for token in instance.used]
    unused = {given.request_id for given in fleet.loadbalancer.given if given.token not in used}
    assert {done["request_id"] for done in fleet.loadbalancer.dones} == unused


def test_a_requests_priority_passes_through_to_the_loadbalancer_and_no_further(fleet: FakeFleet) -> None:
    with running(fleet, priority="low") as port, client(port) as one:
        chat(one)
        chat(one, extra_headers={"X-Fleet-Priority": "high"})
        with pytest.raises(openai.BadRequestError, match="X-Fleet-Priority: wanted high") as e:
            chat(one, extra_headers={"X-Fleet-Priority": "urgent"})
        assert e.value.param == "X-Fleet-Priority"
    assert [said.get("priority") for said in fleet.loadbalancer.routes] == ["low", "high"]
    assert all(seen.header("x-fleet-priority") is None for seen in fleet.requests)


def test_gateways_with_one_salt_make_the_same_hashes_and_no_prompt_is_in_them(fleet: FakeFleet) -> None:
    body = json.dumps({"model": "m", "prompt": SECRET * 200}).encode()
    salts: list[dict[str, Any]] = [{"affinity_salt": KEY}, {"affinity_salt": KEY}, {}, {"affinity": False}]
    for more in salts:
        with running(fleet, **more) as port:
            assert ask(port, "POST", "/v1/completions", body)[0] == 200
    one, same, other, none = [said.get("affinity") for said in fleet.loadbalancer.routes]
    assert len(one) == len(other) == len(SECRET * 200) // 1024
    assert one == same
    assert not set(one) & set(other)
    assert none is None
    assert SECRET.encode() not in fleet.loadbalancer.received


# -- as a process --------------------------------------------------------------------------------------


@contextmanager
def process(*flags: str, **environ: str) -> Iterator[tuple["subprocess.Popen[str]", list[str]]]:
    """gateway.py with these flags; its log so far."""
    command = [sys.executable, str(ROOT / "gateway.py"), *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environ
    ) as running:
        lines: list[str] = []

        def follow() -> None:
            assert running.stdout is not None
            for line in running.stdout:
                lines.append(line)  # noqa: PERF402 as they come

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            yield running, lines
        finally:
            running.kill()
            thread.join(10)


def answers(port: int) -> Callable[[], bool]:
    """Whether somebody does."""

    def look() -> bool:
        try:
            return ask(port, "GET", "/health")[0] == 200
        except OSError:
            return False

    return look


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_the_process_serves_and_ends_cleanly_and_shows_no_secret(
    fleet: FakeFleet, tmp_path: Path, end: signal.Signals
) -> None:
    fleet.loadbalancer.key = KEY
    key_file = tmp_path / "client.key"
    key_file.write_text(KEY)
    key_file.chmod(0o600)
    port = free_port()
    flags = ["--port", str(port), "--loadbalancer", fleet.url, "--ahead", "2"]
    with process(*flags, "--client-key-file", str(key_file)) as (one, lines):
        wait_for("it answers", answers(port))
        with client(port) as user:
            assert text(user) == ALL
        wait_for("leases ahead", lambda: len(fleet.loadbalancer.given) >= 3)
        one.send_signal(end)
        assert one.wait(20) == 0
    log = "".join(lines)
    assert f"gateway to {fleet.url} on http://127.0.0.1:{port}/v1" in log
    assert "Traceback" not in log
    for secret in (KEY, SECRET, *[given.token for given in fleet.loadbalancer.given]):
        assert secret not in log
    assert len(fleet.loadbalancer.dones) >= 2


def test_a_salt_comes_from_a_private_file_and_is_shown_nowhere(fleet: FakeFleet, tmp_path: Path) -> None:
    path = tmp_path / "affinity.salt"
    path.write_text(KEY + "\n")
    path.chmod(0o644)
    flags = ["--loadbalancer", fleet.url, "--affinity-salt-file", str(path)]
    with process("--port", str(free_port()), *flags) as (one, lines):
        assert one.wait(20) == 2
    assert "can be read by others" in lines[0]
    path.chmod(0o600)
    body = json.dumps({"model": "m", "prompt": SECRET * 200}).encode()
    for more in ([], [], ["--no-affinity"]):
        port = free_port()
        with process("--port", str(port), *flags, *more) as (one, lines):
            wait_for("it answers", answers(port))
            assert ask(port, "POST", "/v1/completions", body)[0] == 200
            one.send_signal(signal.SIGTERM)
            assert one.wait(20) == 0
        assert KEY not in "".join(lines)
    first, second, third = fleet.loadbalancer.routes
    assert first["affinity"] == second["affinity"]
    assert "affinity" not in third
    assert KEY.encode() not in fleet.loadbalancer.received


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "needs keys"),
        (["--port", "x"], "--port"),
        (["--loadbalancer", "nonsense"], "--loadbalancer 'nonsense': wanted http://HOST:PORT"),
        (["--key-file", "/nowhere/at/all"], "cannot be read"),
        (["--affinity-salt-file", "/nowhere/at/all"], "cannot be read"),
        (["--priority", "urgent"], "--priority"),
    ],
)
def test_a_wrong_flag_is_one_line(flags: list[str], message: str) -> None:
    ended = run_command("gateway.py", gateway.main, *flags)
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert ended.err.startswith("gateway.py: ")
    assert message in ended.err


@pytest.mark.parametrize("program", ["gateway.py", "fleet-gateway"])
def test_help_calls_the_program_by_the_name_it_was_started_with(program: str) -> None:
    told = run_command(f"/somewhere/bin/{program}", gateway.main, "--help")
    assert told.out.startswith(f"usage: {program} [flags]\n\nThe fleet as a small server")


def test_a_port_in_use_is_one_line(fleet: FakeFleet) -> None:
    with process("--port", str(fleet.loadbalancer.port)) as (one, lines):
        assert one.wait(20) == 2
    assert len(lines) == 1
    assert "cannot listen on" in lines[0]
