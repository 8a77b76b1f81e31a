"""Whether somebody takes connections at an address."""

import asyncio
import contextlib


async def connects(host: str | None, port: int | None, limit_s: float) -> bool:
    """Return whether a TCP connection there can be made within limit_s seconds; nothing is sent."""
    try:
        async with asyncio.timeout(limit_s):
            _, writer = await asyncio.open_connection(host, port)
    except OSError:  # also TimeoutError
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True
