"""A machine that freezes with streams on it, live on the local cloud: they end, and may be sent again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import openai
import pytest

from fleet_client import FleetTransport
from simulation.live.local_stack import LocalStack, get_json
from simulation.live.stack_config import StackConfig
from tests.paths import ROOT
from tests.ports import free_port
from tests.waiting import wait_for

pytestmark = pytest.mark.alone

STORY = "Count to 168."
"""A prompt that the paced engine answers with 1,155 tokens, in 15 s."""

STREAMS = 6
"""Streams by each way, over two machines."""

ENDS_S = 40.0
"""Seconds within which the streams of a frozen machine end (docs/clients.md)."""


@dataclass(frozen=True)
class Told:
    """How a stream ended, and when on the monotonic clock. error: None for one that was read to its end."""

    at: float
    pieces: int
    error: Exception | None


@contextmanager
def gateway(loadbalancer: str) -> Iterator[str]:
    """A gateway; gives its base URL."""
    port = free_port()
    command = [sys.executable, "gateway.py", "--port", str(port), "--loadbalancer", loadbalancer]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for("the gateway answers", lambda: get_json(f"http://127.0.0.1:{port}/health"))
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        running.terminate()
        running.wait(30)


def streamed(client: openai.OpenAI, text: str, begun: list[str]) -> Told:
    """How a stream ended; its text is added to begun with its first part."""
    pieces = 0
    said = {"role": "user", "content": text}
    try:
        for _ in client.chat.completions.create(model="vllm-13", messages=[said], stream=True):  # type: ignore[list-item]
            pieces += 1
            if pieces == 2:
                begun.append(text)
    except (openai.APIError, httpx2.TransportError) as e:
        return Told(time.monotonic(), pieces, e)
    return Told(time.monotonic(), pieces, None)


def unfinished(stack: LocalStack) -> dict[int, int]:
    """Requests on each machine that is hot, by its id."""
    rows = (get_json(f"{stack.loadbalancer_url}/status") or {}).get("instances", [])
    return {int(row["id"]): int(row["unfinished"]) for row in rows if row["state"] == "hot"}


def processes(stack: LocalStack, instance_id: int) -> list[int]:
    """The ids of what runs on a machine."""
    rows = (get_json(f"{stack.cloud_url}/localcloud/status") or {})["instances"]
    return [int(pid) for row in rows if row["id"] == instance_id for pid in row["pids"]]


@pytest.mark.timeout(240)
def test_streams_on_a_frozen_machine_end_with_an_error_and_may_be_sent_again(tmp_path: Path) -> None:
    config = StackConfig(
        instances=2,
        hot=2,
        seed=7,
        state_dir=tmp_path / "stack",
        autoscaler_args=("--policy-param", "min_hot=2"),
    )
    with LocalStack(config) as stack, gateway(stack.loadbalancer_url) as base:
        more = {"api_key": "unused", "max_retries": 0, "timeout": 600.0}
        transport = httpx2.Client(transport=FleetTransport(stack.loadbalancer_url), timeout=600.0)
        clients = [
            openai.OpenAI(base_url=base, **more),  # type: ignore[arg-type]
            openai.OpenAI(base_url="http://fleet/v1", http_client=transport, **more),  # type: ignore[arg-type]
        ]
        stopped: list[int] = []
        begun: list[str] = []
        try:
            with ThreadPoolExecutor(2 * STREAMS) as pool:
                running = [
                    pool.submit(streamed, client, STORY, begun) for client in clients for _ in range(STREAMS)
                ]
                wait_for("all run", lambda: len(begun) == 2 * STREAMS)
                assert min(unfinished(stack).values()) >= 2
                frozen_at, victim = time.monotonic(), max(unfinished(stack))
                stopped = processes(stack, victim)
                for pid in stopped:
                    os.kill(pid, signal.SIGSTOP)
                told = [one.result() for one in running]
            ended = [one for one in told if one.error is not None]
            whole = [one for one in told if one.error is None]
            assert all(
                isinstance(one.error, (openai.APIConnectionError, httpx2.TransportError)) for one in ended
            )
            print("ended after", sorted(round(one.at - frozen_at, 1) for one in ended))
            assert len(ended) >= 2
            assert len(whole) >= 2
            assert all(one.pieces > 1000 for one in whole)
            assert max(one.at for one in ended) - frozen_at < ENDS_S
            for client in clients:
                assert streamed(client, "Hello", begun).error is None
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGKILL)
        end = stack.stop()
    assert end.left_behind == ()
