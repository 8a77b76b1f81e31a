"""Our servers and clients on different machines: under TLS, or not at all unless the network is trusted."""

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from flask import request

import autoscaler_server
import loadbalancer_server
import sim
from fleet.outside.hot_set_push import HotSetPush
from fleet_client import FleetTransport, gateway
from fleet_client.own_tls import TrustedServer, server_tls
from tests.commands import run_command
from tests.fake_fleet import make_certificate
from tests.loadbalancer_app import HOT, INSTANCE
from tests.paths import ROOT
from tests.ports import free_port
from tests.waiting import wait_for
from tests.web_server import served
from web.answers import JsonAnswer, response
from web.app import make_app
from web.messages.busy import BusyAnswer
from web.messages.hot_set import HotSet

CONTROL = "control-" + "c" * 32


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


class Machines:
    """Files of a loadbalancer, an autoscaler and somebody else, who has pairs of their own."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.state.mkdir(mode=0o700)
        private(self.state / "control.key", CONTROL)
        self.cert, self.key = {}, {}
        for name in ("balancer", "scaler", "other"):
            cert, key = make_certificate()
            self.cert[name] = private(folder / f"{name}.pem", cert)
            self.key[name] = private(folder / f"{name}.key", key)

    def shows(self, name: str) -> list[str]:
        """Flags of a server with that certificate."""
        return ["--tls-cert", str(self.cert[name]), "--tls-key", str(self.key[name])]


@pytest.fixture
def machines(tmp_path: Path) -> Machines:
    return Machines(tmp_path)


@contextmanager
def autoscaler(machines: Machines, heard: list[str]) -> Iterator[int]:
    """The two routes that a loadbalancer asks, under TLS; heard: their Authorization headers."""
    app = make_app("scaler")

    @app.before_request
    def hear() -> None:
        heard.append(request.headers.get("Authorization", ""))

    @app.get("/hot")
    def hot() -> Any:
        return response(JsonAnswer(HOT))

    @app.post("/busy")
    def busy() -> Any:
        return response(JsonAnswer(BusyAnswer(HOT["epoch"], HOT["version"], None)))

    tls = server_tls(machines.cert["scaler"], machines.key["scaler"])
    with served(app, loopback=False, tls=tls) as port:
        yield port


@contextmanager
def running(program: str, *flags: str) -> Iterator[tuple[int, list[str]]]:
    """The port of a program that serves, and its log so far."""
    port = free_port()
    command = [sys.executable, program, "--port", str(port), *flags]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ}
    ) as process:
        lines: list[str] = []

        def follow() -> None:
            assert process.stdout is not None
            lines.extend(iter(process.stdout.readline, ""))

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            wait_for("it listens", lambda: listens(port))
            yield port, lines
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20.0) in (0, -signal.SIGTERM)  # it may listen before it hears signals
            thread.join(10.0)


def listens(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
    with closing(connection):
        try:
            connection.connect()
        except OSError:
            return False
        return True


def status(port: int, trusted: TrustedServer) -> Any:
    """The loadbalancer's GET /status."""
    https = http.client.HTTPSConnection("127.0.0.1", port, timeout=10.0, context=trusted.context())
    with closing(https):
        https.request("GET", "/status", headers={"Authorization": f"Bearer {CONTROL}"})
        return json.loads(https.getresponse().read())


def known(port: int, trusted: TrustedServer) -> list[int]:
    """The instances that it knows."""
    return [one["id"] for one in status(port, trusted)["instances"]]


def pushed(machines: Machines, name: str, port: int, version: int) -> HotSetPush:
    """The autoscaler's push of a hot set to a loadbalancer that must have that certificate.

    Its instance has 100 times the version as its id.
    """
    said = {**HOT, "version": version, "instances": [{**INSTANCE, "id": 100 * version}]}
    hot = msgspec.convert(said, HotSet)
    trusted = TrustedServer("--loadbalancer-cert", machines.cert[name])
    return HotSetPush(lambda: version, lambda: hot, [f"https://127.0.0.1:{port}"], CONTROL, trusted)


def test_both_directions_are_encrypted_and_pinned_and_so_are_clients(
    machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []
    trusted = TrustedServer("--loadbalancer-cert", machines.cert["balancer"])

    async def push(name: str, port: int, version: int) -> None:
        pushing = asyncio.create_task(pushed(machines, name, port, version).run())
        try:
            async with asyncio.timeout(20.0):
                while known(port, trusted) != [100 * version] and "cannot be spoken to" not in caplog.text:
                    await asyncio.sleep(0.02)
        finally:
            pushing.cancel()
            await asyncio.gather(pushing, return_exceptions=True)

    with (
        autoscaler(machines, heard) as scaler,
        running(
            "loadbalancer_server.py",
            *machines.shows("balancer"),
            *("--state-dir", str(machines.state)),
            *("--autoscaler", f"https://127.0.0.1:{scaler}"),
            *("--autoscaler-cert", str(machines.cert["scaler"])),
        ) as (port, _),
    ):
        wait_for("the hot set was fetched", lambda: known(port, trusted) == [7])
        assert set(heard) == {f"Bearer {CONTROL}"}
        asyncio.run(push("balancer", port, 2))
        assert caplog.text == ""
        asyncio.run(push("other", port, 3))
        assert "cannot be spoken to under TLS (--loadbalancer-cert)" in caplog.text
        assert known(port, trusted) != [300]
        assert route(port, machines.cert["balancer"]) == "no_capacity"
        with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            route(port, machines.cert["other"])


def route(port: int, certificate: Path) -> str:
    """Ask the loadbalancer for a lease as a program does; return the code of its refusal."""
    transport = FleetTransport(f"https://127.0.0.1:{port}", wait_s=0.0, loadbalancer_cert=certificate)
    with httpx2.Client(transport=transport, base_url="http://fleet") as client:
        answer = client.post("/v1/completions", json={"model": "m", "prompt": "x"})
        return str(answer.json()["error"]["code"])


def test_a_loadbalancer_says_nothing_to_an_autoscaler_with_another_certificate(machines: Machines) -> None:
    heard: list[str] = []
    with (
        autoscaler(machines, heard) as scaler,
        running(
            "loadbalancer_server.py",
            *machines.shows("balancer"),
            *("--state-dir", str(machines.state)),
            *("--autoscaler", f"https://127.0.0.1:{scaler}"),
            *("--autoscaler-cert", str(machines.cert["other"])),
        ) as (_, log),
    ):
        wait_for("it complains", lambda: any("CERTIFICATE_VERIFY_FAILED" in line for line in log))
    assert heard == []


# -- in the clear only where the operator says so ----------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "main", "flags", "said"),
    [
        (
            "autoscaler_server.py",
            autoscaler_server.main,
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0 would be plain",
        ),
        (
            "autoscaler_server.py",
            autoscaler_server.main,
            ["--loadbalancer", "http://127.0.0.1:1", "--loadbalancer", "http://10.0.0.9:8200"],
            "--loadbalancer http://10.0.0.9:8200 would be plain HTTP beyond this machine, and shows the "
            "control key, and with it the fleet and its master tokens",
        ),
        (
            "autoscaler_server.py",
            autoscaler_server.main,
            ["--public-url", "http://example.org:8100"],
            "--public-url http://example.org:8100 would be plain HTTP",
        ),
        (
            "loadbalancer_server.py",
            loadbalancer_server.main,
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0 would be",
        ),
        (
            "loadbalancer_server.py",
            loadbalancer_server.main,
            ["--autoscaler", "http://10.0.0.9:8100"],
            "--autoscaler http://10.0.0.9:8100 would be plain HTTP beyond this machine, and shows the "
            "control key and all master tokens",
        ),
        ("gateway.py", gateway.main, ["--host", "0.0.0.0"], "--host 0.0.0.0 would be plain HTTP"),
        (
            "gateway.py",
            gateway.main,
            ["--loadbalancer", "http://10.0.0.9:8200"],
            "shows our key for it and the",
        ),
    ],
)
def test_plain_http_beyond_this_machine_is_refused(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, program: str, main: Any, flags: list[str], said: str
) -> None:
    keys = str(private(machines.state / "keys", "k" * 32))
    more = {
        "autoscaler_server.py": ["--operator-key-file", keys, "--state-dir", str(machines.state)],
        "loadbalancer_server.py": [
            *("--operator-key-file", keys, "--client-keys-file", keys),
            *("--state-dir", str(machines.state)),
        ],
        "gateway.py": ["--key-file", keys],
    }
    ended = run_command(program, main, *more[program], *flags)
    assert (ended.status, ended.err.count("\n")) == (2, 1), ended.err
    assert said in ended.err
    assert ended.err.rstrip().endswith("or --trust-network where nobody can")


def test_a_run_of_users_sends_no_key_over_plain_http_to_another_machine() -> None:
    for flag in ("--loadbalancer", "--autoscaler"):
        ended = run_command("sim.py", sim.main, flag, "http://10.0.0.9:1", "--quiet")
        assert ended.status == 2
        assert f"{flag} http://10.0.0.9:1 would be plain HTTP beyond this machine" in ended.err


def test_a_server_that_trusts_its_network_says_at_the_start_what_it_shows(machines: Machines) -> None:
    keys = str(private(machines.state / "keys", "k" * 32))
    with running(
        "loadbalancer_server.py",
        *("--host", "0.0.0.0", "--trust-network", "--state-dir", str(machines.state)),
        *("--operator-key-file", keys, "--client-keys-file", keys),
    ) as (_, log):
        wait_for("it starts", lambda: any("loadbalancer of fleet" in line for line in log))
        (warned,) = [line for line in log if "WARNING" in line and "plain HTTP" in line]
    assert (
        "--host 0.0.0.0 is plain HTTP beyond this machine: all who can listen there have the control"
        in warned
    )


def test_the_gateway_speaks_tls(machines: Machines) -> None:
    keys = str(private(machines.state / "keys", "k" * 32))
    nobody = f"http://127.0.0.1:{free_port()}"
    flags = ["--host", "0.0.0.0", "--key-file", keys, "--loadbalancer", nobody]
    with running("gateway.py", *machines.shows("other"), *flags) as (port, log):
        trusted = TrustedServer("--x", machines.cert["other"])
        https = http.client.HTTPSConnection("127.0.0.1", port, timeout=10.0, context=trusted.context())
        with closing(https):
            https.request("GET", "/health")
            said = json.loads(https.getresponse().read())["error"]
        assert said["code"] == "loadbalancer_unwell"
        assert not any("plain HTTP" in line for line in log)
        assert any(f"on https://0.0.0.0:{port}/v1" in line for line in log)
