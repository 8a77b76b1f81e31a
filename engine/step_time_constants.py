"""Step-time constants: how long a step of a model server takes, for each model on each GPU, with sources.

decode     step_ms    = a + b*batch + c*context/1000
prefill    prefill_ms = d + e*P/1000 + f*(P/1000)²       a part from s to t: f*(t² - s²)/1000²
both       max(a, d) + the other terms: the weights are read once for all of the step
at least   e*tokens/1000, because every token of a step passes through the same multiplications
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Timing:
    """The step-time constants of one model, in one quantization, on a number of GPUs of one kind.

    a to f: milliseconds, as in the module's formulas. kv_tokens: KV memory. max_seqs, step_tokens: vLLM's
    limits on requests at once and on tokens in a step.
    """

    name: str
    a: float
    b: float
    c: float
    d: float
    e: float
    f: float
    kv_tokens: int
    max_seqs: int = 256
    step_tokens: int = 2048

    def step_ms(self, batch: int, context_tokens: int, prompt_tokens: int = 0, squares: int = 0) -> float:
        """Return the milliseconds of a step in which `batch` requests make a token and prompts are read.

        context_tokens: KV tokens of that batch. prompt_tokens: how many are read. squares: sum of t² - s²
        over the parts of prompts read, from position s to t, in tokens².
        """
        floor = max(self.a if batch else 0.0, self.d if prompt_tokens else 0.0)
        linear = (
            floor
            + self.b * batch
            + self.c * context_tokens / 1e3
            + self.e * prompt_tokens / 1e3
            + self.f * squares / 1e6
        )
        return max(linear, self.bound_ms(batch + prompt_tokens))

    def prefill_ms(self, prompt_tokens: int) -> float:
        """Return the milliseconds to read a prompt alone, in one step."""
        return self.step_ms(0, 0, prompt_tokens, prompt_tokens * prompt_tokens)

    def bound_ms(self, tokens: int) -> float:
        """Return the least milliseconds that computing this many tokens in one step takes."""
        return self.e * tokens / 1e3


PREFILL_OPTIMISM: Mapping[str, float] = MappingProxyType({"A100 SXM4": 1.2, "L40S": 1.2, "H100 SXM": 1.35})
"""Factors by which reading a prompt token (constant e) is slower in a server than in kernels that are
measured alone (docs/reference/timing.md 3a: judged, not fitted). The other cards' e are computed and need
no such factor."""

LARGE_STEPS = frozenset({"H100 SXM"})
"""GPUs for which vLLM 0.11 takes 1,024 requests and 8,192 tokens a step: of 70 GiB, without the A100; for the
others 256 and 2,048 (EngineArgs defaults for its API server, looked up 2026-11)."""

# (model, quantization, GPU as Vast names it, number of GPUs): a, b, c, d, e, f, KV tokens.
# A100, H100, L40S: docs/reference/timing.md 3a, composed from measured vLLM kernels, 2 to 7 % mean error of
# the linear form.
# RTX cards: docs/reference/timing.md 3c, bandwidth arithmetic without an error bar.
_ROWS: Mapping[tuple[str, str, str, int], tuple[float, float, float, float, float, float, int]] = {
    ("13B", "awq4", "RTX 3090", 1): (11.52, 0.072, 1.094, 9.9, 402.1, 12.0, 15_500),
    ("13B", "awq4", "RTX 4090", 1): (9.99, 0.067, 1.016, 9.0, 188.6, 5.65, 15_500),
    ("13B", "awq4", "RTX A6000", 1): (13.70, 0.088, 1.333, 11.2, 237.8, 7.12, 41_900),
    ("13B", "awq4", "L40S", 1): (11.72, 0.092, 1.159, 9.4, 103.3, 3.27, 41_300),
    ("13B", "awq4", "A100 SXM4", 1): (7.90, 0.114, 0.506, 12.6, 96.9, 2.27, 76_400),
    ("13B", "awq4", "H100 SXM", 1): (4.59, 0.064, 0.262, 5.6, 31.2, 1.79, 76_400),
    ("70B", "awq4", "RTX 3090", 4): (19.95, 0.489, 0.109, 15.0, 925.8, 9.64, 131_000),
    ("70B", "awq4", "RTX 4090", 2): (29.64, 0.439, 0.203, 20.8, 761.7, 9.04, 8_800),
    ("70B", "awq4", "RTX A6000", 1): (66.83, 0.465, 0.533, 43.1, 1259.6, 22.8, 13_300),
    ("70B", "awq4", "RTX A6000", 2): (39.01, 0.495, 0.267, 26.4, 892.0, 11.4, 141_000),
    ("70B", "awq4", "L40S", 1): (54.82, 0.360, 0.427, 42.3, 527.9, 12.1, 11_800),
    ("70B", "awq4", "A100 SXM4", 1): (33.94, 0.524, 0.200, 29.6, 514.6, 4.43, 99_700),
    ("70B", "awq4", "A100 SXM4", 2): (21.36, 0.289, 0.101, 26.5, 267.3, 2.00, 313_000),
    ("70B", "awq4", "H100 SXM", 1): (20.50, 0.201, 0.106, 14.1, 177.9, 4.74, 99_700),
}


def _timing(key: tuple[str, str, str, int]) -> Timing:
    model, quant, gpu, tp = key
    a, b, c, d, e, f, kv_tokens = _ROWS[key]
    limits = (1024, 8192) if gpu in LARGE_STEPS else (256, 2048)
    name = f"{model} {quant} on {tp}x {gpu}"
    return Timing(name, a, b, c, d, e * PREFILL_OPTIMISM.get(gpu, 1.0), f, kv_tokens, *limits)


TIMINGS: Mapping[tuple[str, str, str, int], Timing] = MappingProxyType({key: _timing(key) for key in _ROWS})

LIKE_BATCH, LIKE_CONTEXT = 32, 1000
"""Requests at once, and tokens of context of each, that `like` assumes."""


Key = tuple[str, str, str, int]
"""Model, quantization, GPU as Vast names it, and number of GPUs."""


def row_for(key: Key, own: Mapping[Key, Timing] = MappingProxyType({})) -> Timing | None:
    """Return the step-time constants of that model on exactly these GPUs, if there is a row of them.

    own: constants that go before the table's, and add to it.
    """
    return own.get(key) or TIMINGS.get(key)


def slowest(model: str, quantization: str) -> Timing:
    """Return the slowest row of a model: for GPUs of which nothing is known."""
    rows = (timing for key, timing in TIMINGS.items() if key[:2] == (model, quantization))
    return max(rows, key=lambda timing: timing.a)


def like(work_s: float) -> Timing:
    """Return step-time constants for a server of which only the throughput is known, in work per second.

    They are an A100's, scaled so that LIKE_BATCH requests of LIKE_CONTEXT tokens each make that many tokens a
    second.
    """
    usual = TIMINGS[("13B", "awq4", "A100 SXM4", 1)]
    ratio = LIKE_BATCH * 1e3 / usual.step_ms(LIKE_BATCH, LIKE_BATCH * LIKE_CONTEXT) / work_s
    a, b, c, d, e, f = (ratio * x for x in (usual.a, usual.b, usual.c, usual.d, usual.e, usual.f))
    return Timing(f"like one of {work_s:g} work/s", a, b, c, d, e, f, usual.kv_tokens)
