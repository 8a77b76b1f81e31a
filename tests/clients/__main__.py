"""Try client programs of others against a fleet on the local cloud, and say what works: `make test-clients`.

    python -m tests.clients [--only NAME] [--write]     --write: the table goes into docs/clients.md

Each is asked for a chat, a stream, a call of a tool, to cancel a stream, to time out, and for 16 at once,
through the gateway, through the gateway behind servers of others, and, where it takes a transport, through
fleet_client; servers that fork use fleet_client. Exit status 1 when anything fails.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from simulation.live.local_stack import LocalStack
from simulation.live.stack_config import StackConfig
from tests.clients.in_front import litellm_proxy, nginx
from tests.paths import ROOT
from tests.ports import free_port

HERE = Path(__file__).parent
ENVIRONMENT = ROOT / ".venv-clients"
PAGE = ROOT / "docs" / "clients.md"
BEGIN, END = "<!-- clients: made by `make test-clients` -->\n", "<!-- end of clients -->\n"

CHECKS = ("chat", "stream", "tools", "cancel", "timeout", "16 at once")

LIBRARIES = ("openai", "anthropic", "langchain-openai", "llama-index", "litellm", "instructor", "pydantic-ai")
"""Those of programs.py. All take an HTTP client, so all can go through fleet_client."""

TIMEOUT_S = 240.0
"""Seconds for all checks of one program; AIPerf, the slowest, takes 65, and 150 on a machine that is busy."""

NOT_HERE = "not here"
"""What is said of each check of a program that is not installed."""

LANES = 3
"""Programs that are tried at a time: most of their time is spent in waiting."""


@dataclass(frozen=True)
class Program:
    """A client program. way: through what it speaks to the fleet; command: run in cwd, empty: not here."""

    name: str
    way: str
    command: Sequence[str]
    cwd: Path = ROOT
    key: str = "unused"


def programs(base: str, loadbalancer: str, fronts: ExitStack) -> Iterator[Program]:
    """Yield the programs; one that is not here has no command. Servers in front run until fronts ends."""
    python = str(ENVIRONMENT / "bin" / "python")
    library = [python, str(HERE / "programs.py")]
    aiperf = ENVIRONMENT / "aiperf" / "bin" / "python"
    yield Program("AIPerf", "gateway", [str(aiperf), str(HERE / "benchmark.py"), base])
    for name in LIBRARIES:
        yield Program(name, "gateway", [*library, name, base])
    for name in LIBRARIES:
        yield Program(name, "`fleet_client`", [*library, name, base, loadbalancer])
    for name, title in (("gunicorn", "gunicorn --preload"), ("celery", "Celery, prefork")):
        yield Program(title, "`fleet_client`", [python, str(HERE / "forked.py"), name, base, loadbalancer])
    url, key = fronts.enter_context(litellm_proxy(ENVIRONMENT, base))
    yield Program("openai", "litellm's proxy, gateway", [*library, "openai", url], key=key)
    front = fronts.enter_context(nginx(base))
    yield Program("openai", "nginx, gateway", [*library, "openai", front] if front else [])
    node = ENVIRONMENT / "node"
    installed = shutil.which("node") and (node / "node_modules").exists()
    for name, title in (("openai", "openai (JavaScript)"), ("ai", "Vercel's AI SDK")):
        command = ["node", str(HERE / "chat.mjs"), name, base]
        yield Program(title, "gateway", command if installed else [], node if installed else ROOT)
    java = ["java", str(HERE / "Chat.java"), base]
    yield Program("JDK's HttpClient", "gateway", java if shutil.which("java") else [])
    for title, flags in (("curl", ()), ("curl --http2", ("--http2",))):
        command = [sys.executable, str(HERE / "curl.py"), base, *flags]
        yield Program(title, "gateway", command if shutil.which("curl") else [])


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
    if not program.command:
        return dict.fromkeys(CHECKS, NOT_HERE)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": program.key, "DO_NOT_TRACK": "1"}
    environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it looks on GitHub for prices
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
    cells = (
        {"": "works", "-": "–", NOT_HERE: "not tried"}.get(found.get(check, "no answer"), "**fails**")
        for check in CHECKS
    )
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
    with (
        LocalStack(config) as stack,
        gateway(stack.loadbalancer_url) as base,
        ExitStack() as fronts,
        ThreadPoolExecutor(LANES) as lanes,
    ):
        wanted = [p for p in programs(base, stack.loadbalancer_url, fronts) if flags.only in p.name]
        for program, found in zip(wanted, lanes.map(tried, wanted), strict=True):
            rows.append(row(program, found))
            print(rows[-1], end="", flush=True)
            for check, what in found.items():
                if what not in ("", "-", NOT_HERE):
                    failed = True
                    print(f"    {check}: {what}", flush=True)
    if flags.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + "".join(rows) + END + rest.partition(END)[2])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
