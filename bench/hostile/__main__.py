"""Hostile inputs over all faces: none may end in a 500, a traceback, a dead server, or memory that grows.

    python -m bench.hostile [--inputs 240000] [--seed 1] [--json FILE]

Local cloud, autoscaler, loadbalancer, gateway, paced engine and the auth_server of an instance run as
processes, loadbalancer and gateway also under TLS. Three of four inputs are
messages made from the structs that their readers decode, sent with the right key, so that they get far; the
others are requests with bytes changed, and old tricks. At the end 22,500 connections without a byte are
opened to the loadbalancer. Exit status 1 when anything was found.
"""

import asyncio
import json
import random
import resource
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.command import add_counts, bench_parser, machine, write_json
from bench.hostile.faces import MASTER, Face, blind_context, running
from bench.hostile.idle import IDLE, open_idle
from fleet_client.flags import run_main
from fleet_client.listening import allow_many_files

AT_ONCE = 6
"""Connections to each server."""

ANSWER_S = 20.0
"""Seconds for an answer; a local cloud may let a call hang, by a fault that was asked for."""

SILENT_S = 0.05
"""Seconds after which bytes that are no whole request are taken to be waited for in vain."""

WARM_SHARE = 0.2
"""Share of the inputs after which memory is first looked at: until then caches fill."""

MORE_MB = 1.05, 8.0
"""What memory may grow by: a share of it, and megabytes."""

NO_TLS_SHARE = 0.5
"""Share of the bytes that are no request which come to a server under TLS without it."""

_BLIND = blind_context()

RENEW_EVERY = 200
"""Inputs after which the loadbalancer is told a good hot set again, so that reports are believed."""


@dataclass
class Found:
    """What one server did."""

    sent: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # answers 500, with the inputs
    warm_mb: float = 0.0
    end_mb: float = 0.0
    tracebacks: list[str] = field(default_factory=list)
    gone: bool = False

    def count(self) -> None:
        """Count an input."""
        self.sent += 1

    def warm(self, at: int, mb: float) -> None:
        """Note the memory once so many inputs were sent."""
        if not self.warm_mb and self.sent >= at:
            self.warm_mb = mb

    def end(self, face: Face) -> None:
        """Note how the server is at the end."""
        self.gone = face.process.process.poll() is not None
        self.end_mb = 0.0 if self.gone else face.mb
        self.tracebacks = face.tracebacks()

    def faults(self) -> list[str]:
        """Return what must not be."""
        said = [*self.wrong, *self.tracebacks, *(["it is gone"] if self.gone else [])]
        if self.end_mb > MORE_MB[0] * self.warm_mb + MORE_MB[1]:
            said.append(f"memory grew from {self.warm_mb:.0f} to {self.end_mb:.0f} MB")
        return said


class Connection:
    """A connection that is opened when it is wanted, and again after it ended."""

    def __init__(self) -> None:
        """Open nothing yet."""
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def opened(self, port: int, *, tls: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return its two ends."""
        if self._streams is None:
            context = _BLIND if tls else None
            self._streams = await asyncio.open_connection("127.0.0.1", port, limit=2**20, ssl=context)
        return self._streams

    def close(self) -> None:
        """End it at once."""
        if self._streams is not None:
            self._streams[1].transport.abort()
        self._streams = None


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Return the status of one answer, and whether the connection is still good."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head[9:12])
    low = head.lower()
    if b"transfer-encoding: chunked" in low:
        while (line := await reader.readuntil(b"\r\n")).strip() != b"0":
            await reader.readexactly(int(line, 16) + 2)
        await reader.readexactly(2)
    elif b"content-length: " in low:
        await reader.readexactly(int(low.partition(b"content-length: ")[2].split(b"\r")[0]))
    return status, status >= 200 and b"connection: close" not in low


async def _send(face: Face, found: Found, rng: random.Random, connection: Connection) -> None:
    """Send one input; note what came."""
    data, whole = face.input(rng)
    found.count()
    no_tls = face.tls and not whole and rng.random() < NO_TLS_SHARE
    if no_tls:
        connection.close()
    try:
        reader, writer = await connection.opened(face.port, tls=face.tls and not no_tls)
        writer.write(data)
        async with asyncio.timeout(ANSWER_S if whole else SILENT_S):
            status, good = await _answer(reader)
        found.statuses[str(status)] += 1
        if status == 500:
            found.wrong.append(f"500 for {data[:1500]!r}")
        if good and whole:
            return
    except (OSError, EOFError, asyncio.LimitOverrunError):
        found.statuses["closed"] += 1
    except TimeoutError:
        found.statuses["no answer"] += 1
    except ValueError:
        if not no_tls:  # else it is an alert of TLS
            found.wrong.append(f"an answer that is no HTTP for {data[:1500]!r}")
    connection.close()


async def _attack(face: Face, found: Found, count: int, seed: int) -> None:
    warm = int(count * WARM_SHARE)

    async def one(n: int) -> None:
        rng, connection = random.Random(f"{seed} {face.name} {n}"), Connection()
        for step in range(-(-count // AT_ONCE)):
            if face.name.startswith("loadbalancer") and n == 0 and step % RENEW_EVERY == 0:
                await asyncio.to_thread(_renew, face, rng.getrandbits(60))
            await _send(face, found, rng, connection)
            if not found.warm_mb and found.sent >= warm:
                found.warm(warm, face.mb)
        connection.close()

    await asyncio.gather(*(one(n) for n in range(AT_ONCE)))
    found.end(face)


def _renew(face: Face, epoch: int) -> None:
    """Tell the loadbalancer one instance, whose signature the reports carry."""
    one = {
        **{
            "id": 7,
            "state": "hot",
            "master_token": MASTER,
            "throughput_work_s": 100.0,
            "capacity_work": 1000.0,
        },
        **{"address": "http://127.0.0.1:9", "auth_url": "http://127.0.0.1:9"},
    }
    said: dict[str, Any] = {
        **{"epoch": f"e{epoch}", "version": 1, "model": "vllm-13", "prefill_weight": 0.1},
        **{"expected_output_tokens": 200.0, "expected_hot_s": None, "instances": [one]},
    }
    asked = urllib.request.Request(  # noqa: S310 ours
        f"http{'s' if face.tls else ''}://127.0.0.1:{face.port}/hot",
        data=json.dumps(said).encode(),
        headers={"Authorization": f"Bearer {face.keys['control']}"},
        method="PUT",
    )
    with urllib.request.urlopen(asked, timeout=30.0, context=_BLIND):  # noqa: S310 ours
        pass


def attack(directory: Path, inputs: int, seed: int, idle: int = IDLE) -> dict[str, Found]:
    """Send so many inputs to the servers, and open so many idle connections; return what each did."""
    with running(directory) as faces:
        begun = time.monotonic()
        found = {face.name: Found() for face in faces}

        async def all_of_them() -> None:
            share = -(-inputs // len(faces))
            await asyncio.gather(*(_attack(face, found[face.name], share, seed) for face in faces))

        asyncio.run(all_of_them())
        print(f"{inputs / (time.monotonic() - begun):.0f} inputs a second")
        if idle:
            balancer = next(face for face in faces if face.name == "loadbalancer")
            before = balancer.mb
            found["idle connections"] = Found(warm_mb=before, end_mb=open_idle(balancer, idle))
    return found


def main() -> None:
    """Attack, print a table, write JSON; exit 1 when something was found."""
    parser = bench_parser("hostile", __doc__)
    add_counts(parser, ("--inputs", 240_000, "in all"), ("--seed", 1, "of the inputs"))
    add_counts(parser, ("--idle", IDLE, "connections without a byte"))
    args = parser.parse_args()
    allow_many_files()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        found = attack(Path(directory), args.inputs, args.seed, args.idle)
    faults = 0
    for name, one in found.items():
        kinds = ", ".join(f"{status} {count}" for status, count in sorted(one.statuses.items()))
        print(f"{name:17} {one.sent:7} sent  {one.warm_mb:5.0f} -> {one.end_mb:5.0f} MB  {kinds}")
        for fault in one.faults():
            faults += 1
            print(f"  {fault[:1200]}")
    children_s = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"seed {args.seed}: {faults} faults, {time.monotonic() - begun:.0f} s")
    figures = {
        name: {
            "sent": one.sent,
            "statuses": one.statuses,
            "mb": [one.warm_mb, one.end_mb],
            "faults": one.faults(),
        }
        for name, one in found.items()
    }
    cpu_s = round(children_s.ru_utime + children_s.ru_stime, 1)
    write_json(args.json, {"machine": machine(), "seed": args.seed, "servers_cpu_s": cpu_s, "found": figures})
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    run_main(main)
