"""Makes the entry of a profile from what a model's own files say."""

import math
import re

from engine.estimate import BESIDE_GB, MEMORY_SHARE, ModelShape, Weights
from engine.model_config import ModelFacts
from engine.profile_entry import NAME, ImageEntry, ProfileEntry, gpu_total_gb
from process.errors import ConfigError

IMAGE = ImageEntry(name="vllm/vllm-openai:v0.11.0", cuda="12.8")
"""What a new profile runs: the image of the built-in ones, with the CUDA version that is in it."""

USUAL_GPU_GB, MOST_GPUS = 48.0, 8
"""Memory of a GPU, for which an instance gets as many as it needs, and the most of one machine."""

DISK_BESIDE_GB, DISK_FACTOR = 32.0, 1.1
"""GB of disk beside the weights (the image, unpacked), and what the weights take there."""

NEEDS_MXFP4 = "gpu_ram>=79 compute_cap>=800 compute_cap<=1000"
"""MXFP4 in vLLM 0.11 runs on H100, H200, B200 and A100; for Ada and the RTX 50 it was being worked on
(vLLM's recipe of gpt-oss)."""

PARSERS: tuple[tuple[str, str, str, str], ...] = (
    ("qwen3", "coder", "qwen3_coder", ""),
    ("qwen3", "instruct", "hermes", ""),
    ("qwen3", "", "hermes", "qwen3"),
    ("qwen2", "", "hermes", ""),
    ("gpt_oss", "", "openai", "openai_gptoss"),
    ("llama4", "", "llama4_pythonic", ""),
    ("llama", "hermes", "hermes", ""),
    ("llama", "", "llama3_json", ""),
    ("mistral", "", "mistral", ""),
    ("mixtral", "", "mistral", ""),
    ("gemma3", "", "pythonic", ""),
    ("deepseek_v3", "r1", "deepseek_v3", "deepseek_r1"),
    ("deepseek_v3", "", "deepseek_v3", ""),
    ("glm4_moe", "", "glm45", "glm45"),
    ("granite", "", "granite", ""),
)
"""Beginning of model_type, word in the repository's name, and vLLM's parsers of tool calls and of thoughts;
the first that fits. The names are those of vLLM 0.11.0 (its documentation, Tool Calling and Reasoning
Outputs)."""


def make_entry(
    repository: str, facts: ModelFacts, revision: str = "", source: tuple[str, ...] = ()
) -> ProfileEntry:
    """Return the entry of a profile; raise ConfigError where no machine can hold the model.

    source: where its numbers were read.
    """
    shape = facts.shape
    total = gpu_total_gb(shape, facts.context, 1)
    tool, thoughts = ("", "") if facts.pooling else parsers_of(facts.kind, repository)
    return ProfileEntry(
        model=repository,
        image=IMAGE,
        context=facts.context,
        gpus=_gpus(repository, shape, facts.context),
        gpu_total_gb=float(total),
        disk_gb=float(math.ceil(shape.weights_gb * DISK_FACTOR + DISK_BESIDE_GB)),
        weights=shape.weights,
        weights_gb=_rounded(shape.weights_gb),
        params_b=_rounded(shape.params_b),
        active_b=_rounded(shape.active_b),
        layers=shape.layers,
        hidden=shape.hidden,
        kv_bytes_token=float(round(shape.kv_bytes)),
        experts=shape.experts,
        experts_used=shape.experts_used,
        revision=revision,
        tool_parser=tool,
        reasoning_parser=thoughts,
        pooling=facts.pooling,
        args=_arguments(facts, repository),
        needs=_needs(facts),
        source=list(source),
    )


def parsers_of(kind: str, repository: str) -> tuple[str, str]:
    """Return vLLM's parsers of tool calls and of thoughts for a model; empty where none is known."""
    name = repository.rpartition("/")[2].lower()
    for beginning, word, tool, thoughts in PARSERS:
        if kind.startswith(beginning) and word in name:
            return tool, thoughts
    return "", ""


def profile_name(repository: str) -> str:
    """Return a name for a profile of that repository: its last part, in what names may have."""
    name = re.sub(r"[^a-z0-9._-]+", "-", repository.rpartition("/")[2].lower()).strip("._-")[:63]
    if not NAME.fullmatch(name):
        raise ConfigError(f"{repository}: no profile can be named after it: give --name")
    return name


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _gpus(repository: str, shape: ModelShape, context: int) -> int:
    """Return the most GPUs that an instance may have: a power of two, so that cards of 48 GB will do."""
    count = 1
    kv_gb = shape.kv_bytes * context / 1e9
    while (MEMORY_SHARE * USUAL_GPU_GB - BESIDE_GB) * count < shape.weights_gb + kv_gb and count < MOST_GPUS:
        count *= 2
    largest_gb = 180.0  # B200
    if (MEMORY_SHARE * largest_gb - BESIDE_GB) * count < shape.weights_gb + kv_gb:
        raise ConfigError(
            f"{repository}: {shape.weights_gb:.0f} GB of weights and {kv_gb:.0f} GB for one request of "
            f"{context} tokens fit on no machine of {MOST_GPUS} GPUs: try --context or --quantization"
        )
    return count


def _needs(facts: ModelFacts) -> str:
    if facts.quantization == "mxfp4":
        return NEEDS_MXFP4
    return "compute_cap>=890" if facts.shape.weights is Weights.W8 else "compute_cap>=800"


def _arguments(facts: ModelFacts, repository: str) -> str:
    words = []
    if facts.loads_quantized:
        words.append(f"--quantization {facts.quantization}")
    if facts.kind.startswith("mistral") and repository.startswith("mistralai/"):
        words.append("--tokenizer-mode mistral --config-format mistral --load-format mistral")
    return " ".join(words)
