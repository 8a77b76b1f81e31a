"""Time in the token check of a paced engine with many tokens outstanding."""

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from bench.children import ROOT, child, said
from bench.client.first_token import milliseconds
from localcloud.paced.machine import SimulatedMachine
from remote import boot as boots
from remote.tokens import Issuer


def measure_check(directory: Path, rate: float, seconds: float, outstanding: int) -> dict[str, float]:
    """Send `rate` requests/s, one token each, of so many that are outstanding."""
    fleet = directory / "fleet"
    fleet.mkdir()
    boots.begin(str(fleet))
    issuer = Issuer(str(fleet / "boot"), time.monotonic())
    tokens: list[str] = []
    while len(tokens) < outstanding:
        tokens += issuer.issue(min(2000, outstanding - len(tokens)), time.monotonic())
    machine = directory / "machine.json"
    SimulatedMachine("H100 SXM", 1, 0.0, 0.0, None, None).write(machine)
    times = directory / "times.json"
    environ = {
        "HOME": str(directory),
        "PYTHONPATH": f"{ROOT / 'localcloud' / 'image'}{os.pathsep}{ROOT}",
        "LOCALCLOUD_MACHINE": str(machine),
        "BENCH_TIMES": str(times),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "m"]
    command += ["--served-model-name", "vllm-13", "--host", "127.0.0.1", "--port", "0"]
    command += ["--middleware", "bench.client.timed_check.TimedCheck"]
    with child(command, directory / "model.log", environ=environ) as server:
        url = said("the engine", server, r"Uvicorn running on (http://127\.0\.0\.1:\d+)")
        random.Random(1).shuffle(tokens)
        statuses = asyncio.run(_at_rate(url, tokens[: round(rate * seconds)], rate))
    if set(statuses) != {200}:
        raise RuntimeError(f"wanted 200 from the paced engine, got {set(statuses)}")
    return milliseconds(json.loads(times.read_text()))


async def _at_rate(url: str, tokens: Sequence[str], rate: float) -> list[int]:
    body = {"model": "vllm-13", "prompt": [7] * 20, "max_tokens": 1}

    async def one(token: str) -> int:
        async with session.post(
            f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {token}"}
        ) as reply:
            await reply.read()
            return reply.status

    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
    async with aiohttp.ClientSession(connector=connector) as session:
        begun, tasks = time.monotonic(), []
        for n, token in enumerate(tokens):
            await asyncio.sleep(max(0.0, begun + n / rate - time.monotonic()))
            tasks.append(asyncio.create_task(one(token)))
        return list(await asyncio.gather(*tasks))
