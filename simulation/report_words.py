"""The words of a report: what each figure is called, and how it is defined, in one line.

Names are those of `vllm bench serve` and AIPerf, so that figures can be held side by side.
"""

from collections.abc import Mapping

LATENCIES: Mapping[str, tuple[str, str]] = {
    "route": (
        "lease",
        "time spent on getting a lease, with all pauses; others have it in their TTFT",
    ),
    "ttft": ("TTFT", "time to first token, from the moment the request was due (others: was sent)"),
    "tpot": (
        "TPOT",
        "time per output token, (E2EL - TTFT) / (output tokens - 1); AIPerf's ITL",
    ),
    "itl": (
        "ITL",
        "inter-token latency, from event to event of a stream; virtual: the mean only",
    ),
    "e2e": ("E2EL", "end-to-end latency, from the moment the request was due to its end"),
}
"""Latencies by their key in the report: name and definition. All are of completed requests."""

THROUGHPUTS: Mapping[str, tuple[str, str]] = {
    "requests_s": ("request throughput", "completed requests / length of the run"),
    "output_tokens_s": ("output throughput", "output tokens of completed requests / length of the run"),
    "total_tokens_s": ("total throughput", "the same with prompt tokens"),
    "goodput_requests_s": ("goodput", "requests that kept the objective / length of the run"),
}
"""The same of throughputs."""

OTHERS: Mapping[str, tuple[str, str]] = {
    "std": ("std", "standard deviation of all values, not of a sample"),
    "offered": (
        "offered",
        "work that arrives / what one instance does: instances' worth, without what waits",
    ),
}

WORDS: Mapping[str, tuple[str, str]] = {**LATENCIES, **THROUGHPUTS, **OTHERS}
"""All of them."""
