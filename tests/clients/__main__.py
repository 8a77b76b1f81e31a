"""Try client programs of others against a fleet on the local cloud, and say what works: `make test-clients`.

    python -m tests.clients [--only NAME] [--write]     --write: the table goes into docs/clients.md

Each is asked for a chat, a stream, a call of a tool, to cancel a stream, to time out, and for 16 at once,
through the gateway and, where it takes a transport, through fleet_client. Exit status 1 when anything fails.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from simulation.live.local_stack import LocalStack
from simulation.live.stack_config import StackConfig
from tests.paths import ROOT
from tests.ports import free_port

HERE = Path(__file__).parent
ENVIRONMENT = ROOT / ".venv-clients"
PAGE = ROOT / "docs" / "clients.md"
BEGIN, END = "<!-- clients: made by `make test-clients` -->\n", "<!-- end of clients -->\n"

CHECKS = ("chat", "stream", "tools", "cancel", "timeout", "16 at once")

TIMEOUT_S = 240.0
"""Seconds for all checks of one program."""


@dataclass(frozen=True)
class Program:
    """A client program. way: through what it speaks to the fleet; command: run in the directory cwd."""

    name: str
    way: str
    command: Sequence[str]
    cwd: Path = ROOT


def programs(base: str, loadbalancer: str) -> Iterator[Program]:
    """Yield the programs that are installed here."""
    python = [str(ENVIRONMENT / "bin" / "python"), str(HERE / "programs.py")]
    for name in (
        "openai",
        "anthropic",
        "langchain-openai",
        "llama-index",
        "litellm",
        "instructor",
        "pydantic-ai",
    ):
        yield Program(name, "gateway", [*python, name, base])
    for name in ("openai", "langchain-openai", "pydantic-ai"):
        yield Program(name, "`fleet_client`", [*python, name, base, loadbalancer])
    node = ENVIRONMENT / "node"
    if shutil.which("node") and (node / "node_modules").exists():
        for name, title in (("openai", "openai (JavaScript)"), ("ai", "Vercel's AI SDK")):
            yield Program(title, "gateway", ["node", str(HERE / "chat.mjs"), name, base], node)
    if shutil.which("java"):
        yield Program("JDK's HttpClient", "gateway", ["java", str(HERE / "Chat.java"), base])
    if shutil.which("curl"):
        for title, flags in (("curl", ()), ("curl --http2", ("--http2",))):
            yield Program(title, "gateway", [sys.executable, str(HERE / "curl.py"), base, *flags])


@contextmanager
def gateway(loadbalancer: str) -> Iterator[str]:
    """Run a gateway; gives its base URL."""
    port = free_port()
    command = [sys.executable, "gateway.py", "--port", str(port), "--loadbalancer", loadbalancer]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        base = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{base}/health", timeout=5).close()  # noqa: S310 on loopback
                break
            except OSError:
                time.sleep(0.2)
        yield f"{base}/v1"
    finally:
        running.terminate()
        running.wait(30)


def tried(program: Program) -> dict[str, str]:
    """Return what does not work, by check; "" works, "-" is nothing that the program has."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": "unused", "DO_NOT_TRACK": "1"}
    try:
        ran = subprocess.run(
            program.command,
            cwd=program.cwd,
            env=environ,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return dict.fromkeys(CHECKS, f"not done after {TIMEOUT_S:g} s")
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    if not lines:
        last = (ran.stderr.strip().splitlines() or ["no output"])[-1]
        return dict.fromkeys(CHECKS, f"status {ran.returncode}: {last:.150}")
    found: dict[str, str] = json.loads(lines[-1])
    return found


def row(program: Program, found: dict[str, str]) -> str:
    """Return the row of a program in the table."""
    cells = ({"": "works", "-": "–"}.get(found.get(check, "no answer"), "**fails**") for check in CHECKS)
    return f"| {program.name} | {program.way} | {' | '.join(cells)} |\n"


def main() -> int:
    """Try all programs and print the table."""
    parser = argparse.ArgumentParser(prog="tests.clients", description="try client programs of others")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--write", action="store_true", help="write the table into docs/clients.md")
    flags = parser.parse_args()
    rows = [f"| program | through | {' | '.join(CHECKS)} |\n|---|---|{'---|' * len(CHECKS)}\n"]
    failed = False
    config = StackConfig(instances=2, hot=2, autoscaler_args=("--policy-param", "min_hot=2"))
    with LocalStack(config) as stack, gateway(stack.loadbalancer_url) as base:
        for program in programs(base, stack.loadbalancer_url):
            if flags.only not in program.name:
                continue
            found = tried(program)
            rows.append(row(program, found))
            print(rows[-1], end="", flush=True)
            for check, what in found.items():
                if what not in ("", "-"):
                    failed = True
                    print(f"    {check}: {what}", flush=True)
    if flags.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + "".join(rows) + END + rest.partition(END)[2])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
