"""The auth_server: tokens and load reports for the master token, nothing for anybody else."""

import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fleet_client.tls_pins import pinned_context
from remote import boot as boots
from remote import events, tokens
from remote.auth_server import MAX_BODY, MOST_TOKENS, create_app
from remote.events import Events
from remote.model_load import ModelLoad, ModelServer, parse_metrics
from remote.tokens import CAP, Gate, Issuer
from tests.asgi_client import AsgiClient
from tests.paths import ROOT
from tests.ports import free_port
from tests.waiting import wait_for
from web.messages.decoding import decode
from web.messages.reports import LoadReport, TokenBatch, TokenOrder

MASTER = "m" * 64
KEY = {"Authorization": f"Bearer {MASTER}"}
LOAD = ModelLoad(True, 2, 1, 0.5, 300, 120, 33.3)
METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
vllm:prompt_tokens_total{engine="0",model_name="m"} 1.2e+06
vllm:generation_tokens_total{engine="0",model_name="m"} 34567.0
vllm:request_success_total{finished_reason="stop"} broken
"""


@pytest.fixture
def boot(tmp_path: Path) -> str:
    tokens.make_store(str(tmp_path))
    events.make_ring(str(tmp_path))
    return str(tmp_path)


@pytest.fixture
def client(boot: str) -> AsgiClient:
    digest = hashlib.sha256(MASTER.encode()).hexdigest()
    app = create_app(digest, "boot-1", Issuer(boot, 0.0), Events(boot), lambda: LOAD, clock=lambda: 0.0)
    return AsgiClient(app)


def test_a_batch_of_tokens_comes_with_the_load(client: AsgiClient, boot: str) -> None:
    batch = decode(client.post("/tokens", json={"count": 3}, headers=KEY).data, TokenBatch)
    assert (len(batch.tokens), batch.boot_id, batch.expires_in_s) == (3, "boot-1", 600.0)
    assert (batch.load.running, batch.load.waiting, batch.load.started, batch.load.ended) == (2, 1, [], [])
    gate = Gate(boot)
    assert all(gate.take(token, 1.0) for token in batch.tokens)


def test_an_order_for_tokens_is_what_the_struct_of_the_loadbalancer_says(client: AsgiClient) -> None:
    for order in (TokenOrder(2), TokenOrder(2, "http://127.0.0.1:1/report")):
        answer = client.post("/tokens", data=msgspec.json.encode(order), headers=KEY)
        assert len(decode(answer.data, TokenBatch).tokens) == 2


def test_a_load_report_has_the_events_after_a_number(client: AsgiClient, boot: str) -> None:
    ring = Events(boot)
    ring.write("0123456789abcdef", events.STARTED)
    ring.write("0123456789abcdef", events.FINISHED, 12)
    load = decode(client.get("/load?after=0", headers=KEY).data, LoadReport)
    assert (load.seq, load.missed, load.started) == (2, False, ["0123456789abcdef"])
    assert [(e.id, e.status, e.output_tokens) for e in load.ended] == [("0123456789abcdef", "finished", 12)]
    assert decode(client.get("/load?after=2", headers=KEY).data, LoadReport).started == []


def test_health_is_open_and_says_nothing_else(client: AsgiClient) -> None:
    reply = client.get("/health")
    assert (reply.status_code, reply.get_json()) == (200, {"status": "ok"})


PROTECTED = [
    ("POST", "/tokens"),
    ("GET", "/load?after=0"),
    ("GET", "/"),
    ("GET", "/nowhere"),
    ("POST", "/health/"),
]
WRONG = {
    "no key": {},
    "an empty one": {"Authorization": "Bearer "},
    "a wrong one": {"Authorization": "Bearer " + "x" * 64},
    "its hash": {"Authorization": "Bearer " + hashlib.sha256(MASTER.encode()).hexdigest()},
    "another scheme": {"Authorization": "Basic " + MASTER},
    "in another header": {"X-Api-Key": MASTER},
}


@pytest.mark.parametrize(("method", "path"), PROTECTED)
@pytest.mark.parametrize("how", list(WRONG))
def test_each_route_refuses_the_wrong_caller(client: AsgiClient, method: str, path: str, how: str) -> None:
    reply = client.open(path, method=method, json={"count": 1}, headers=WRONG[how])
    assert (reply.status_code, reply.get_json()["error"]) == (401, "unauthorized")


def test_the_master_token_in_the_url_is_no_key(client: AsgiClient) -> None:
    assert client.get(f"/load?after=0&token={MASTER}").status_code == 401


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        *(b'{"count": %s}' % n for n in (b"0", b"-1", b"true", b"1.5", b'"1"', b"%d" % (MOST_TOKENS + 1))),
    ],
)
def test_a_wrong_count_is_named(client: AsgiClient, body: bytes) -> None:
    reply = client.post("/tokens", data=body, headers=KEY)
    assert reply.status_code == 400
    assert reply.get_json()["message"].startswith("count:")


@pytest.mark.parametrize("after", ["", "-1", "x", "1.5", "9" * 17, "%00"])
def test_a_wrong_number_is_named(client: AsgiClient, after: str) -> None:
    reply = client.get(f"/load?after={after}", headers=KEY)
    assert reply.status_code == 400
    assert reply.get_json()["message"].startswith("after:")


def test_a_long_body_is_refused(client: AsgiClient) -> None:
    assert client.post("/tokens", data=b"x" * (MAX_BODY + 1), headers=KEY).status_code == 413


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/tokens", 405), ("GET", "/nowhere", 404)])
def test_what_there_is_not_is_an_error_in_json(
    client: AsgiClient, method: str, path: str, status: int
) -> None:
    reply = client.open(path, method=method, headers=KEY)
    assert reply.status_code == status
    assert set(reply.get_json()) == {"error", "message"}


def test_beyond_the_cap_of_outstanding_tokens_it_says_429(client: AsgiClient) -> None:
    for _ in range(CAP // MOST_TOKENS):
        assert client.post("/tokens", json={"count": MOST_TOKENS}, headers=KEY).status_code == 200
    assert client.post("/tokens", json={"count": 1}, headers=KEY).status_code == 429


# -- the model server's figures ------------------------------------------------------------------------


def test_the_metrics_of_several_engines_are_added_up() -> None:
    assert parse_metrics(METRICS) == ModelLoad(True, 3, 4, 0.5, 1_200_000, 34_567)


def test_a_model_server_that_does_not_answer_is_not_up() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        assert ModelServer(port, "k", None, lambda: 0.0).load() == ModelLoad()


def test_a_reading_is_kept_for_a_moment_and_gives_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    totals = iter([100, 160, 400])
    reads: list[int] = []

    def read(self: Any) -> ModelLoad:
        reads.append(1)
        return ModelLoad(model_up=True, generation_tokens_total=next(totals))

    monkeypatch.setattr(ModelServer, "_read", read)
    model = ModelServer(1, "k", None, lambda: now)
    assert model.load().tokens_s == 0.0
    now = 0.1
    assert model.load().generation_tokens_total == 100
    assert len(reads) == 1, "it was fresh"
    now = 2.0
    assert model.load().tokens_s == pytest.approx(30.0)
    now = 2.5
    assert model.load().tokens_s == pytest.approx(30.0), "too short a time for a new rate"


# -- a real process ------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The port of a real auth_server, and its home."""
    fleet = tmp_path / "fleet"
    fleet.mkdir()
    boots.begin(str(fleet))
    (fleet / "master.sha256").write_text(hashlib.sha256(MASTER.encode()).hexdigest())
    port, model_port = free_port(), free_port()
    environ = {
        **os.environ,
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "FLEET_BIND": "127.0.0.1",
        "FLEET_PORT_3000": str(port),
        "FLEET_PORT_8000": str(model_port),
    }
    with (fleet / "auth.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "remote.auth_server"], env=environ, stdout=log, stderr=log
        )
    try:
        wait_for("it serves", lambda: _health(port, fleet))
        yield port, fleet
    finally:
        process.kill()
        process.wait()


def connect(port: int, fleet: Path) -> http.client.HTTPSConnection:
    """To the auth_server, and to nobody without its certificate."""
    context = pinned_context((fleet / "tls.crt").read_text())
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)


def _health(port: int, fleet: Path) -> bool:
    try:
        connection = connect(port, fleet)
        connection.request("GET", "/health")
        ok = connection.getresponse().status == 200
        connection.close()
    except OSError:
        return False
    return ok


def test_several_loadbalancers_on_open_connections_get_different_tokens(served: tuple[int, Path]) -> None:
    """More of them than the server has threads, each asking again on the connection that it has."""
    port, fleet = served
    got: list[str] = []
    reused: list[bool] = []

    def ask() -> None:
        connection = connect(port, fleet)
        connection.connect()
        first = connection.sock
        for _ in range(10):
            connection.request("POST", "/tokens", b'{"count": 20}', KEY)
            got.extend(json.loads(connection.getresponse().read())["tokens"])
        reused.append(connection.sock is first)
        connection.close()

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert reused == [True] * 12
    assert (len(got), len(set(got))) == (2400, 2400)
    gate = Gate(str(fleet / "boot"))
    now = time.monotonic()
    assert all(gate.take(token, now) for token in got)
    assert not any(gate.take(token, now) for token in got)
    log = (fleet / "auth.log").read_text()
    assert "queue" not in log, "a line for each request that waits would fill the disk"
    assert not [s for s in (MASTER, *got) if s in log]


def test_hundreds_of_idle_connections_keep_nobody_out(served: tuple[int, Path]) -> None:
    port, fleet = served
    idle = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(500)]
    try:
        assert _health(port, fleet)
    finally:
        for sock in idle:
            sock.close()


def test_an_overlong_body_is_refused_by_the_real_server(served: tuple[int, Path]) -> None:
    port, fleet = served
    connection = connect(port, fleet)
    try:
        connection.request("POST", "/tokens", b"x" * (MAX_BODY + 1), KEY)
        assert connection.getresponse().status == 413
    finally:
        connection.close()
