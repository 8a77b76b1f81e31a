"""Many streams at once through the gateway, and straight from the server."""

import asyncio
import contextlib
import random
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from bench.children import ChildProcess, child, cpu_s, free_port, said
from bench.client.first_token import BODY, milliseconds

EVENT_S = 0.02
"""Seconds between two events of a stream: 50 a second."""


class TimedEvent(msgspec.Struct):
    """One event of a stream. at: when it was sent, monotonic seconds; choices: as in a completion."""

    at: float
    choices: list[dict[str, str]]


read_event = msgspec.json.Decoder(TimedEvent).decode


def serve_streams(events: int) -> None:
    """Serve as loadbalancer and instance in one: a stream has an event every 20 ms, with the time in it."""

    async def route(request: web.Request) -> web.Response:
        lease = {
            "address": f"http://127.0.0.1:{request.transport.get_extra_info('sockname')[1]}",  # type: ignore[union-attr]
            **{"token": "t" * 38, "request_id": "0" * 16, "instance_id": 1, "model": "m"},
            **{"expires_at": time.time() + 60, "expires_in_s": 60.0},
        }
        return web.json_response(lease)

    async def stream(request: web.Request) -> web.StreamResponse:
        await request.read()
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        begun = time.monotonic() + random.random() * EVENT_S
        for n in range(events):
            await asyncio.sleep(max(0.0, begun + n * EVENT_S - time.monotonic()))
            event = msgspec.json.encode(TimedEvent(time.monotonic(), [{"text": "word"}]))
            await reply.write(b"data: " + event + b"\n\n")
        await reply.write(b"data: [DONE]\n\n")
        return reply

    async def done(_: web.Request) -> web.Response:
        return web.json_response({})

    app = web.Application()
    app.add_routes([web.post("/route", route), web.post("/done", done), web.post("/v1/completions", stream)])
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(f"streams on http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
    web.run_app(app, sock=sock, print=lambda *_: None)


async def read_streams(url: str, streams: int, events: int) -> tuple[list[float], int]:
    """Return (how late each event arrived, streams that came to their end)."""
    late: list[float] = []

    async def one(n: int) -> bool:
        await asyncio.sleep(n * 0.005)  # 200 a second begin
        count, rest = 0, b""
        async with session.post(f"{url}/v1/completions", json=BODY) as reply:
            async for chunk in reply.content.iter_any():
                now = time.monotonic()
                *lines, rest = (rest + chunk).split(b"\n\n")
                for line in lines:
                    if line == b"data: [DONE]":
                        return count == events
                    late.append(now - read_event(line[len(b"data: ") :]).at)
                    count += 1
        return False

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        ended = await asyncio.gather(*(one(n) for n in range(streams)))
    return late, sum(ended)


def measure_streams(directory: Path, streams: int, seconds: float, *, gateway: bool) -> dict[str, Any]:
    """Read so many streams at once, through the gateway, or straight from the server: what the bench adds."""
    events = round(seconds / EVENT_S)
    command = [sys.executable, "-m", "bench.client.streams", str(events)]
    with child(command, directory / f"streams-{gateway}.log") as server:
        url = said("the server of streams", server, r"streams on (\S+)")
        if not gateway:
            late, ended = asyncio.run(read_streams(url, streams, events))
            return milliseconds(late) | {"streams": streams, "ended": ended}
        with running_gateway(directory, url) as (it, gateway_url):
            before, begun = cpu_s(it.pid), time.monotonic()
            late, ended = asyncio.run(read_streams(gateway_url, streams, events))
            share = (cpu_s(it.pid) - before) / (time.monotonic() - begun)
    return milliseconds(late) | {"streams": streams, "ended": ended, "gateway_core_share": round(share, 3)}


@contextlib.contextmanager
def running_gateway(directory: Path, loadbalancer: str) -> Iterator[tuple[ChildProcess, str]]:
    """Run a gateway on a port that was free a moment ago; gives it and its URL."""
    port = free_port()
    command = [sys.executable, "gateway.py", "--port", str(port), "--loadbalancer", loadbalancer]
    with child(command, directory / f"gateway-{port}.log") as it:
        yield it, said("the gateway", it, r"(http://127\.0\.0\.1:" + str(port) + ")")


if __name__ == "__main__":
    serve_streams(int(sys.argv[1]))
