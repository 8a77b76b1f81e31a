"""How long the health checks of a fleet take when some of its machines hang.

    python -m bench.checks [--json FILE]

Real sockets on loopback: a second process has the machines, each with an auth_server and a model server of
its own, and an ssh server (paramiko) that answers as the log of a loaded model does. Those that hang accept
connections and never answer: some at ssh, some at the auth_server, some at the model server. They are
checked by the autoscaler's own `HealthChecker`, log included, all at once: first the healthy ones alone, then
all together. Those that hang take a whole timeout; no other may be delayed by them.
"""

import argparse
import asyncio
import json
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import paramiko

from bench.children import child, said
from bench.command import add_counts, bench_parser, machine, write_json
from fleet.health_check import HealthCheck, HealthCheckOrder, Verdict
from fleet.outside.health_checker import HealthChecker
from fleet.outside.ssh_log import SshLog
from fleet.states import State
from fleet_client.flags import run_main
from instance_client import InstanceClient

SLACK_S = 0.5
"""Seconds a loaded machine may need to notice that a timeout has passed."""

HANGS_AT = ("ssh", "auth", "model")


# -- the machines, in a process of their own --------------------------------------------------------------


class Session(paramiko.ServerInterface):
    """Lets every client in and answers every command as a loaded model's log would."""

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:  # noqa: ARG002
        """Accept."""
        return paramiko.common.AUTH_SUCCESSFUL

    def get_allowed_auths(self, username: str) -> str:  # noqa: ARG002
        """Say: by key."""
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:  # noqa: ARG002
        """Accept."""
        return paramiko.common.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:  # noqa: ARG002
        """Answer from another thread: this one must first say that the command runs."""

        def reply() -> None:
            channel.sendall(b"\nFLEET-BEGIN\nREADY\nFLEET-CERTIFICATE\nFLEET-END\n")
            channel.send_exit_status(0)
            channel.shutdown_write()

        threading.Thread(target=reply, daemon=True).start()
        return True


def serve_ssh(listener: socket.socket, host_key: paramiko.PKey) -> None:
    """Serve until the process ends."""
    sessions: list[paramiko.Transport] = []
    while True:
        connection, _ = listener.accept()
        transport = paramiko.Transport(connection)
        sessions.append(transport)
        transport.add_server_key(host_key)
        transport.start_server(event=threading.Event(), server=Session())


def http_answer(kind: str, payload: bytes) -> bytes:
    """A whole HTTP answer with that payload."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (
        kind.encode(),
        len(payload),
        payload,
    )


async def answer_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Give tokens, and an answer of four tokens to any prompt, streamed where that is asked for."""
    load = {
        **{"boot_id": "b", "seq": 0, "missed": False, "started": [], "ended": [], "running": 0, "waiting": 0},
        **{"kv_use": 0.1, "model_up": True, "prompt_tokens_total": 0, "generation_tokens_total": 0},
    }
    text, usage = (
        {"text": "a b c d", "delta": {"content": "a b c d"}},
        {"prompt_tokens": 1, "completion_tokens": 4},
    )
    said = {
        **{"tokens": ["t" * 64], "boot_id": "b", "expires_at": time.time() + 600, "expires_in_s": 600.0},
        **{"load": load, "choices": [text], "usage": usage},
    }
    event = json.dumps({"choices": [text], "usage": usage})
    whole = http_answer("application/json", json.dumps(said).encode())
    streamed = http_answer("text/event-stream", f"data: {event}\n\ndata: [DONE]\n\n".encode())
    try:
        while True:
            asked = await reader.readuntil(b"\r\n\r\n")
            body = b""
            for line in asked.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    body = await reader.readexactly(int(line.partition(b":")[2]))
            writer.write(streamed if body and json.loads(body).get("stream") else whole)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def run_machines(count: int, hanging: int) -> None:
    """Serve until killed; the ports of each go to stdout as JSON."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    threading.Thread(target=serve_ssh, args=(listener, paramiko.ECDSAKey.generate()), daemon=True).start()
    silent = socket.create_server(("127.0.0.1", 0), backlog=1024)  # the kernel accepts, nothing answers
    never = silent.getsockname()[1]
    machines: list[dict[str, int]] = []
    servers = []
    for n in range(count):
        ports = {"ssh": listener.getsockname()[1]}
        for name in ("auth", "model"):
            servers.append(await asyncio.start_server(answer_http, "127.0.0.1", 0))
            ports[name] = servers[-1].sockets[0].getsockname()[1]
        if n < hanging:
            ports[HANGS_AT[n % len(HANGS_AT)]] = never
        machines.append(ports)
    print(json.dumps(machines), flush=True)
    await asyncio.Event().wait()


@contextmanager
def machines(count: int, hanging: int) -> Iterator[list[HealthCheckOrder]]:
    """Run so many machines, the first of which hang; gives the orders to check them."""
    command = [sys.executable, "-m", "bench.checks", "--machines", str(count), str(hanging)]
    with tempfile.TemporaryDirectory() as directory, child(command, Path(directory, "log")) as process:
        told: list[dict[str, int]] = json.loads(said("the machines", process, r"^(\[.*\])\n"))
        yield [
            HealthCheckOrder(
                label=f"fleet/{n}",
                id=n,
                state=State.RUNNING,
                ssh=("127.0.0.1", ports["ssh"]),
                auth_url=f"http://127.0.0.1:{ports['auth']}",
                address=f"http://127.0.0.1:{ports['model']}",
                read_log=True,
            )
            for n, ports in enumerate(told)
        ]


# -- the checks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckRound:
    """Seconds: of all checks together, and of those that passed."""

    machines: int
    hanging: int
    passed: int
    all_s: float
    passed_median_s: float
    passed_worst_s: float


async def check_all(orders: list[HealthCheckOrder], hanging: int, timeout_s: float) -> CheckRound:
    """Check all of them at once, as the autoscaler does."""
    known: dict[str, str] = {}
    took: dict[str, float] = {}
    begun = time.perf_counter()
    async with InstanceClient() as client:
        checker = HealthChecker(
            client,
            SshLog(paramiko.ECDSAKey.generate(), known.setdefault),
            lambda _: "m" * 64,
            "bench",
            timeout_s,
            time.monotonic,
        )

        async def one(order: HealthCheckOrder) -> HealthCheck:
            found = await checker.check(order)
            took[order.label] = time.perf_counter() - begun
            return found

        found = await asyncio.gather(*(one(order) for order in orders))
    all_s = time.perf_counter() - begun
    passed = [took[c.label] for c in found if c.verdict is Verdict.PASSED]
    return CheckRound(
        len(orders),
        hanging,
        len(passed),
        round(all_s, 3),
        round(statistics.median(passed), 3),
        round(max(passed), 3),
    )


def measure(count: int, hanging: int, timeout_s: float) -> tuple[CheckRound, CheckRound]:
    """Check the healthy ones alone, then all."""
    with machines(count, hanging) as orders:
        alone = asyncio.run(check_all(orders[hanging:], 0, timeout_s))
        together = asyncio.run(check_all(orders, hanging, timeout_s))
    return alone, together


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    parser = bench_parser("checks", __doc__)
    add_counts(parser, ("--instances", 50, "in all"), ("--hanging", 10, "that hang"))
    parser.add_argument(
        "--timeout-s", type=float, default=5.0, metavar="S", help="seconds of one check (default 5)"
    )
    parser.add_argument("--machines", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.machines is not None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        asyncio.run(run_machines(*args.machines))
        return
    rounds = measure(args.instances, args.hanging, args.timeout_s)
    print(
        f"{'instances':>9} {'hanging':>7} {'passed':>6} {'all s':>7} {'passed: median s':>16} {'worst s':>7}"
    )
    for r in rounds:
        print(
            f"{r.machines:9d} {r.hanging:7d} {r.passed:6d} {r.all_s:7.2f} {r.passed_median_s:16.2f} "
            f"{r.passed_worst_s:7.2f}"
        )
    within = rounds[1].all_s <= args.timeout_s + SLACK_S
    print(f"one check timeout: {args.timeout_s:g} s; all done within it: {'yes' if within else 'no'}")
    write_json(
        args.json,
        {
            "machine": machine(),
            "timeout_s": args.timeout_s,
            "within_one_timeout": within,
            "alone": asdict(rounds[0]),
            "together": asdict(rounds[1]),
        },
    )


if __name__ == "__main__":
    run_main(main)
