"""One profile as it is written down in TOML, without what reads and checks such a file.

Nothing here needs more than the standard library: the paced engine has one process for each instance, and
its memory is counted (localcloud/paced).
"""

import math
import re
import tomllib
from dataclasses import dataclass, field, replace

from engine.estimate import BESIDE_GB, MEMORY_SHARE, ModelShape, Weights, full_queue_work_s
from engine.profile import SLOWEST_GPU, CudaImage, Profile

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
"""What a profile may be called: it is a word in flags, file names and messages."""

REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
"""What the hub calls a model: ORG/MODEL, or a name alone."""

WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
"""A revision, and the name of a parser of vLLM."""

IMAGE_GB = 15.0
"""GB of the image vllm/vllm-openai, as they come over the network (vast-ai.md: measured once)."""

BOOT_S, DOWNLOAD_S_PER_GB = 240.0, 16.0
"""Seconds from an order to hot without the download, and those for a GB of it at 500 Mbit/s."""

START_S, START_S_PER_GB = 60.0, 4.0
"""Seconds from a start to hot beside those for reading the weights from the disk, and for a GB of them."""

BIG_GB = 40.0
"""GB of download from which a fast network is asked for."""

_RANGES: tuple[tuple[str, float, float], ...] = (
    ("context", 1, 10**7),
    ("gpus", 1, 16),
    ("gpu_total_gb", 1.0, 10_000.0),
    ("disk_gb", 1.0, 10_000.0),
    ("weights_gb", 0.001, 10_000.0),
    ("params_b", 0.001, 10_000.0),
    ("active_b", 0.001, 10_000.0),
    ("layers", 1, 10_000),
    ("hidden", 1, 10**6),
    ("kv_bytes_token", 1.0, 1e9),
    ("experts", 0, 10_000),
    ("experts_used", 0, 10_000),
    ("prefill_weight", 0.001, 10.0),
    ("hold_s", 0.1, 600.0),
    ("expected_output_tokens", 1.0, 1e6),
    ("load_time_s", 1.0, 100_000.0),
    ("start_time_s", 1.0, 100_000.0),
)


@dataclass(frozen=True, kw_only=True)
class ImageEntry:
    """An image and the CUDA version in it: from the second follows which drivers will do."""

    name: str
    cuda: str

    def __post_init__(self) -> None:
        """Refuse what is no image, with a ValueError."""
        if not re.fullmatch(r"[a-z0-9][A-Za-z0-9._/:@-]{0,255}", self.name):
            raise ValueError(f"name: wanted an image, got {self.name!r:.80}")
        if not re.fullmatch(r"\d{1,2}\.\d{1,2}", self.cuda):
            raise ValueError(f"cuda: wanted two numbers as 12.8, got {self.cuda!r:.80}")


@dataclass(frozen=True, kw_only=True)
class ProfileEntry:
    """One profile as it is written down. gpus: the most that an instance may have. Sizes in GB.

    gpu_total_gb: least memory of all GPUs of an instance together. kv_bytes_token: on average over the
    longest context. needs: further filters of the search. source: where the numbers were read.
    """

    model: str
    image: ImageEntry
    context: int
    gpus: int
    gpu_total_gb: float
    disk_gb: float
    weights: Weights
    weights_gb: float
    params_b: float
    active_b: float
    layers: int
    hidden: int
    kv_bytes_token: float
    experts: int = 0
    experts_used: int = 0
    revision: str = ""
    tool_parser: str = ""
    reasoning_parser: str = ""
    pooling: bool = False
    args: str = ""
    needs: str = "compute_cap>=800"
    env: dict[str, str] = field(default_factory=dict)
    prefill_weight: float = 0.1
    hold_s: float = 8.0
    expected_output_tokens: float = 300.0
    load_time_s: float | None = None
    start_time_s: float | None = None
    source: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse what no profile can have, with a ValueError that names the field."""
        if not REPOSITORY.fullmatch(self.model):
            raise ValueError(f"model: wanted ORG/MODEL, got {self.model!r:.80}")
        for name in ("revision", "tool_parser", "reasoning_parser"):
            if (word := getattr(self, name)) and not WORD.fullmatch(word):
                raise ValueError(f"{name}: wanted one word, got {word!r:.80}")
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name}: wanted {least:g} to {most:g}, got {value!r:.80}")
        if self.experts and not 1 <= self.experts_used <= self.experts:
            raise ValueError(f"experts_used: wanted 1 to {self.experts}, got {self.experts_used}")

    @property
    def shape(self) -> ModelShape:
        """What step times are estimated from."""
        return ModelShape(
            self.params_b,
            self.active_b,
            self.weights_gb,
            self.weights,
            self.layers,
            self.hidden,
            self.kv_bytes_token,
            self.experts,
            self.experts_used,
        )

    def profile(self, name: str) -> Profile:
        """Return the profile that is described."""
        download_gb = IMAGE_GB + self.weights_gb
        made = Profile(
            name=name,
            model=self.model,
            image=CudaImage(self.image.name, self.image.cuda),
            needs=f"num_gpus<={self.gpus} gpu_total_ram>={self.gpu_total_gb:g} "
            f"inet_down>={500 if download_gb >= BIG_GB else 200} {self.needs}".strip(),
            disk_gb=self.disk_gb,
            vllm_args=self._arguments(),
            prefill_weight=self.prefill_weight,
            throughput_work_s=1.0,
            hold_s=self.hold_s,
            expected_output_tokens=self.expected_output_tokens,
            load_time_s=self.load_time_s or BOOT_S + DOWNLOAD_S_PER_GB * download_gb,
            start_time_s=self.start_time_s or START_S + START_S_PER_GB * self.weights_gb,
            max_model_len=self.context,
            download_gb=download_gb,
            shape=self.shape,
            env=dict(self.env),
            chats=not self.pooling,
            pooling=self.pooling,
        )
        slowest = full_queue_work_s(made.timing_on(SLOWEST_GPU, self.gpus), self.prefill_weight)
        return replace(made, throughput_work_s=slowest)

    def _arguments(self) -> str:
        words = [f"--max-model-len {self.context}", f"--gpu-memory-utilization {MEMORY_SHARE:g}"]
        if self.revision:
            words.append(f"--revision {self.revision}")
        if self.pooling:
            words.append("--runner pooling")
        if self.tool_parser:
            words.append(f"--enable-auto-tool-choice --tool-call-parser {self.tool_parser}")
        if self.reasoning_parser:
            words.append(f"--reasoning-parser {self.reasoning_parser}")
        return " ".join([*words, *([self.args] if self.args else [])])


def gpu_total_gb(shape: ModelShape, context: int, gpus: int) -> int:
    """Return the least memory of all GPUs together, in whole GB: for the weights and one longest request."""
    kv_gb = shape.kv_bytes * context / 1e9
    return math.ceil((shape.weights_gb + kv_gb + BESIDE_GB * gpus) / MEMORY_SHARE)


def built_in_profiles(text: str) -> dict[str, Profile]:
    """Return the profiles of a TOML text that is ours: it is not checked as one's own are."""
    found = {}
    for name, table in tomllib.loads(text).items():
        image, weights = ImageEntry(**table.pop("image")), Weights(table.pop("weights"))
        found[name] = ProfileEntry(image=image, weights=weights, **table).profile(name)
    return found
