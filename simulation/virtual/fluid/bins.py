"""A trace as the fluid model takes it: work, requests and latency limits, one bin a second."""

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from policies.types import BIN_S

Floats = NDArray[np.float64]

PREFILL_WEIGHT = 0.1
"""Work of a prompt token, in output tokens."""


@dataclass(frozen=True)
class Bins:
    """A trace in bins of one second; all series have one value per second and the same length.

    work: output-token equivalents that arrived. requests: how many. limit_s: mean over these of the delay
    before service that is still in time. prompt_tokens, output_tokens: their sums; where not given they
    follow from work and limit as the objective defines them (2 s + 1 ms a prompt token).
    """

    work: Floats
    requests: Floats
    limit_s: Floats
    prompt_tokens: Floats | None = None
    output_tokens: Floats | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for series that are negative, not finite, empty or of different lengths."""
        for name in ("work", "requests", "limit_s", "prompt_tokens", "output_tokens"):
            given = getattr(self, name)
            if given is None:
                continue
            values = np.ascontiguousarray(given, dtype=np.float64)
            if values.ndim != 1 or len(values) == 0:
                raise ValueError(f"{name}: wanted a list of numbers, one per second")
            if not np.all(np.isfinite(values)) or values.min() < 0.0:
                raise ValueError(f"{name}: wanted finite numbers, none negative")
            if len(values) != len(self.work):
                raise ValueError(f"{name}: {len(values)} values, but work has {len(self.work)}")
            object.__setattr__(self, name, values)

    def __len__(self) -> int:
        """Return the number of seconds of the trace."""
        return len(self.work)

    def between(self, start_s: int, end_s: int) -> "Bins":
        """Return the trace from start_s to end_s, as views of the same arrays."""
        part = slice(start_s, end_s)
        prompt, output = self.prompt_tokens, self.output_tokens
        return Bins(
            self.work[part],
            self.requests[part],
            self.limit_s[part],
            None if prompt is None else prompt[part],
            None if output is None else output[part],
        )

    @cached_property
    def arriving(self) -> Floats:
        """Return the work per second that arrived in each whole bin of BIN_S seconds, as policies see it."""
        width = int(BIN_S)
        whole = len(self.work) // width
        return cast("Floats", self.work[: whole * width].reshape(whole, width).mean(axis=1))

    @cached_property
    def patience(self) -> Floats:
        """Return for each second the shortest wait, in whole seconds, that makes its requests late."""
        return np.floor(self.limit_s) + 1.0

    @cached_property
    def per_work(self) -> Floats:
        """Return for each second how many requests a unit of its work is; 0 where no work arrived."""
        return np.divide(self.requests, self.work, out=np.zeros(len(self)), where=self.work > 0.0)

    @cached_property
    def sums(self) -> tuple[Floats, Floats]:
        """Return the requests and the work that arrived before each second, and in all at the end.

        Both arrays are one longer than the bins.
        """
        requests, work = (np.concatenate(([0.0], np.cumsum(v))) for v in (self.requests, self.work))
        return requests, work

    def tokens(self) -> tuple[Floats, Floats]:
        """Return prompt and output tokens of each second; if not given they follow from work and limit."""
        prompt, output = self.prompt_tokens, self.output_tokens
        if prompt is None:
            prompt = np.maximum(self.limit_s - 2.0, 0.0) * 1000.0 * self.requests
            prompt = np.minimum(prompt, self.work / PREFILL_WEIGHT)
        if output is None:
            output = np.maximum(self.work - PREFILL_WEIGHT * prompt, 0.0)
        return prompt, output


def bins_of(
    arrival_s: ArrayLike,
    prompt_tokens: ArrayLike,
    output_tokens: ArrayLike,
    *,
    seconds: int | None = None,
    first_token_s: float = 2.0,
    prompt_token_s: float = 0.001,
    reading_s: ArrayLike = 0.0,
) -> Bins:
    """Return requests as a trace in bins of one second; those from `seconds` on are left out.

    reading_s: how long an idle instance takes over the prompt of each, which the limit on the first token
    leaves less for waiting; 0 where it is not known.
    """
    at = np.floor(np.asarray(arrival_s, dtype=np.float64)).astype(np.int64)
    prompt = np.asarray(prompt_tokens, dtype=np.float64)
    output = np.asarray(output_tokens, dtype=np.float64)
    limit = np.maximum(0.0, first_token_s + prompt_token_s * prompt - np.asarray(reading_s, np.float64))
    length = seconds if seconds is not None else (int(at.max()) + 1 if len(at) else 1)
    kept = at < length
    at = at[kept]

    def total(values: Floats) -> Floats:
        return np.bincount(at, weights=values[kept], minlength=length).astype(np.float64)

    requests = np.bincount(at, minlength=length).astype(np.float64)
    mean_limit = total(limit) / np.maximum(requests, 1.0)
    work = total(PREFILL_WEIGHT * prompt + output)
    return Bins(work, requests, mean_limit, total(prompt), total(output))
