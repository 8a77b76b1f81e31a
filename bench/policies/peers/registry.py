"""All rules of others as data: where each is from, its published defaults, its knob from bold to careful.

    for peer in PEERS.values():
        for label, make in peer.defaults() + peer.sweep(capacity):
            for actuator, carried_out in runs(peer, make):   # "own", or "as is" and "with pool"
                policy = carried_out()                       # a fresh one for each run: they remember

`peer.at(value)` makes a policy for any value of the knob, also between two of the sweep.

Limits on the number of replicas that a vendor ships (3, 5, 8, 16 ...) are sizes of a plan and not part of a
rule: each set of defaults comes as published and, where the limit is finite, once more without; the sweeps
have none. Knobs that count requests are swept in shares of what one instance does, so the sweep fits any
model and mix. Two rules come a second time, patient: with the setting an operator changes first when
machines start slowly, because their published one lets go of them within seconds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from bench.policies.peers import vast
from bench.policies.peers.actuators import KEEP_S, AsIs, WithPool
from bench.policies.peers.delayed_off import DelayedOff
from bench.policies.peers.dynamo import DynamoPredictive, DynamoStatic
from bench.policies.peers.hpa import HpaInFlight, HpaWaiting
from bench.policies.peers.knative import KnativeKpa
from bench.policies.peers.ray_serve import RayServe
from bench.policies.peers.rule import NO_CAP, PeerPolicy
from bench.policies.peers.runpod import RunPodQueueDelay, RunPodRequestCount
from bench.policies.peers.sageserve import SageServe
from bench.policies.peers.skyserve import SkyServe
from bench.policies.peers.vast import VastServerless
from bench.policies.peers.wva import WvaTokens
from policies import Capacity, Fixed

Factory = Callable[[], PeerPolicy]
"""Makes a fresh policy: one run, one memory."""

SHARES = (1.2, 1.0, 0.85, 0.7, 0.58, 0.47, 0.37, 0.28, 0.2, 0.13, 0.075, 0.035)
"""Of what an instance can do, from none to spare to nearly thirty times too much."""

FIXED_NUMBERS = (*range(1, 11), 12, 14, 16, 18, 20, 23, 26, 30, 34, 38, 43, 50, 60, 70, 85, 100, 130, 170)
"""Fleets from one to 170: at about 3 and at about 30 needed, over five times the need is among them."""

IDLE_S = (5, 30, 60, 180, 600, 1800, 3600, 10_800, 43_200, 172_800)
"""How long an idle one is kept: from RunPod's default to two days, which is never down in most traces."""

PATIENT_S = 900.0
"""Knative's scale-down delay (up to an hour is allowed) and RunPod's idle timeout in the patient versions."""


@dataclass(frozen=True)
class Peer:
    """One rule.

    knob: its name, its unit, and which way is safe. at: a policy for a value of it, without a vendor's limit.
    values: of the knob, from bold to careful, for instances of that capacity. defaults: (label, factory)
    pairs, the published one first. whole: the knob is a whole number.
    """

    name: str
    title: str
    source: str
    knob: str
    knows_pool: bool
    at: Callable[[float], PeerPolicy]
    values: Callable[[Capacity], Sequence[float]]
    defaults: Callable[[], list[tuple[str, Factory]]]
    whole: bool = False

    def sweep(self, capacity: Capacity) -> list[tuple[float, Factory]]:
        """Return (value, factory) pairs from bold to careful."""
        return [(value, partial(self.at, value)) for value in self.values(capacity)]


class FixedFleet(Fixed):
    """`policies.Fixed` with a loop interval."""

    tick_s: ClassVar[float] = 60.0

    def scaled(self, speedup: float) -> "FixedFleet":  # noqa: ARG002 - it has no times
        """Return itself: it has no times."""
        return self


def runs(peer: Peer, make: Factory, keep_s: float = KEEP_S) -> list[tuple[str, Factory]]:
    """Return the policy by each actuator it is compared with: one that knows a pool has its own only."""
    if peer.knows_pool:
        return [("own", make)]
    return [("as is", lambda: AsIs(make())), ("with pool", lambda: WithPool(make(), keep_s))]


def shares(_: Capacity) -> Sequence[float]:
    """Return the values of a knob that is a share itself."""
    return SHARES


def of_requests_at_once(capacity: Capacity) -> Sequence[float]:
    """Return the values of a knob that counts requests at once."""
    return [share * capacity.concurrency for share in SHARES]


def of_requests_s(capacity: Capacity) -> Sequence[float]:
    """Return the values of a knob that counts requests per second."""
    return [share * capacity.requests_s for share in SHARES]


def always(values: Sequence[float]) -> Callable[[Capacity], Sequence[float]]:
    """Return these values, whatever the capacity."""
    return lambda _: values


# -- one policy for one value of the knob ---------------------------------------------------------------


def _fixed(number: float) -> FixedFleet:
    return FixedFleet(round(number), round(number))


def _vast_guide(target_util: float) -> VastServerless:
    return VastServerless(target_util=target_util, cold_mult=3.0, min_load=1.0, max_workers=NO_CAP)


def _vast_cli(target_util: float) -> VastServerless:
    return VastServerless(target_util=target_util, cold_mult=2.5, min_load=0.0, max_workers=NO_CAP)


def _sky(target: float) -> SkyServe:
    return SkyServe(target_qps_per_replica=target)


def _ray(target: float) -> RayServe:
    return RayServe(target_ongoing_requests=target, max_replicas=NO_CAP)


def _knative(target: float) -> KnativeKpa:
    return KnativeKpa(container_concurrency=target / 0.7)


def _knative_patient(target: float) -> KnativeKpa:
    return KnativeKpa(container_concurrency=target / 0.7, scale_down_delay_s=PATIENT_S)


def _hpa(target: float) -> HpaInFlight:
    return HpaInFlight(target=target)


def _waiting(threshold: float) -> HpaWaiting:
    return HpaWaiting(threshold=threshold, max_replicas=NO_CAP)


def _count(scaler_value: float) -> RunPodRequestCount:
    return RunPodRequestCount(scaler_value=scaler_value, max_replicas=NO_CAP)


def _count_patient(scaler_value: float) -> RunPodRequestCount:
    return RunPodRequestCount(scaler_value=scaler_value, idle_timeout_s=PATIENT_S, max_replicas=NO_CAP)


def _queue_delay(idle_timeout_s: float) -> RunPodQueueDelay:
    return RunPodQueueDelay(scaler_value_s=1.0, idle_timeout_s=idle_timeout_s, max_replicas=NO_CAP)


def _static(scale_up: float) -> DynamoStatic:
    return DynamoStatic(scale_up=scale_up, scale_down=0.6 * scale_up, max_replicas=NO_CAP)


def _wva(scale_up: float) -> WvaTokens:
    return WvaTokens(scale_up=scale_up, scale_down=scale_up * 0.70 / 0.85)


def _sage(margin: float) -> SageServe:
    use_up = min(0.5, 0.5 * 1.1 / margin)
    return SageServe(margin=margin, use_up=use_up, use_down=use_up / 2.0)


def _delayed_off(t_wait_s: float) -> DelayedOff:
    return DelayedOff(t_wait_s=t_wait_s)


# -- the table ------------------------------------------------------------------------------------------


def _vast_set(fields: Mapping[str, float], label: str) -> list[tuple[str, Factory]]:
    published = partial(VastServerless, **fields)  # type: ignore[arg-type]
    return [(label, published), (label + ", no cap", partial(published, max_workers=NO_CAP))]


def _predictive(predictor: str) -> Peer:
    make = partial(DynamoPredictive, predictor=predictor)
    free = partial(make, max_replicas=NO_CAP)
    default = "published (target sla)" if predictor == "arima" else f"load_predictor {predictor}"
    return Peer(
        f"dynamo-{predictor}",
        f"NVIDIA Dynamo, predictive ({predictor})",
        "ai-dynamo 1.6.1, planner core/throughput_scaling.py and load/predictors.py",
        "sla_share, part of an engine's rate reckoned with (lower is safer)",
        False,
        lambda share: free(sla_share=share),
        shares,
        lambda: [(default, make), (default + ", no cap", free)],
    )


_ALL = (
    Peer(
        "fixed",
        "fixed fleet",
        "no rule: so many hot, always",
        "instances (more is safer)",
        True,
        _fixed,
        always(FIXED_NUMBERS),
        lambda: [("one", partial(_fixed, 1))],
        whole=True,
    ),
    Peer(
        "vast",
        "Vast.ai Serverless, documented targets, the guide's defaults",
        "vast-ai/docs guides/serverless 2026-08-07; the engine is closed",
        "target_util (lower is safer)",
        True,
        _vast_guide,
        shares,
        lambda: _vast_set(vast.GUIDE, "guide"),
    ),
    Peer(
        "vast-cli",
        "Vast.ai Serverless, documented targets, the defaults of CLI and API",
        "vast-ai CLI, SDK and API reference 2026-08-07; the engine is closed",
        "target_util (lower is safer)",
        True,
        _vast_cli,
        shares,
        lambda: _vast_set(vast.CLI, "CLI") + _vast_set(vast.API, "API"),
    ),
    Peer(
        "skyserve",
        "SkyPilot SkyServe, request rate",
        "skypilot 0.14.1, sky/serve/autoscalers.py",
        "target_qps_per_replica, requests/s (lower is safer)",
        False,
        _sky,
        of_requests_s,
        lambda: [("published, target what one serves", SkyServe)],
    ),
    Peer(
        "ray-serve",
        "Ray Serve, ongoing requests",
        "ray 2.60.0, serve/autoscaling_policy.py",
        "target_ongoing_requests, requests a replica (lower is safer)",
        False,
        _ray,
        of_requests_at_once,
        lambda: [
            ("published (auto)", RayServe),
            ("published (auto), no cap", partial(RayServe, max_replicas=NO_CAP)),
        ],
    ),
    Peer(
        "knative",
        "Knative KPA",
        "knative/serving 98e5ef9, pkg/autoscaler/scaling/autoscaler.go",
        "target, requests a pod, 70 % of its container concurrency (lower is safer)",
        False,
        _knative,
        of_requests_at_once,
        lambda: [("published", KnativeKpa)],
    ),
    Peer(
        "knative-patient",
        "Knative KPA, scale-down delay of 15 min",
        "knative/serving 98e5ef9, pkg/autoscaler/scaling/autoscaler.go",
        "target, requests a pod, 70 % of its container concurrency (lower is safer)",
        False,
        _knative_patient,
        of_requests_at_once,
        lambda: [("published, but patient", partial(KnativeKpa, scale_down_delay_s=PATIENT_S))],
    ),
    Peer(
        "hpa",
        "Kubernetes HPA or KEDA, requests in flight",
        "kubernetes pkg/controller/podautoscaler, autoscaling/v2 defaults",
        "target, requests a replica (lower is safer)",
        False,
        _hpa,
        of_requests_at_once,
        lambda: [("published, target 80 % of what one holds", HpaInFlight)],
    ),
    Peer(
        "hpa-waiting",
        "vLLM production-stack chart (KEDA), requests waiting",
        "production-stack a6c01db, helm/values.yaml; kubernetes HPA",
        "threshold, waiting requests a replica (lower is safer)",
        False,
        _waiting,
        always((50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05)),
        lambda: [("published", HpaWaiting), ("published, no cap", partial(HpaWaiting, max_replicas=NO_CAP))],
    ),
    Peer(
        "runpod-count",
        "RunPod, request count",
        "runpod/docs serverless 2026-08-20; closed",
        "scaler_value, requests a worker (lower is safer)",
        False,
        _count,
        of_requests_at_once,
        lambda: [
            ("published", RunPodRequestCount),
            ("published, no cap", partial(RunPodRequestCount, max_replicas=NO_CAP)),
        ],
    ),
    Peer(
        "runpod-count-patient",
        "RunPod, request count, idle timeout of 15 min",
        "runpod/docs serverless 2026-08-20; closed",
        "scaler_value, requests a worker (lower is safer)",
        False,
        _count_patient,
        of_requests_at_once,
        lambda: [("published, no cap, but patient", partial(_count_patient, 4.0))],
    ),
    Peer(
        "runpod-delay",
        "RunPod, queue delay",
        "runpod/docs serverless 2026-08-20; closed",
        "idle_timeout_s, seconds, with a queue delay of 1 s (higher is safer)",
        False,
        _queue_delay,
        always(IDLE_S),
        lambda: [
            ("published", RunPodQueueDelay),
            ("published, no cap", partial(RunPodQueueDelay, max_replicas=NO_CAP)),
            (
                "published, no cap, counts starting",
                partial(RunPodQueueDelay, counts_starting=True, max_replicas=NO_CAP),
            ),
        ],
    ),
    Peer(
        "dynamo-static",
        "NVIDIA Dynamo, static thresholds (its default)",
        "ai-dynamo 1.6.1, planner core/load_scaling.py",
        "scale-up threshold of KV use, scale-down at 0.6 of it (lower is safer)",
        False,
        _static,
        shares,
        lambda: [
            ("published (throughput)", DynamoStatic),
            ("published (throughput), no cap", partial(DynamoStatic, max_replicas=NO_CAP)),
            ("latency, no cap", partial(DynamoStatic, scale_up=0.4, scale_down=0.1, max_replicas=NO_CAP)),
        ],
    ),
    _predictive("arima"),
    _predictive("constant"),
    _predictive("kalman"),
    Peer(
        "wva",
        "llm-d WVA V2, tokens",
        "llm-d workload-variant-autoscaler, saturation_v2 (2026-02-19)",
        "scale-up threshold, scale-down at 0.70/0.85 of it (lower is safer)",
        False,
        _wva,
        shares,
        lambda: [("published", WvaTokens)],
    ),
    Peer(
        "sageserve",
        "SageServe LT-UA",
        "SageServe repository, arbiter.py and global_arbiter.py; SIGMETRICS 2026",
        "margin on the forecast, memory-use thresholds lowered with it (higher is safer)",
        True,
        _sage,
        always((0.8, 1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.2, 4.0, 5.5, 8.0, 12.0)),
        lambda: [("published", SageServe), ("LT-U", partial(SageServe, extra="util"))],
    ),
    Peer(
        "delayed-off",
        "DelayedOff",
        "Gandhi, Gupta, Harchol-Balter, Kozuch 2010",
        "t_wait_s, seconds (higher is safer)",
        False,
        _delayed_off,
        always((15, 30, 60, 120, 300, 600, 1200, 2400, 4800, 10_800, 43_200, 172_800)),
        lambda: [("set-up time", DelayedOff)],
    ),
)

PEERS: Mapping[str, Peer] = {peer.name: peer for peer in _ALL}
