"""Messages for tests: of instances and fleets in good order unless said otherwise."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from dispatch.outside.hot_set import HotSetReader
from web.messages.busy import NO_TRAFFIC, BusyReport, InstanceUse, TrafficReport
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


def busy_report(
    name: str = "lb",
    demand: float = 0.0,
    *,
    unfinished: Mapping[Any, int] | None = None,
    working_s: Mapping[int, float] | None = None,
    failures: Mapping[int, int] | None = None,
    **more: Any,
) -> BusyReport:
    """What a loadbalancer says that knows the hot set, of which all is 0 unless said otherwise.

    unfinished, working_s, failures: by instance. more: other fields, those of its traffic too.
    """
    used = (unfinished or {}, working_s or {}, failures or {})
    uses = {
        i: InstanceUse(used[0].get(i, 0), 0.0, used[1].get(i, 0.0), 0.0, used[2].get(i, 0))
        for i in sorted(used[0].keys() | used[1].keys() | used[2].keys())
    }
    traffic = {name: more.pop(name) for name in TrafficReport.__struct_fields__ if name in more}
    said: dict[str, Any] = {
        "hot_epoch": "e1",
        "hot_version": 0,
        "busy": demand,
        "held": 0,
        "held_work": 0.0,
        "arrivals": 0,
        "arrived_work": 0.0,
    }
    return BusyReport(
        loadbalancer=name,
        demand=demand,
        instances=uses,
        traffic=msgspec.structs.replace(NO_TRAFFIC, **({"late_bound_s": 300.0} | traffic)),
        **(said | more),
    )
