"""The paced engine's page /metrics in the Prometheus text format, with vLLM's names.

Written by hand: seven figures are no reason to load a library in a process that must stay small.
"""

from collections.abc import Mapping

from engine.reference import SteppedModelServer


def metrics(name: str, server: SteppedModelServer, ended: Mapping[str, int]) -> bytes:
    """Return the page /metrics. name: of the model; ended: number of requests by finish reason."""
    label = f'engine="0",model_name="{_label(name)}"'
    lines = []

    def add(metric: str, kind: str, says: str, values: Mapping[str, float]) -> None:
        lines.append(f"# HELP vllm:{metric} {says}\n# TYPE vllm:{metric} {kind}\n")
        lines.extend(f"vllm:{metric}{{{labels}}} {float(value)!r}\n" for labels, value in values.items())

    add("num_requests_running", "gauge", "Requests being worked on.", {label: server.running})
    add("num_requests_waiting", "gauge", "Requests in the queue.", {label: server.waiting})
    add("kv_cache_usage_perc", "gauge", "KV memory in use, 1 is all.", {label: server.kv_use})
    add("num_preemptions_total", "counter", "Requests that were put back.", {label: server.preemptions})
    add("prompt_tokens_total", "counter", "Prompt tokens read.", {label: server.prompt_tokens_total})
    add("generation_tokens_total", "counter", "Tokens made.", {label: server.generation_tokens_total})
    add(
        "request_success_total",
        "counter",
        "Requests that ended, by reason.",
        {f'{label},finished_reason="{why}"': ended.get(why, 0) for why in ("stop", "length", "abort")},
    )
    return "".join(lines).encode(errors="replace")


def _label(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
