"""Clients that take what they do not use, lie, or connect and say nothing; each in a process of its own.

python -m bench.fairness.attackers KIND PORT KEY[,KEY]

    hoarder       two batches of 64 leases a second, 20 more one by one, and 200 that wait; none is used
    liars         two keys take leases and say of each that somebody else answered there, 20 times a second
    connections   1,000 connections without a byte; what is closed is opened again
    bodies        20 connections that send 32 MiB to a route of others' without a key, again and again

All is to this machine, and bounded.
"""

import asyncio
import contextlib
import os
import sys

import aiohttp
import uvloop

from fleet_client.listening import allow_many_files

TINY = 0.001
"""Work that the hoarder says its requests are."""

WAITING, PAUSE_S = 200, 2.0
"""Requests of the hoarder that wait, and seconds after which any attacker that was refused comes again."""

CONNECTIONS, BODIES, BODY = 1000, 20, 32 * 2**20
"""Silent connections, connections with bodies, and bytes of a body."""

CHUNK = b"x" * 65_536
"""What a body consists of."""


class Attacker:
    """One attacker. base: URL of the loadbalancer."""

    def __init__(self, port: int, keys: list[str], session: aiohttp.ClientSession) -> None:
        """keys: of its clients."""
        self._port = port
        self._keys = keys
        self._session = session

    async def _post(self, path: str, said: dict[str, object], key: str) -> dict[str, object]:
        headers = {"Authorization": f"Bearer {key}"}
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            url = f"http://127.0.0.1:{self._port}{path}"
            async with self._session.post(url, json=said, headers=headers) as reply:
                found: dict[str, object] = await reply.json()
                return found
        return {}

    async def hoarder(self) -> None:
        """Take leases in every way, and use none."""
        key = self._keys[0]

        async def wait() -> None:
            while True:
                await self._post("/route", {"work": TINY, "wait_s": 60}, key)
                await asyncio.sleep(PAUSE_S)

        async def take() -> None:
            while True:
                await self._post("/route", {"work": TINY, "count": 64}, key)
                for _ in range(10):
                    await self._post("/route", {"work": TINY}, key)
                await asyncio.sleep(0.5)

        await asyncio.gather(take(), *(wait() for _ in range(WAITING)))

    async def liars(self) -> None:
        """Say that somebody else answers at every instance."""
        while True:
            for key in self._keys:
                lease = await self._post("/route", {"work": TINY}, key)
                if "request_id" in lease:
                    done = {
                        "request_id": lease["request_id"],
                        "outcome": "failed",
                        "why": "wrong_certificate",
                    }
                    await self._post("/done", done, key)
            await asyncio.sleep(0.05)

    async def connections(self) -> None:
        """Connect and say nothing."""

        async def hold() -> None:
            while True:
                with contextlib.suppress(OSError):
                    reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                    await reader.read()
                    writer.close()
                await asyncio.sleep(PAUSE_S)

        await asyncio.gather(*(hold() for _ in range(CONNECTIONS)))

    async def bodies(self) -> None:
        """Send large bodies without a key."""
        head = f"PUT /hot HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {BODY}\r\n\r\n".encode()

        async def send() -> None:
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                    writer.write(head)
                    for _ in range(BODY // len(CHUNK)):
                        writer.write(CHUNK)
                        await writer.drain()
                    writer.close()
                await asyncio.sleep(PAUSE_S)

        await asyncio.gather(*(send() for _ in range(BODIES)))


KINDS = ("hoarder", "liars", "connections", "bodies")
"""What there is."""


async def attack(kind: str, port: int, keys: list[str]) -> None:
    """Attack until killed."""
    no_limit = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=no_limit, trust_env=False) as session:
        it = Attacker(port, keys, session)
        await {k: getattr(it, k) for k in KINDS}[kind]()


if __name__ == "__main__":
    os.nice(15)  # elsewhere, it would not need this machine's processor
    allow_many_files()
    uvloop.run(attack(sys.argv[1], int(sys.argv[2]), sys.argv[3].split(",")))
