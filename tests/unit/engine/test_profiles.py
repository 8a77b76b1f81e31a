"""The models we know: what is expected of each GPU is what the timing of a model server gives."""

import pytest

from engine.profile import Profile
from engine.profiles import PROFILES, get_profile
from engine.reference import EventKind, SteppedModelServer
from localcloud.images import cuda_of
from process.errors import ConfigError

REQUESTS, PROMPT, OUTPUT = 1500, 300, 180


def saturated_work_s(profile: Profile, gpu_name: str, num_gpus: int) -> float:
    """Work per second of a server with a full queue, over the middle third of what it finishes."""
    server = SteppedModelServer(profile.timing_on(gpu_name, num_gpus))
    ended = [
        e.at
        for n in range(REQUESTS)
        for e in server.submit(str(n), PROMPT, OUTPUT, 0.0)
        if e.kind is EventKind.FINISHED
    ]
    while (at := server.next_change()) is not None:
        ended += [e.at for e in server.advance(at) if e.kind is EventKind.FINISHED]
    third = REQUESTS // 3
    work = third * (OUTPUT + PROMPT * profile.prefill_weight)
    return work / (ended[2 * third - 1] - ended[third - 1])


CASES = [(name, gpu) for name, profile in PROFILES.items() for gpu in profile.throughput_by_gpu]


@pytest.mark.parametrize(("name", "gpu"), CASES)
def test_the_expected_throughput_is_that_of_a_full_queue(name: str, gpu: str) -> None:
    profile = get_profile(name)
    count, _, one = gpu.rpartition("x ")
    expected = saturated_work_s(profile, one, int(count or 1))
    assert profile.throughput_on(one, int(count or 1)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "profile", [p for p in PROFILES.values() if p.throughput_by_gpu], ids=lambda p: p.name
)
def test_an_unknown_gpu_is_taken_for_the_slowest(profile: Profile) -> None:
    assert profile.throughput_on("GTX 9") == min(profile.throughput_by_gpu.values())


def test_an_unknown_model_is_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'gpt': known are gemma-3-12b, .* vllm-13, vllm-70"):
        get_profile("gpt")


# The names that vLLM registers at 0.11.0 (the image of the profiles), read in PyPI's wheel.
TOOL_PARSERS = frozenset(
    (
        "deepseek_v3",
        "deepseek_v31",
        "glm45",
        "granite",
        "granite-20b-fc",
        "hermes",
        "hunyuan_a13b",
        "internlm",
        "jamba",
        "kimi_k2",
        "llama3_json",
        "llama4_json",
        "llama4_pythonic",
        "longcat",
        "minimax",
        "mistral",
        "openai",
        "phi4_mini_json",
        "pythonic",
        "qwen3_coder",
        "qwen3_xml",
        "seed_oss",
        "step3",
        "xlam",
    )
)
REASONING_PARSERS = frozenset(
    (
        "deepseek_r1",
        "glm45",
        "granite",
        "hunyuan_a13b",
        "mistral",
        "openai_gptoss",
        "qwen3",
        "seed_oss",
        "step3",
    )
)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_names_the_parser_of_its_tool_calls(name: str) -> None:
    """Without both flags vLLM answers 400 to every request with tools; of an unknown name it dies."""
    assert PROFILES[name].image.name == "vllm/vllm-openai:v0.11.0", "read the names again"
    words = PROFILES[name].vllm_args.split()
    assert "--enable-auto-tool-choice" in words
    assert words[words.index("--tool-call-parser") + 1] in TOOL_PARSERS
    if "--reasoning-parser" in words:
        assert words[words.index("--reasoning-parser") + 1] in REASONING_PARSERS


@pytest.mark.parametrize("name", PROFILES)
def test_every_search_asks_for_what_makes_a_machine_fit(name: str) -> None:
    """The local cloud's big market has machines that fail each of these (localcloud/catalogue.py)."""
    profile = PROFILES[name]
    words = profile.offer_query().split()
    assert {"cpu_arch=amd64", "reliability>0.98", "duration>3", "inet_down_cost<0.02"} <= set(words)
    assert f"disk_space>={profile.disk_gb:g}" in words
    assert f"cuda_max_good>={profile.image.cuda}" in words


def test_the_image_has_the_cuda_that_is_asked_for() -> None:
    """Image and filter are one field, and the local cloud reads the version from the image's name."""
    for profile in PROFILES.values():
        assert cuda_of(profile.image.name) == float(profile.image.cuda)


@pytest.mark.parametrize("name", PROFILES)
def test_no_profile_forces_a_slow_kernel(name: str) -> None:
    """`--quantization awq` is 23 tokens a second where vLLM's own choice makes 123 (vllm#21376)."""
    assert "--quantization" not in PROFILES[name].vllm_args


def test_a_contract_of_a_fast_local_cloud_may_be_as_much_shorter() -> None:
    assert "duration>0.05" in PROFILES["vllm-13"].offer_query(60.0).split()
