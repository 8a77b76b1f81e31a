"""The token check with a watch: how long it looks at a request before the engine gets it.

As `--middleware bench.client.timed_check.TimedCheck`; the seconds go to the file BENCH_TIMES when the server
ends.
"""

import atexit
import json
import os
import time
from pathlib import Path

from remote.token_check import App, Receive, Scope, Send, TokenCheck

TIMES: list[float] = []


class TimedCheck(TokenCheck):
    """Notes for each admitted request what passed between its arrival and the app's first look at it."""

    def __init__(self, app: App) -> None:
        """app: vLLM's, or what stands in for it."""

        async def noted(scope: Scope, receive: Receive, send: Send) -> None:
            if "bench.came_at" in scope:
                TIMES.append(time.perf_counter() - scope["bench.came_at"])
            await app(scope, receive, send)

        super().__init__(noted)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Note when the request came, then check it."""
        if scope["type"] == "http":
            scope["bench.came_at"] = time.perf_counter()
        await super().__call__(scope, receive, send)


def _write() -> None:
    if path := os.environ.get("BENCH_TIMES"):
        Path(path).write_text(json.dumps(TIMES))


atexit.register(_write)
