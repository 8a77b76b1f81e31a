"""Time to the first token: sent directly, through `fleet_client`, and through the gateway."""

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx2
import numpy as np

from fleet_client import AsyncFleetTransport, FleetTransport
from fleet_client.tls_pins import pinned_context

BODY = {"model": "vllm-13", "prompt": "Hello there", "max_tokens": 2, "stream": True}


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, 99th percentile and worst, in milliseconds."""
    ms = np.asarray(seconds) * 1e3
    return {
        "count": len(ms),
        "p50_ms": round(float(np.median(ms)), 3),
        "p99_ms": round(float(np.percentile(ms, 99)), 3),
        "max_ms": round(float(ms.max()), 3),
    }


class Direct:
    """Sends to the instance itself, with a lease that it has before its clock starts."""

    def __init__(self, loadbalancer: str) -> None:
        """Open nothing yet."""
        self._loadbalancer = loadbalancer
        self._lease: dict[str, Any] = {}
        self._clients: dict[str, httpx2.Client] = {}
        self._async: dict[str, httpx2.AsyncClient] = {}

    def take_lease(self) -> None:
        """Get a lease, before the clock starts."""
        size = {"prompt_tokens": 3, "max_tokens": 2, "wait_s": 10}
        self._lease = httpx2.post(f"{self._loadbalancer}/route", json=size, trust_env=False).json()

    def give_back(self) -> None:
        """Give the lease back: one that is not used keeps room from the others."""
        end = {"request_id": self._lease["request_id"], "outcome": "unused"}
        httpx2.post(f"{self._loadbalancer}/done", json=end, trust_env=False)

    @property
    def request(self) -> tuple[str, dict[str, str]]:
        """(URL, headers)."""
        lease = self._lease
        return f"{lease['address']}/v1/completions", {"Authorization": f"Bearer {lease['token']}"}

    @property
    def client(self) -> httpx2.Client:
        """A client whose connection is kept."""
        pem = self._lease["certificate"]
        if pem not in self._clients:
            self._clients[pem] = httpx2.Client(verify=pinned_context(pem), trust_env=False)
        return self._clients[pem]

    @property
    def async_client(self) -> httpx2.AsyncClient:
        """The same for an event loop."""
        pem = self._lease["certificate"]
        if pem not in self._async:
            self._async[pem] = httpx2.AsyncClient(verify=pinned_context(pem), trust_env=False)
        return self._async[pem]

    def close(self) -> None:
        """Close what is kept."""
        for client in self._clients.values():
            client.close()

    async def aclose(self) -> None:
        """Close what is kept for the event loop."""
        for client in self._async.values():
            await client.aclose()


def first_token_s(client: httpx2.Client, url: str, headers: dict[str, str] | None = None) -> float:
    """Return seconds from the call to the first bytes of the streamed answer.

    The rest is read outside the clock.
    """
    begun = time.perf_counter()
    with client.stream("POST", url, json=BODY, headers=headers) as reply:
        pieces = reply.iter_raw()
        next(pieces)
        took_s = time.perf_counter() - begun
        for _ in pieces:
            pass
        if reply.status_code != 200:
            raise RuntimeError(f"{url}: wanted 200, got {reply.status_code}")
    return took_s


async def first_token_async_s(
    client: httpx2.AsyncClient, url: str, headers: dict[str, str] | None = None
) -> float:
    """Do the same in an event loop."""
    begun = time.perf_counter()
    async with client.stream("POST", url, json=BODY, headers=headers) as reply:
        pieces = reply.aiter_raw()
        await anext(pieces)
        took_s = time.perf_counter() - begun
        async for _ in pieces:
            pass
        if reply.status_code != 200:
            raise RuntimeError(f"{url}: wanted 200, got {reply.status_code}")
    return took_s


def compare(times: dict[str, list[float]]) -> dict[str, Any]:
    """Return each way's figures, and what its median is above the direct one's."""
    base = statistics.median(times["direct"])
    return {
        way: milliseconds(seconds) | {"above_direct_ms": round((statistics.median(seconds) - base) * 1e3, 3)}
        for way, seconds in times.items()
    }


def measure_sync(loadbalancer: str, gateway: str, rounds: int) -> dict[str, Any]:
    """Measure with httpx2.Client, as threads do."""
    direct = Direct(loadbalancer)
    fleet, ahead = (httpx2.Client(transport=FleetTransport(loadbalancer, ahead=n)) for n in (0, 4))
    local = httpx2.Client(trust_env=False)
    ways: dict[str, Callable[[], float]] = {
        "direct": lambda: first_token_s(direct.client, *direct.request),
        "fleet_client": lambda: first_token_s(fleet, "http://fleet/v1/completions"),
        "fleet_client, leases ahead": lambda: first_token_s(ahead, "http://fleet/v1/completions"),
        "gateway": lambda: first_token_s(local, f"{gateway}/v1/completions"),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for n in range(rounds + 5):
        order = list(ways)
        random.Random(n).shuffle(order)
        for way in order:
            direct.take_lease()  # for each way, so that all come after the same
            if way != "direct":
                direct.give_back()
            took_s = ways[way]()
            if n >= 5:
                times[way].append(took_s)
    for client in (direct, fleet, ahead, local):
        client.close()
    return compare(times)


async def measure_async(loadbalancer: str, rounds: int) -> dict[str, Any]:
    """Measure with httpx2.AsyncClient, as event loops do."""
    direct = Direct(loadbalancer)
    fleet, ahead = (httpx2.AsyncClient(transport=AsyncFleetTransport(loadbalancer, ahead=n)) for n in (0, 4))
    times: dict[str, list[float]] = {"direct": [], "fleet_client": [], "fleet_client, leases ahead": []}
    for n in range(rounds + 5):
        order = list(times)
        random.Random(n).shuffle(order)
        for way in order:
            await asyncio.to_thread(direct.take_lease)
            if way == "direct":
                took_s = await first_token_async_s(direct.async_client, *direct.request)
            else:
                await asyncio.to_thread(direct.give_back)
                client = fleet if way == "fleet_client" else ahead
                took_s = await first_token_async_s(client, "http://fleet/v1/completions")
            if n >= 5:
                times[way].append(took_s)
    await direct.aclose()
    await fleet.aclose()
    await ahead.aclose()
    return compare(times)
