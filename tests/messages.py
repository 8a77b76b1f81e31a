"""Messages for tests: of instances and fleets in good order unless said otherwise."""

import asyncio
import json
from typing import Any

from dispatch.outside.hot_set import HotSetReader
from web.messages.hot_set import HotSet
from web.messages.reports import LoadReport, RequestEnd, TokenBatch


def hot_set(said: dict[str, Any]) -> HotSet:
    """The hot set, read as a loadbalancer reads it; raises BadField."""
    return asyncio.run(HotSetReader().read(json.dumps(said).encode()))


def request_end(id: str, status: str = "finished", output_tokens: int = 100) -> RequestEnd:
    """The end of one request in a report."""
    return RequestEnd(id, status, output_tokens)  # type: ignore[arg-type]


def load_report(**what: Any) -> LoadReport:
    """A load report, of an idle instance."""
    said: dict[str, Any] = {
        "boot_id": "boot1",
        "seq": 0,
        "started": (),
        "ended": (),
        "running": 0,
        "waiting": 0,
        "model_up": True,
        "prompt_tokens_total": 0,
        "generation_tokens_total": 0,
    }
    return LoadReport(**(said | what))


def token_batch(tokens: list[str], expires_in_s: float = 600.0, boot_id: str = "boot1") -> TokenBatch:
    """The answer to a refill."""
    return TokenBatch(tokens, boot_id, expires_in_s, load_report(boot_id=boot_id))
