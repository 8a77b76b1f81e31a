"""What commit 0abccd6 left on disks goes on working: its state directory, and instances of its start script.

tests/fixtures/0abccd6/ was written by its programs (README.md there says how). The programs of now run on it,
with a local cloud in which the instance of the old ledger was made by the old start script, and so has the
old remote/ on its disk, and stopped.
"""

import http.client
import json
import os
import random
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import paramiko
import pytest

from fleet_client.private_files import make_private_dir
from fleet_client.tls_pins import context_for
from process.children import dying_with_parent
from tests.paths import ROOT
from tests.waiting import wait_for
from web.messages.busy import BusyReport
from web.messages.decoding import decode
from web.messages.hot_set import HotSet
from web.messages.reports import PushedReport, ReadyBody

OLD = ROOT / "tests" / "fixtures" / "0abccd6"
KEYS = ("control.key", "fleet.key", "ssh_ed25519")
OLD_READY_URL = "http://127.0.0.1:18101/ready"
"""Where the old start script has its instance say that it is ready; ports are other ones in each run."""

CLOUD_KEY = "key-of-a-local-cloud-in-a-test"
SPEEDUP = "200"
SLOW_S = 90.0
"""For what takes seconds on a machine with nothing else to do."""


def saved(name: str) -> Any:
    """What the old programs said."""
    return json.loads((OLD / name).read_text())


COLD = saved("instances.json")["instances"][0]
"""The one instance of the old fleet, as the old autoscaler told of it."""


def old_state(path: Path) -> Path:
    """Make the old state directory as it was: a ledger without a version, keys, and the last level."""
    path.mkdir(mode=0o700)
    for name in (*KEYS, "level.json"):
        (path / name).touch(mode=0o600)
        (path / name).write_bytes((OLD / name).read_bytes())
    with sqlite3.connect(path / "ledger.sqlite") as db:
        db.executescript((OLD / "ledger.sql").read_text())
    db.close()
    return path


class Ports:
    """Free ports below those that outgoing connections have."""

    def __init__(self) -> None:
        """Choose one a program."""
        self.cloud, self.autoscaler, self.loadbalancer = (self._free() for _ in range(3))

    @staticmethod
    def _free() -> int:
        while True:
            port = random.SystemRandom().randrange(20_000, 30_000)
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", port)) != 0:
                    return port


class Stack:
    """A local cloud, the autoscaler and the loadbalancer on one state directory."""

    def __init__(self, path: Path) -> None:
        """Nothing runs yet."""
        self.path, self.ports = path, Ports()
        self.state = old_state(path / "state")
        self.control_key = (self.state / "control.key").read_text().strip()
        self.cloud, self.autoscaler, self.loadbalancer = (
            f"http://127.0.0.1:{port}"
            for port in (self.ports.cloud, self.ports.autoscaler, self.ports.loadbalancer)
        )

    @contextmanager
    def running(self, name: str, *command: str) -> Iterator[None]:
        """A program runs; its log is in a file of that name."""
        environ = {**os.environ, "LOCALCLOUD_API_KEY": CLOUD_KEY, "NO_PROXY": "127.0.0.1"}
        with (self.path / f"{name}.log").open("wb") as log:
            child = subprocess.Popen(
                dying_with_parent((sys.executable, *command)),
                cwd=ROOT,
                env=environ | {"TMPDIR": str(self.path)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(20.0)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def log(self, name: str) -> str:
        """What a program has said so far."""
        return (self.path / f"{name}.log").read_text()

    def ask(self, method: str, url: str, body: object = None, key: str | None = None) -> Any:
        """The JSON of a 200 answer; None when nothing answers yet, or with another status."""
        request = urllib.request.Request(  # noqa: S310 our own ports
            url,
            None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Bearer {key or self.control_key}", "Content-Type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=60.0) as reply:  # noqa: S310
                return json.load(reply)
        except OSError:
            return None

    # -- the cloud and the old instance in it ----------------------------------------------------------

    def rent_as_before(self) -> None:
        """Have the cloud hold the old instance, stopped, after one boot of the old start script."""

        def cloud(method: str, path: str, body: object) -> Any:
            return wait_for(path, lambda: self.ask(method, f"{self.cloud}{path}", body, CLOUD_KEY))

        public = paramiko.Ed25519Key.from_private_key_file(str(self.state / "ssh_ed25519"))
        cloud("POST", "/api/v0/ssh/", {"ssh_key": f"{public.get_name()} {public.get_base64()}"})
        disks = make_private_dir(self.path / "cloud" / "instances")
        host_key = make_private_dir(disks / str(COLD["id"])) / "host_key"
        host_key.touch(mode=0o600)
        host_key.write_bytes((OLD / "host_key").read_bytes())
        offers = cloud("POST", "/api/v0/bundles/", {"limit": 1000})["offers"]
        offer = next(o["id"] for o in offers if o["machine_id"] == COLD["machine_id"])
        script = (OLD / "onstart.sh").read_text()
        assert script.count(OLD_READY_URL) == 1
        order = saved("order.json") | {
            "label": COLD["label"],
            "onstart": script.replace(OLD_READY_URL, f"{self.autoscaler}/ready"),
        }
        # The old one was the second of its cloud, and numbers are given in order.
        other = next(o["id"] for o in offers if o["machine_id"] != COLD["machine_id"])
        first = cloud("PUT", f"/api/v0/asks/{other}/", saved("order.json"))["new_contract"]
        cloud("DELETE", f"/api/v0/instances/{first}/", {})
        assert cloud("PUT", f"/api/v0/asks/{offer}/", order)["new_contract"] == COLD["id"]
        wait_for("the old start script has loaded the model", self.has_loaded, SLOW_S)
        cloud("PUT", f"/api/v0/instances/{COLD['id']}/", {"state": "stopped"})
        wait_for("it is stopped", lambda: self.in_cloud()["state"] == "stopped", SLOW_S)

    def in_cloud(self) -> Any:
        """What the cloud says of its one instance."""
        [one] = self.ask("GET", f"{self.cloud}/localcloud/status")["instances"]
        return one

    def has_loaded(self) -> bool:
        """Whether the model server has said that it is ready."""
        log = self.path / "cloud" / "instances" / str(COLD["id"]) / "home" / "fleet" / "model.log"
        return log.exists() and "Application startup complete." in log.read_text()

    # -- the autoscaler and the loadbalancer -------------------------------------------------------------

    def one(self) -> Any:
        """The one instance that the autoscaler knows; None while it knows none."""
        found = self.ask("GET", f"{self.autoscaler}/instances") or {"instances": []}
        assert len(found["instances"]) <= 1, "another one was rented"
        return found["instances"][0] if found["instances"] else None

    def wait_until(self, state: str) -> Any:
        """Return the instance once it is in that state."""

        def look() -> Any:
            one = self.one()
            return one if one and one["state"] == state else None

        try:
            return wait_for(f"it is {state}", look, SLOW_S)
        except AssertionError as e:
            raise AssertionError(
                f"{e}\n{self.log('autoscaler')[-3000:]}\n{self.log('loadbalancer')[-1000:]}"
            ) from None

    def want(self, hot: int) -> None:
        """Have the policy keep so many hot, of one in all."""
        policy = {"name": "fixed", "params": {"hot": hot, "total": 1}}
        assert self.ask("PUT", f"{self.autoscaler}/policy", policy)
        assert self.ask("PUT", f"{self.autoscaler}/manage", {"manage": True})

    def in_queue(self) -> Any:
        """What the loadbalancer says of the instance; None while it does not know it."""
        rows = (self.ask("GET", f"{self.loadbalancer}/status") or {}).get("instances") or [None]
        return rows[0]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The programs of now run on what the old ones left; nothing is managed before a test says so."""
    made = Stack(tmp_path_factory.mktemp("old"))
    common = ("--state-dir", str(made.state), "--label", "fleet")
    with ExitStack() as programs:

        def start(name: str, *command: str) -> None:
            programs.enter_context(made.running(name, *command))

        cloud = ("-m", "localcloud", "--port", str(made.ports.cloud), "--root", str(made.path / "cloud"))
        start("cloud", *cloud, "--speedup", SPEEDUP, "--realism", "none")
        wait_for("the local cloud answers", lambda: made.ask("GET", f"{made.cloud}/localcloud/status"))
        made.rent_as_before()
        autoscaler = ("autoscaler_server.py", "--port", str(made.ports.autoscaler), *common)
        market = ("--local", "--cloud-url", made.cloud, "--speedup", SPEEDUP)
        often = ("--poll-interval-s", "1", "--check-boot-every-s", "0.5")
        limits = ("--no-manage", "--max-instances", "1", "--loadbalancer", made.loadbalancer)
        start("autoscaler", *autoscaler, *market, *often, *limits)
        loadbalancer = ("loadbalancer_server.py", "--port", str(made.ports.loadbalancer), *common)
        start("loadbalancer", *loadbalancer, "--autoscaler", made.autoscaler)
        yield made


@pytest.mark.parametrize(
    ("name", "kind"), [("busy.json", BusyReport), ("hot.json", HotSet), ("report.json", PushedReport)]
)
def test_what_old_processes_say_is_understood(name: str, kind: type[Any]) -> None:
    """Every field of it; a version that adds a field must do without it."""
    understood = json.loads(msgspec.json.encode(decode((OLD / name).read_bytes(), kind)))
    assert {field: understood[field] for field in saved(name)} == saved(name)


def test_what_old_instances_say_of_their_model_is_understood() -> None:
    ready = [decode(json.dumps(said).encode(), ReadyBody) for said in saved("ready.json")]
    assert [(one.state, one.why) for one in ready] == [("loading", ""), ("ready", "")]


@pytest.mark.timeout(200)
def test_the_instance_is_found_cold_and_the_old_costs_are_still_told(stack: Stack) -> None:
    """So are the times of starts and the level that was found by replay."""
    one = stack.wait_until("cold")
    assert {k: one[k] for k in ("id", "label", "machine_id")} == {
        k: COLD[k] for k in ("id", "label", "machine_id")
    }
    old = saved("costs.json")
    new = stack.ask("GET", f"{stack.autoscaler}/costs?from=0&to={old['to']}")
    assert new["usd"] == pytest.approx({**old["usd"], "traffic": 0.0}), "bytes were not known then"
    assert old["usd"]["hot_working"] > 0.0
    for name in ("intervals", "order_to_hot_s", "starts", "stops", "creates", "destroys", "utilisation"):
        assert new[name] == old[name] or new[name] == pytest.approx(old[name]), name
    curve, level = stack.ask("GET", f"{stack.autoscaler}/policy/curve"), saved("level.json")
    assert (curve["at"], curve["goal"], curve["curve"]) == (level["at"], level["goal"], level["curve"])
    assert {k: curve["policy"][k] for k in level["level"]} == level["level"]
    with sqlite3.connect(stack.state / "ledger.sqlite") as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] >= 1
    db.close()


@pytest.mark.timeout(200)
def test_it_becomes_hot_serves_says_what_it_does_and_is_stopped_again(stack: Stack) -> None:
    stack.want(hot=1)
    stack.wait_until("hot")
    assert f"{COLD['label']} says: ready" in stack.log("autoscaler"), "its POST /ready was heard"
    request = {"prompt_tokens": 10, "max_tokens": 50, "wait_s": 30.0}
    lease = wait_for("a lease", lambda: stack.ask("POST", f"{stack.loadbalancer}/route", request), SLOW_S)
    assert lease["instance_id"] == COLD["id"]
    assert served(lease) == 200
    assert served(lease) == 401, "a token admits one request"
    row = wait_for("it has reported the end", lambda: has_ended(stack.in_queue()))
    assert row["reports_pushed"] > 0
    assert stack.ask("GET", f"{stack.loadbalancer}/status")["ends"] == {"finished": 1}
    stack.want(hot=0)
    stack.wait_until("cold")
    assert stack.in_cloud()["state"] == "stopped"


def has_ended(row: Any) -> Any:
    """The row once nothing is under way and a report was pushed."""
    return row if row and row["unfinished"] == 0 and row["reports_pushed"] else None


def served(lease: Any) -> int:
    """Send a completion request with the lease's token; the status of an answer that has come whole."""
    context = context_for(lease["address"], lease["certificate"])
    assert isinstance(context, ssl.SSLContext)
    at = urlsplit(lease["address"])
    connection = http.client.HTTPSConnection(at.hostname or "", at.port, timeout=30.0, context=context)
    body = {"model": lease["model"], "prompt": "Tell me.", "max_tokens": 50, "stream": True}
    headers = {"Authorization": f"Bearer {lease['token']}", "Content-Type": "application/json"}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        reply = connection.getresponse()
        assert reply.read().rstrip().endswith(b"data: [DONE]") == (reply.status == 200)
        return reply.status
    finally:
        connection.close()
