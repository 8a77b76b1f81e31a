"""The paced engine as the process that an instance of localcloud starts as vLLM."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from instance_client import Stream, TokenUsage
from tests.paths import ROOT
from tests.ports import free_port
from tests.unit.localcloud.paced.hand_clock import HELLO
from tests.unit.localcloud.paced.test_command import write_machine

GATE = """
class Gate:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            scope["headers"].append((b"x-name", b"NAME"))
            if scope["path"] == "/seen":
                names = b",".join(v for k, v in scope["headers"] if k == b"x-name")
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": names})
                return
        await self.app(scope, receive, send)
"""


@contextlib.contextmanager
def stand_in(folder: Path, port: int, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """The process that an instance of localcloud starts as vLLM; its log is its stdout."""
    (folder / "gates").mkdir(exist_ok=True)
    for name in ("inner", "outer"):
        (folder / "gates" / f"{name}.py").write_text(GATE.replace("NAME", name))
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "localcloud" / "image"), str(ROOT)]),
        "LOCALCLOUD_MACHINE": str(folder / "machine.json"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "org/name"]
    command += ["--served-model-name", "vllm-13", "--host", "127.0.0.1", "--port", str(port), *flags]
    process = subprocess.Popen(
        command, env=env, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    try:
        with process.stdout:
            yield process
    finally:
        process.kill()
        process.wait()


def read_until(process: subprocess.Popen[str], line: str) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or line not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)
    return lines


def refuses(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) != 0


def test_the_stand_in_loads_serves_through_its_middleware_and_ends_when_told(tmp_path: Path) -> None:
    write_machine(tmp_path)
    port = free_port()
    gates = ["--middleware", "gates.inner.Gate", "--middleware", "gates.outer.Gate"]
    with stand_in(tmp_path, port, "--enforce-eager", *gates) as process:
        text = "".join(read_until(process, "Uvicorn running on"))
        order = [
            "--enforce-eager",
            "Started server process",
            "Waiting for application startup.",
            "Application startup complete.",
            "Uvicorn running on",
        ]
        assert [text.find(o) for o in order] == sorted(text.find(o) for o in order)
        assert -1 not in [text.find(o) for o in order]
        url = f"http://127.0.0.1:{port}"
        assert requests.get(f"{url}/health", timeout=10).status_code == 200
        assert requests.get(f"{url}/seen", timeout=10).text == "outer"
        # 13B on an A100 alone: 8 ms a token, so 60 tokens take about half a second and never less.
        began = time.monotonic()
        body = HELLO | {"max_tokens": 60, "stream": True, "stream_options": {"include_usage": True}}
        with requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=10) as reply:
            stream = Stream()
            for chunk in reply.iter_content(None):
                stream.feed(chunk)
        assert stream.end() == TokenUsage(3, 60)
        assert time.monotonic() - began > 0.45
        resident_kb = int(Path(f"/proc/{process.pid}/status").read_text().split("VmRSS:")[1].split()[0])
        assert resident_kb < 34_000
        # A long answer is under way when the end comes.
        with requests.post(
            f"{url}/v1/completions", json=body | {"max_tokens": 900}, stream=True, timeout=10
        ) as r:
            chunks = r.iter_content(None)
            next(chunks)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=10) == 0
            with pytest.raises(requests.exceptions.ChunkedEncodingError):
                list(chunks)
        assert process.stdout is not None
        assert "Traceback" not in process.stdout.read()


def test_nobody_is_let_in_while_it_loads_and_it_ends_when_told(tmp_path: Path) -> None:
    write_machine(tmp_path, load_s=1000.0)
    port = free_port()
    with stand_in(tmp_path, port) as process:
        read_until(process, "Starting to load model")
        assert refuses(port)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM


def test_the_stand_in_prints_the_fatal_line_and_exits_with_1(tmp_path: Path) -> None:
    write_machine(tmp_path, fatal_line="torch.OutOfMemoryError: CUDA out of memory.")
    port = free_port()
    with stand_in(tmp_path, port) as process:
        read_until(process, "CUDA out of memory")
        assert process.wait(timeout=10) == 1
        assert refuses(port)


def test_it_speaks_http_within_the_same_bounds_as_our_other_servers(tmp_path: Path) -> None:
    """An offer of HTTP/2 is ignored and the body read; a head without an end is cut."""
    write_machine(tmp_path)
    port = free_port()
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAB"}
    with stand_in(tmp_path, port) as process:
        read_until(process, "Uvicorn running on")
        url = f"http://127.0.0.1:{port}/v1/completions"
        for body in (HELLO, HELLO | {"prompt": "a " * 3000}):
            answer = requests.post(url, json=body | {"max_tokens": 2}, headers=offer, timeout=10)
            assert answer.json()["usage"]["completion_tokens"] == 2
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000 + b"\r\n\r\n")
            assert sock.recv(1000).startswith(b"HTTP/1.1 431 ")
