"""Step-time constants by arithmetic, for a model on GPUs for which none were measured or composed.

    a   weights read in a step / share of the memory bandwidth, and 2 all-reduces a layer
    b   what one more request costs beside its context: arithmetic, and the all-reduces of one token
    c   KV bytes of 1,000 tokens / share of the bandwidth
    d   reading the weights, nearly as a
    e   flops of 1,000 prompt tokens / share of the flops, and the all-reduces of 1,000 tokens
    f   flops of attention over 1,000 tokens, which grow with their square

Decode is bound by bandwidth, prefill by flops. The shares are fitted to the rows of
engine/step_time_constants.py and reproduce each of them within 25 % (tests/unit/engine/test_estimate.py),
decode, prefill and the throughput of a full queue. What an instance shows of itself replaces all of it.
"""

from dataclasses import dataclass
from enum import StrEnum

from engine.gpus import Family, GpuModel
from engine.step_time_constants import Timing

DECODE_SHARE = {Family.GEFORCE: 0.78, Family.PRO: 0.78, Family.HBM: 0.72}
"""Share of the bandwidth at which 16-bit weights are read: L40S 0.77 to 0.79, A6000 0.79, A100 0.67 to 0.71,
H100 0.72 to 0.74 (docs/reference/timing.md 3a and 3c: fp16 rows)."""

SHARE_4_BIT = {Family.GEFORCE: 0.93, Family.PRO: 0.93, Family.HBM: 0.69}
"""The same for 4-bit weights, as a part of it: their kernels do not keep fast memory busy (awq4 rows)."""

SHARE_8_BIT = {Family.GEFORCE: 0.96, Family.PRO: 0.96, Family.HBM: 0.85}
"""The same for 8-bit weights: halfway, an assumption without a row."""

KV_SHARE = 0.80
"""Share of the bandwidth at which KV memory is read: 0.79 to 0.82, H100 0.92."""

PREFILL_SHARE = {Family.GEFORCE: 0.87, Family.PRO: 0.65, Family.HBM: 0.66}
"""Share of the 16-bit flops with which prompts are read in a server: RTX 3090 0.91, 4090 0.84; A6000 0.71,
L40S 0.60; A100 0.72, H100 0.61."""

ATTENTION_SHARE = 0.45
"""The same in attention, where it is the part f."""

PREFILL_FLOOR = 0.9
"""Constant d over a: the weights are read as fast, without the all-reduces of small messages."""

REQUEST_BYTES_PER_PARAMETER = 5.1e-3
"""Memory traffic of one more request, in bytes a parameter (docs/reference/timing.md 3c)."""

REQUEST_FLOPS_SHARE = 0.87
"""Share of the flops with which one more request is computed where that, and not bandwidth, is what costs."""

REQUEST_MS = 0.027
"""What one more request costs beside that on GPUs with stacked memory, ms."""

ALL_REDUCE_MS = 0.028
"""One all-reduce of a small message between GPUs, ms: 0.026 to 0.035 in the rows of more than one GPU."""

LINK_GB_S = {False: 10.0, True: 200.0}
"""What goes between GPUs of one machine, GB/s, without and with NVLink (docs/reference/timing.md 3c for the
first)."""

MEMORY_SHARE = 0.9
"""Share of the GPU memory that vLLM takes: its --gpu-memory-utilization."""

BESIDE_GB = 2.0
"""GB of each GPU for activations and CUDA graphs (docs/reference/timing.md 3)."""

USUAL_BATCH = 32
"""Requests at once for which the experts that a step reads are counted: a mixture of experts reads few of
them for one request and nearly all for many, and its step time is a line here."""

LARGE_STEP_GB = 70.0
"""Memory of a GPU from which vLLM takes 1,024 requests and 8,192 tokens a step, the A100 excepted (EngineArgs
defaults of 0.11 for its API server): `A100_TFLOPS` tells that one."""

A100_TFLOPS = 312.0


class Weights(StrEnum):
    """In which form the weights are: as vLLM loads them."""

    W16 = "bf16"
    W8 = "fp8"
    W4 = "4-bit"


@dataclass(frozen=True)
class ModelShape:
    """What the arithmetic needs of a model. Parameters in billions.

    active_b: those that one token passes through; all of them in a dense model. weights_gb: as they are in
    GPU memory. kv_bytes: KV memory of one token, on average over the longest context. experts, experts_used:
    how many a layer has, and how many of them a token uses; 0 without.
    """

    params_b: float
    active_b: float
    weights_gb: float
    weights: Weights
    layers: int
    hidden: int
    kv_bytes: float
    experts: int = 0
    experts_used: int = 0

    @property
    def read_gb(self) -> float:
        """GB of weights that a step of USUAL_BATCH requests reads."""
        if not self.experts:
            return self.weights_gb
        used = self.experts_used / self.experts
        all_used = 1.0 - (1.0 - used) ** USUAL_BATCH
        # active = shared + used * experts, so what is in experts follows from it.
        in_experts = min(1.0, (1.0 - self.active_b / self.params_b) / (1.0 - used))
        return self.weights_gb * (1.0 - in_experts * (1.0 - all_used))


def kv_tokens(shape: ModelShape, gpu: GpuModel, count: int) -> int:
    """Return for how many tokens there is KV memory; 0 or less where the model does not fit."""
    free_gb = (MEMORY_SHARE * gpu.mem_gb - BESIDE_GB) * count - shape.weights_gb
    return int(free_gb * 1e9 / shape.kv_bytes)


def estimate(name: str, shape: ModelShape, gpu: GpuModel, count: int, least_kv_tokens: int) -> Timing:
    """Return the step-time constants of a model on that many GPUs of a kind.

    least_kv_tokens: what KV memory it is taken to have where the model does not fit, and so would not start.
    """
    bandwidth, tflops = gpu.gb_s * count, gpu.tflops * count
    token_gflop = 2.0 * shape.active_b
    read_ms = shape.read_gb / (bandwidth * _decode_share(shape.weights, gpu.family)) * 1e3
    reduce_ms, reduce_token_ms = _all_reduce(shape, gpu, count)
    e = token_gflop / tflops / PREFILL_SHARE[gpu.family] * 1e3 + reduce_token_ms * 1e3
    attention_tflop = 2.0 * shape.layers * shape.hidden / 1e6
    large = gpu.mem_gb >= LARGE_STEP_GB and gpu.tflops != A100_TFLOPS
    return Timing(
        name=name,
        a=read_ms + reduce_ms,
        b=_request_ms(shape, gpu, count) + reduce_token_ms,
        c=shape.kv_bytes / 1e6 / (bandwidth * KV_SHARE) * 1e3,
        d=PREFILL_FLOOR * read_ms + reduce_ms,
        e=e,
        f=attention_tflop / tflops / ATTENTION_SHARE * 1e3,
        kv_tokens=max(kv_tokens(shape, gpu, count), least_kv_tokens),
        max_seqs=1024 if large else 256,
        step_tokens=8192 if large else 2048,
    )


def _decode_share(weights: Weights, family: Family) -> float:
    part = {Weights.W16: 1.0, Weights.W8: SHARE_8_BIT[family], Weights.W4: SHARE_4_BIT[family]}
    return DECODE_SHARE[family] * part[weights]


def _request_ms(shape: ModelShape, gpu: GpuModel, count: int) -> float:
    if gpu.family is Family.HBM:
        return 2.0 * shape.active_b / (gpu.tflops * count) / REQUEST_FLOPS_SHARE + REQUEST_MS
    return REQUEST_BYTES_PER_PARAMETER * shape.active_b / (gpu.gb_s * count) * 1e3


def _all_reduce(shape: ModelShape, gpu: GpuModel, count: int) -> tuple[float, float]:
    """Return (ms of the all-reduces of a step, ms that each token adds to them)."""
    if count == 1:
        return 0.0, 0.0
    sent = 2.0 * (count - 1) / count
    token_gb = 2 * shape.layers * shape.hidden * 2 / 1e9
    return 2 * shape.layers * ALL_REDUCE_MS, sent * token_gb / LINK_GB_S[gpu.nvlink] * 1e3


MEMORY_BOUND_SHARE = 0.84
"""Part of its throughput that a server keeps whose memory is full: requests come in waves, and some are
preempted (0.78 to 0.86 for 13B and 70B in engine/reference.py)."""


def full_queue_work_s(
    timing: Timing, prefill_weight: float, prompt_tokens: int = 300, output_tokens: int = 180
) -> float:
    """Return the work per second of a server with a full queue of requests of these lengths.

    In a step each request that is running makes a token, and as many prompts are read as answers end.
    """
    held = prompt_tokens + output_tokens / 2.0
    batch = max(1.0, min(timing.max_seqs, timing.kv_tokens / held))
    kept = MEMORY_BOUND_SHARE if batch < timing.max_seqs else 1.0
    read = batch / output_tokens * prompt_tokens
    step_ms = step_of(timing, batch, prompt_tokens, output_tokens)
    return kept * (batch + read * prefill_weight) / step_ms * 1e3


def step_of(timing: Timing, batch: float, prompt_tokens: float, output_tokens: float) -> float:
    """Return the milliseconds of a step with so many requests of these lengths, in the mean.

    As many prompts are read in it as answers end.
    """
    held, read = prompt_tokens + output_tokens / 2.0, batch / output_tokens * prompt_tokens
    floor = max(timing.a, timing.d)
    linear = floor + timing.b * batch + timing.c * batch * held / 1e3 + timing.e * read / 1e3
    return max(linear, timing.e * (batch + read) / 1e3)
