"""What another goal, policy, limit or GPU would have made of the fleet's last day, as a run in virtual time.

Pure: the log that is played and the flags of the run are made here, and its report is read.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from fleet.arrivals import Arrived
from policies import POLICIES, Objective, Policy
from web.messages.operator import WhatIfBody

SEED = 1
"""Of both runs: they have the same luck."""

LEAST_REQUESTS = 20
"""Arrivals below which a run says nothing."""

SHOWN = ("p50", "p95", "p99")


@dataclass(frozen=True)
class FleetNow:
    """What a run in virtual time has to know of the fleet. profile: name of the model's."""

    profile: str
    policy: Policy
    max_instances: int
    max_usd_h: float
    late_lane: bool


def log_of(arrived: Iterable[Arrived], prefill_weight: float) -> Iterator[str]:
    """Yield the lines of a log with a row for each request that arrived."""
    yield "arrival_s,prompt_tokens,output_tokens\n"
    for at_s, prompt, output in requests_of(arrived, prefill_weight):
        yield f"{at_s:.4f},{prompt},{output}\n"


def requests_of(arrived: Iterable[Arrived], prefill_weight: float) -> Iterator[tuple[float, int, int]]:
    """Yield (seconds since the first one's, prompt tokens, answer tokens) of each request that arrived.

    Of a second only sums are known, so its requests lie evenly in it and are all alike.
    """
    begin: int | None = None
    owed = 0.0  # parts of requests: where reports are rare, counts are not whole
    for a in arrived:
        begin = a.second if begin is None else begin
        owed += a.requests
        count = int(owed + 1e-9)
        owed -= count
        if not count or a.requests <= 0.0:
            continue
        prompt = a.prompt_tokens / a.requests
        output = a.work / a.requests - prompt * prefill_weight
        for n in range(count):
            yield a.second - begin + n / count, max(1, round(prompt)), max(1, round(output))


def flags_of(now: FleetNow, asked: WhatIfBody | None) -> list[str]:
    """Return the flags of a run for the fleet as it is now, with what is asked instead of it."""
    asked = asked or WhatIfBody()
    said = {
        "--profile": now.profile,
        "--max-instances": str(asked.max_instances or now.max_instances),
        "--max-usd-h": f"{asked.max_dollars_per_hour or now.max_usd_h:g}",
        "--seed": str(SEED),
        **({"--gpu": asked.gpu} if asked.gpu is not None else {}),
    }
    flags = [f"{name}={value}" for name, value in said.items()]
    if not now.late_lane:
        flags.append("--no-late-lane")
    return [*flags, *_policy_flags(now.policy, asked)]


def _policy_flags(policy: Policy, asked: WhatIfBody) -> list[str]:
    if asked.goal is not None:
        return [f"--goal={asked.goal:.6g}"]
    if asked.policy is not None:
        params: Mapping[str, Any] = asked.params or {}
        return [f"--policy={asked.policy}", *(f"--policy-param={k}={v}" for k, v in params.items())]
    if isinstance(policy, Objective):
        return [f"--goal={policy.goal:.6g}"]  # its level is found in the run, as it is here
    name = next(name for name, kind in POLICIES.items() if kind is type(policy))
    own = {f.name: getattr(policy, f.name) for f in fields(policy)}  # type: ignore[arg-type]
    usual = {f.name: f.default for f in fields(policy) if f.default is not MISSING}  # type: ignore[arg-type]
    said = {k: v for k, v in own.items() if v is not None and v != usual.get(k, MISSING)}
    return [f"--policy={name}", *(f"--policy-param={k}={v}" for k, v in said.items())]


def summary_of(raw: bytes) -> dict[str, Any]:
    """Return the figures of a run's report that are shown side by side; raise ValueError for no report."""
    try:
        said = json.loads(raw)
        days = max(float(said["duration_s"]), 1.0) / 86_400.0
        return {
            "met": said["objective"]["met_share"],
            "usd_day": said["cost_usd"]["total"] / days,
            "requests": said["requests"]["sent"],
            "failed": said["requests"]["failed"],
            "ttft_s": {name: said["latency_s"]["ttft"][name] for name in SHOWN},
            "e2e_s": {name: said["latency_s"]["e2e"][name] for name in SHOWN},
            "most_hot": said["scaling"]["most_hot"],
            "utilisation": said["cost"]["utilisation"],
            "starts": said["scaling"]["starts"],
            "hours": days * 24.0,
        }
    except (ValueError, LookupError, TypeError) as e:
        raise ValueError(f"no report: {type(e).__name__}: {e}") from None
