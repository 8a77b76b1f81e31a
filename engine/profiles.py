"""The models we know how to serve: those that were measured, those of engine/models.toml, and one's own.

Throughputs by GPU are what `engine/reference.py` gives at a full queue of 300-token prompts and 180-token
answers (tests/unit/engine/test_profiles.py computes them), so they are starting points: an instance's
measured rate replaces them as soon as it is known. Where a profile has none for a GPU they are estimated.
"""

from collections.abc import Mapping
from importlib.resources import files
from types import MappingProxyType

from engine.estimate import ModelShape, Weights
from engine.profile import CudaImage, Profile
from engine.profile_entry import built_in_profiles
from process.errors import ConfigError

_VLLM_IMAGE = CudaImage("vllm/vllm-openai:v0.11.0", "12.8")

_MEASURED: Mapping[str, Profile] = MappingProxyType(
    {
        "vllm-13": Profile(
            name="vllm-13",
            model="TheBloke/Llama-2-13B-chat-AWQ",
            image=_VLLM_IMAGE,
            # gpu_ram is per GPU in GB; >= 22 admits the 24 GB cards, AWQ weights are 7.4 GB.
            needs="num_gpus=1 gpu_ram>=22 compute_cap>=800 inet_down>=200",
            disk_gb=40.0,
            # Llama 2 writes tool calls only where tool_choice makes it; hermes needs no tokens of its own.
            # No --quantization: awq is the slow kernel, and vLLM finds the fast one itself (vllm#21376).
            vllm_args="--max-model-len 4096 --gpu-memory-utilization 0.9 "
            "--enable-auto-tool-choice --tool-call-parser hermes",
            prefill_weight=0.1,
            throughput_work_s=620.0,  # of a GPU that tells nothing: the slowest one here
            throughput_by_gpu=MappingProxyType(
                {
                    "RTX 3090": 620.0,
                    "RTX 4090": 950.0,
                    "RTX A6000": 845.0,
                    "L40S": 1170.0,
                    "A100 SXM4": 1720.0,
                    "H100 SXM": 3650.0,
                }
            ),
            rows=("13B", "awq4"),
            # Llama 2 13B: docs/reference/timing.md 3; the file of weights is 7.25 GB.
            shape=ModelShape(13.02, 13.02, 7.25, Weights.W4, 40, 5120, 819_200),
            hold_s=6.0,
            expected_output_tokens=180.0,
            load_time_s=600.0,
            start_time_s=90.0,
            max_model_len=4096,
            download_gb=22.4,  # image 15, weights 7.4
        ),
        "vllm-70": Profile(
            name="vllm-70",
            model="hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4",
            image=_VLLM_IMAGE,
            needs="num_gpus<=2 gpu_total_ram>=78 compute_cap>=800 inet_down>=500",
            disk_gb=80.0,
            vllm_args="--max-model-len 8192 --gpu-memory-utilization 0.92 "
            "--enable-auto-tool-choice --tool-call-parser llama3_json",
            prefill_weight=0.1,
            throughput_work_s=490.0,
            throughput_by_gpu=MappingProxyType(
                {"2x RTX A6000": 490.0, "A100 SXM4": 570.0, "2x A100 SXM4": 1220.0, "H100 SXM": 1310.0}
            ),
            rows=("70B", "awq4"),
            shape=ModelShape(70.55, 70.55, 39.8, Weights.W4, 80, 8192, 327_680),
            hold_s=8.0,
            expected_output_tokens=220.0,
            load_time_s=3600.0,
            start_time_s=210.0,
            max_model_len=8192,
            download_gb=54.8,  # image 15, weights 39.8
        ),
        # For the local cloud's engine vllm: real vLLM on two cores, with random weights of 0.9 MB that
        # localcloud/tiny_model.py makes; its image names their directory in VLLM_MODEL. No GPU is used.
        "tiny": Profile(
            name="tiny",
            model="tiny-random-llama",
            image=_VLLM_IMAGE,
            needs="num_gpus=1",
            disk_gb=10.0,
            # Without --enforce-eager it compiles for 25 s at its first boot, with a C++ compiler. With it
            # bfloat16 uses AMX where a processor has that, and vLLM 0.32.0 dies of an illegal instruction
            # if its first prompt is short: only a longer one makes it ask the kernel for AMX. Four at once,
            # so that a small load fills it.
            vllm_args="--max-model-len 1024 --dtype float32 --max-num-seqs 4 --enforce-eager "
            "--enable-auto-tool-choice --tool-call-parser hermes",
            # Measured on one core of two, 2026-11-26: 390 output tokens/s with one request, 1,370 with 4,
            # 3,700 with 16; 45,000 prompt tokens/s.
            prefill_weight=0.03,
            throughput_work_s=1370.0,
            # Twice what an answer of 200 tokens takes when nothing else runs: an instance that may hold no
            # more than one answer is given one at a time, and seems slower and slower by that.
            hold_s=1.0,
            expected_output_tokens=200.0,
            load_time_s=45.0,  # 20 s of one core, twice that when nothing of vLLM is in memory yet
            start_time_s=30.0,
            max_model_len=1024,
            download_gb=15.0,
        ),
    }
)

PROFILES: Mapping[str, Profile] = MappingProxyType(
    {**_MEASURED, **built_in_profiles(files("engine").joinpath("models.toml").read_text())}
)
"""The profiles that are built in, by name."""

_own: dict[str, Profile] = {}


def use_own_profiles(text: str, what: str) -> None:
    """Know the profiles of this TOML text, too, from now on: for once, when a process starts.

    Raises ConfigError, which begins with `what`, for a wrong one and for the name of one that is built in.
    """
    if not text:
        _own.clear()
        return
    # Only where there are any: it takes 5 MB, and each paced engine is a process.
    from engine.profile_table import profiles_in

    found = profiles_in(text, what)
    if taken := sorted(found.keys() & PROFILES.keys()):
        raise ConfigError(f"{what}: {taken[0]}: a built-in profile has that name")
    _own.clear()
    _own.update(found)


def known_profiles() -> Mapping[str, Profile]:
    """Return all profiles by name: built in, and one's own."""
    return MappingProxyType({**PROFILES, **_own})


def get_profile(name: str) -> Profile:
    """Return the model profile of that name; for another name raise a ConfigError with the known ones."""
    known = known_profiles()
    try:
        return known[name]
    except KeyError:
        raise ConfigError(
            f"unknown model {name!r}: known are {', '.join(sorted(known))}; "
            "`profile add ORG/MODEL` makes another"
        ) from None
