"""Bounds what aiohttp reads before an answer: it reads any number of interim answers (1xx) otherwise."""

from collections.abc import Callable
from functools import partial
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import BadHttpMessage

from fleet_client.connection_pool import MAX_INTERIM


class _BoundedProtocol(ResponseHandler):
    """A connection of aiohttp that fails after MAX_INTERIM interim answers."""

    _interim = 0

    async def read(self) -> Any:
        got = await super().read()
        self._interim = self._interim + 1 if got[0].code < 200 else 0
        if self._interim > MAX_INTERIM:
            raise BadHttpMessage(f"over {MAX_INTERIM} interim answers")
        return got


class BoundedConnector(aiohttp.TCPConnector):
    """An aiohttp connector for machines of other people, whose interim answers must be bounded."""

    def __init__(self, **more: Any) -> None:
        """Make a connector with the arguments that aiohttp's takes."""
        super().__init__(**more)
        make: Callable[..., ResponseHandler] = _BoundedProtocol
        self._factory = partial(make, loop=self._loop)
