"""What instances say by themselves arrives in time: ready, ended, down. The whole system on this machine.

The figures are printed (`pytest -s`); what is asserted leaves room for a busy machine.
"""

import http.client
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from fleet_client.tls_pins import context_for
from remote.log_lines import ENDED, READY
from simulation.live.local_stack import AUTOSCALER, LOADBALANCER, LocalStack
from simulation.live.stack_config import StackConfig
from tests.waiting import wait_for

pytestmark = pytest.mark.alone

GET_HOT_S = 90.0


def ask(url: str, method: str = "GET", said: object = None, key: str = "", timeout_s: float = 10.0) -> Any:
    """The JSON of a 200 answer; None for any other and for none."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = None if said is None else json.dumps(said).encode()
    try:
        connection.request(method, parts.path, body, headers | {"Content-Type": "application/json"})
        reply = connection.getresponse()
        raw = reply.read()
        return json.loads(raw) if reply.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


@dataclass
class Fleet:
    """A stack whose one instance has just become hot. Times are epoch seconds."""

    stack: LocalStack
    lease: dict[str, Any]
    ready_at: float
    leased_at: float

    def status(self) -> dict[str, Any]:
        """What the loadbalancer says."""
        found: dict[str, Any] = ask(f"{self.stack.loadbalancer_url}/status") or {}
        return found

    def row(self) -> dict[str, Any]:
        """What it says of the instance; nothing when it does not know it."""
        rows = self.status().get("instances", [])
        return dict(rows[0]) if rows else {}

    def route(self, wait_s: float = 0.0) -> dict[str, Any] | None:
        """A lease."""
        said = {"prompt_tokens": 10, "max_tokens": 400, "wait_s": wait_s}
        found: dict[str, Any] | None = ask(
            f"{self.stack.loadbalancer_url}/route", "POST", said, timeout_s=wait_s + 10.0
        )
        return found


def wait_for_ready_line(log: Path, since: float, limit_s: float = GET_HOT_S) -> float:
    """When the ready line was written to a log that was begun after `since`."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        try:
            raw, at = log.read_bytes(), log.stat().st_mtime
            if at > since and READY in raw and ENDED not in raw:
                return at
        except OSError:
            pass
        time.sleep(0.004)
    raise AssertionError("never: the ready line")


def log_of(stack: LocalStack, instance_id: int) -> Path:
    """Of its model server."""
    return stack.state_dir / "cloud" / "instances" / str(instance_id) / "home" / "fleet" / "model.log"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A client was parked before its one instance was ready."""
    config = StackConfig(
        instances=1,
        max_instances=1,
        hot=0,
        speedup=360.0,
        seed=11,
        state_dir=tmp_path_factory.mktemp("push") / "stack",
    )
    said_at: list[float] = []
    stack = LocalStack(config, say=lambda _: said_at.append(time.time()))
    with stack:
        rows = wait_for("the fleet is known", lambda: ask(f"{stack.autoscaler_url}/instances"))["instances"]
        prepared_at = said_at[-2]  # the last word is that 0 are hot
        made = Fleet(stack, {}, 0.0, 0.0)

        def park() -> None:
            made.lease = made.route(wait_s=GET_HOT_S) or {}
            made.leased_at = time.time()

        parked = threading.Thread(target=park, daemon=True)
        parked.start()
        made.ready_at = wait_for_ready_line(log_of(stack, rows[0]["id"]), prepared_at)
        parked.join(GET_HOT_S)
        yield made
        end = stack.stop()
    assert end.left_behind == ()


@contextmanager
def streaming(
    lease: dict[str, Any], max_tokens: int = 400
) -> Iterator[tuple[http.client.HTTPConnection, Any]]:
    """A stream whose first bytes have come. 400 tokens take some seconds."""
    parts = urlsplit(lease["address"])
    context = context_for(lease["address"], lease.get("certificate"))
    assert isinstance(context, ssl.SSLContext)
    connection = http.client.HTTPSConnection(
        parts.hostname or "", parts.port or 0, timeout=30.0, context=context
    )
    body = {"model": lease["model"], "prompt": "Tell me.", "max_tokens": max_tokens, "stream": True}
    headers = {"Authorization": f"Bearer {lease['token']}", "Content-Type": "application/json"}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        reply = connection.getresponse()
        assert reply.status == 200
        assert reply.readline().startswith(b"data:")
        yield connection, reply
    finally:
        connection.close()


@pytest.mark.timeout(170)
def test_who_waits_is_served_as_soon_as_the_model_is_ready(fleet: Fleet) -> None:
    """From the ready line in the instance's log to the lease of a client that was parked before."""
    took_s = fleet.leased_at - fleet.ready_at
    print(f"\nMEASURED ready line to lease: {1000 * took_s:.0f} ms")
    print(fleet.stack.tail(AUTOSCALER))
    assert fleet.lease.get("token"), "the client that was parked got no lease"
    assert 0.0 < took_s <= 3.0


def test_what_ends_is_no_longer_counted_at_once(fleet: Fleet) -> None:
    """Whether a stream comes to its end or its client goes away in the middle."""
    lease: dict[str, Any] | None = fleet.lease
    pushed = 0
    for n, way in enumerate(("end", "end", "vanish", "vanish")):
        lease = lease if n == 0 else fleet.route(wait_s=10.0)
        assert lease is not None
        before = fleet.status()
        assert fleet.row()["unfinished"] == 1
        with streaming(lease, 60 if way == "end" else 400) as (_, reply):
            if way == "end":
                assert b"data: [DONE]" in reply.read()
            else:
                reply.readline()
        ended_at = time.monotonic()
        while fleet.row()["unfinished"] and time.monotonic() < ended_at + 10.0:
            time.sleep(0.005)
        took_s = time.monotonic() - ended_at
        print(f"\nMEASURED {way} to unfinished 0: {1000 * took_s:.0f} ms")
        now = fleet.status()
        assert took_s <= 1.0
        how = "finished" if way == "end" else "aborted"
        assert now["ends"].get(how, 0) == before["ends"].get(how, 0) + 1
        pushed += now["instances"][0]["reports_pushed"] > before["instances"][0]["reports_pushed"]
    assert pushed >= 3, "a poll that is due just then may bring the news first, once"


def test_a_dead_model_server_gets_nothing_until_it_is_ready_again(fleet: Fleet) -> None:
    lease = fleet.route(wait_s=10.0)
    assert lease is not None
    with streaming(lease) as (_, reply):
        killed_at, epoch = time.monotonic(), time.time()
        url = f"{fleet.stack.cloud_url}/localcloud/instances/{lease['instance_id']}/kill"
        assert ask(url, "POST", {"part": "model"}, fleet.stack.cloud_key) == {"killed": "model"}
        read = b""
        with suppress(OSError, http.client.HTTPException):
            while line := reply.readline():
                read += line
        assert b"[DONE]" not in read
        broke_s = time.monotonic() - killed_at

    def is_out() -> bool:
        return not fleet.row().get("in_queue")

    while not is_out() and time.monotonic() < killed_at + 20.0:
        time.sleep(0.005)
    out_s = time.monotonic() - killed_at
    ready_at = wait_for_ready_line(log_of(fleet.stack, lease["instance_id"]), epoch)
    again = fleet.route(wait_s=GET_HOT_S)
    took_s = time.time() - ready_at
    print(
        f"\nMEASURED killed: the client after {1000 * broke_s:.0f} ms, out of the queue after "
        f"{1000 * out_s:.0f} ms; ready line to lease {1000 * took_s:.0f} ms"
    )
    print(fleet.stack.tail(AUTOSCALER), fleet.stack.tail(LOADBALANCER), sep="\n")
    assert broke_s <= 5.0
    assert out_s <= 2.0
    assert again is not None
    assert took_s <= 3.0
    done = {"request_id": again["request_id"], "outcome": "unused"}
    assert ask(f"{fleet.stack.loadbalancer_url}/done", "POST", done) == {}
    wait_for("it reports by itself again", lambda: fleet.row().get("reports_pushed"))
