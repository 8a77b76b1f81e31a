"""What sim.py asks of autoscaler and loadbalancer over HTTP, as an operator may."""

import asyncio
import json
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import aiohttp
from msgspec import Struct, structs

from simulation.report import RunCosts
from web.messages.decoding import BadField, decode

T = TypeVar("T")

ASK_TIMEOUT_S = 3.0
"""Seconds that an answer of autoscaler or loadbalancer may take."""


POINTS = 600
"""Most points of the fleet over time that are asked for: as many as a picture shows."""


class FleetColumns(Struct, frozen=True):
    """The part of the autoscaler's `GET /history` that the report needs: columns of equal length."""

    at_s: tuple[float, ...]
    hot: tuple[float, ...]
    draining: tuple[float, ...]
    booting: tuple[float, ...]
    cold: tuple[float, ...]
    lost: tuple[float, ...]
    wanted_hot: tuple[float, ...]
    wanted_total: tuple[float, ...]
    offered: tuple[float, ...]
    busy: tuple[float, ...]
    held: tuple[float, ...]
    oldest_wait_s: tuple[float, ...]
    arrived: tuple[float, ...]
    late: tuple[float, ...]
    usd_h: tuple[float, ...]

    def since(self, start_s: float, to_s: float) -> dict[str, Any]:
        """Return the columns with times counted from start_s on, the beginning of the run, as a picture has.

        Raises NoAnswer when they are not of equal length.
        """
        columns = structs.asdict(self)
        if len({len(values) for values in columns.values()}) > 1:
            raise NoAnswer("/history: wanted columns of equal length")
        columns["at_s"] = [round(at - start_s, 3) for at in self.at_s]
        return {"from": 0.0, "to": round(to_s - start_s, 3), **columns}


class NoAnswer(Exception):
    """The autoscaler or the loadbalancer did not answer as it must; the text says which, and what came."""


def bearer(key: str | None) -> dict[str, str]:
    """Return the Authorization header that carries the key; an empty dictionary for None."""
    return {"Authorization": f"Bearer {key}"} if key else {}


class Operator:
    """Calls of the autoscaler's routes, and of the loadbalancer's `GET /status`. Each may raise NoAnswer."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        autoscaler: str,
        loadbalancer: str,
        key: str | None,
        trusted: Callable[[str], ssl.SSLContext | bool] = lambda _: True,
    ) -> None:
        """Make the calls of two servers, given by their URLs.

        key: the control key, where there is one. trusted: which certificates the server of a URL may show.
        """
        self._trusted = trusted
        self._session = session
        self._autoscaler = autoscaler
        self._loadbalancer = loadbalancer
        self._headers = bearer(key)

    async def instances(self) -> tuple[list[Mapping[str, Any]], bool | None]:
        """Return every instance, and whether the autoscaler manages the fleet (None when it does not say)."""
        said = await self._ask("GET", f"{self._autoscaler}/instances")
        rows, manage = said.get("instances"), said.get("manage")
        if not isinstance(rows, list) or not all(isinstance(r, dict) and "state" in r for r in rows):
            raise NoAnswer(f"{self._autoscaler}/instances: wanted instances with states")
        return rows, manage if isinstance(manage, bool) else None

    async def manage(self, wanted: bool) -> None:
        """Tell the autoscaler whether to start and stop instances."""
        await self._ask("PUT", f"{self._autoscaler}/manage", {"manage": wanted})

    async def costs(self, from_s: float, to_s: float) -> RunCosts:
        """Return what the fleet cost between two times, epoch seconds."""
        raw = await self._fetch("GET", f"{self._autoscaler}/costs?from={from_s:.3f}&to={to_s:.3f}")
        try:
            return decode(raw, RunCosts)
        except BadField as e:
            raise NoAnswer(f"{self._autoscaler}/costs: {e}") from None

    async def history(self, from_s: float, to_s: float) -> dict[str, Any]:
        """Return the fleet and its load between two times, epoch seconds, as columns with times from 0 on."""
        url = f"{self._autoscaler}/history?from={from_s:.3f}&to={to_s:.3f}&points={POINTS}"
        try:
            return decode(await self._fetch("GET", url), FleetColumns).since(from_s, to_s)
        except BadField as e:
            raise NoAnswer(f"{self._autoscaler}/history: {e}") from None

    async def status(self) -> Mapping[str, Any]:
        """Return the loadbalancer's figures, its answer to GET /status."""
        return await self._ask("GET", f"{self._loadbalancer}/status")

    async def _ask(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        raw = await self._fetch(method, url, body)
        try:
            said = json.loads(raw)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise NoAnswer(f"{url}: wanted a JSON object, got {raw[:40]!r}")
        return said

    async def _fetch(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> bytes:
        shown = url.partition("?")[0]
        timeout = aiohttp.ClientTimeout(total=ASK_TIMEOUT_S)
        try:
            async with self._session.request(
                method,
                url,
                json=body,
                headers=self._headers,
                timeout=timeout,
                allow_redirects=False,
                ssl=self._trusted(url),
            ) as reply:
                raw = await reply.read()
                status = reply.status
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise NoAnswer(f"{shown}: {e or type(e).__name__}") from None
        if status != 200:
            raise NoAnswer(f"{shown}: wanted 200, got {status}")
        return raw


async def ask_again(ask: Callable[[], Awaitable[T]], for_s: float) -> T:
    """Return what `ask` returns, called again for up to for_s seconds while it raises NoAnswer.

    After that the last NoAnswer is raised.
    """
    until = time.monotonic() + for_s
    while True:
        try:
            return await ask()
        except NoAnswer:
            if time.monotonic() >= until:
                raise
        await asyncio.sleep(0.5)
