"""Built-in profiles of today's models: each number follows from the model's own config.json."""

import shlex
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest

from engine.estimate import Weights
from engine.gpus import GPUS
from engine.model_config import read_config
from engine.new_profile import make_entry, parsers_of, profile_name
from engine.profile_entry import ProfileEntry
from engine.profile_table import entries_in, profiles_in, written
from engine.profiles import PROFILES, get_profile, known_profiles, use_own_profiles
from process.errors import ConfigError
from tests.model_configs import (
    BGE_M3,
    BUILT_IN,
    GPT_OSS_20B,
    LLAMA_70B,
    QWEN3_8B,
    QWEN3_30B_A3B,
    STORED_BYTES,
)

TABLE = files("engine").joinpath("models.toml").read_text()

PUBLISHED = {  # parameters in billions, all and active, as their makers say them
    "qwen3-4b": (4.0, 4.0),
    "qwen3-8b": (8.2, 8.2),
    "qwen3-14b": (14.8, 14.8),
    "qwen3-32b": (32.8, 32.8),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b-fp8": (235.0, 22.0),
    "gpt-oss-20b": (20.9, 4.2),
    "gpt-oss-120b": (116.8, 5.7),
    "llama-3.3-70b": (70.6, 70.6),
    "vllm-70-16bit": (70.6, 70.6),
    "mistral-small-24b": (24.0, 24.0),
    "gemma-3-27b": (27.0, 27.0),
    "gemma-3-12b": (11.77, 11.77),
}
"""OpenAI counts 3.6 and 5.1 billion active: without the embeddings, which are looked up."""


def entry_from_config(name: str) -> ProfileEntry:
    repository, config, source = BUILT_IN[name]
    context = 8192 if name == "vllm-70-16bit" else None
    facts = read_config(config, repository, stored_bytes=STORED_BYTES.get(name), context=context)
    made = make_entry(repository, facts, source=tuple(source))
    # The hour-long load of the design.
    return replace(made, load_time_s=3600.0) if name == "vllm-70-16bit" else made


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_built_in_number_follows_from_the_models_config(name: str) -> None:
    assert entries_in(TABLE, "models.toml")[name] == entry_from_config(name)


@pytest.mark.parametrize("name", BUILT_IN)
def test_parameters_counted_are_those_that_are_published(name: str) -> None:
    entry = entries_in(TABLE, "models.toml")[name]
    total, active = PUBLISHED[name]
    assert entry.params_b == pytest.approx(total, rel=0.02)
    assert entry.active_b == pytest.approx(active, rel=0.02)
    assert entry.source, "where it was read"


def test_there_are_dense_models_and_mixtures_from_4_to_235_billion() -> None:
    entries = entries_in(TABLE, "models.toml")
    assert len(entries) >= 8
    sizes = [e.params_b for e in entries.values()]
    assert min(sizes) == pytest.approx(4, rel=0.01)
    assert max(sizes) == pytest.approx(235, rel=0.01)
    assert {bool(e.experts) for e in entries.values()} == {True, False}
    assert {e.weights for e in entries.values()} == set(Weights)


@pytest.mark.parametrize("name", BUILT_IN)
def test_some_machine_of_known_gpus_fits_and_the_search_asks_for_enough_memory(name: str) -> None:
    profile, entry = get_profile(name), entries_in(TABLE, "models.toml")[name]
    asked = dict(word.split(">=", 1) for word in profile.needs.split() if ">=" in word)
    fitting = [
        (gpu, n)
        for gpu in GPUS
        for n in (1, 2, 4, 8)
        if n <= entry.gpus and profile.fits(gpu, n) and GPUS[gpu].mem_gb >= 20
    ]
    assert fitting
    assert all(GPUS[gpu].mem_gb * n >= float(asked["gpu_total_ram"]) for gpu, n in fitting)
    rates = [profile.throughput_on(gpu, n) for gpu, n in fitting]
    assert min(rates) > 0.0
    assert len({round(rate) for rate in rates}) > 3, "each GPU has its own"
    assert profile.throughput_work_s <= max(rates)
    assert profile.disk_gb > entry.weights_gb + 30.0
    assert profile.image.cuda in profile.offer_query()


def test_the_unquantised_70b_takes_the_hour_of_the_design() -> None:
    assert get_profile("vllm-70-16bit").load_time_s == 3600.0
    assert get_profile("vllm-70-16bit").download_gb == pytest.approx(156, rel=0.01)


def test_only_between_boards_without_p2p_nccl_is_told() -> None:
    profile = get_profile("qwen3-32b")
    assert profile.env_on("RTX 4090", 4) == {"NCCL_P2P_DISABLE": "1"}
    assert profile.env_on("A card that nobody knows", 2) == {"NCCL_P2P_DISABLE": "1"}
    assert profile.env_on("H100 SXM", 2) == {}
    assert profile.env_on("RTX 4090", 1) == {}
    own = replace(profile, env={"NCCL_P2P_DISABLE": "0"})
    assert own.env_on("RTX 4090", 2) == {"NCCL_P2P_DISABLE": "0"}


def test_three_gpus_cannot_share_heads() -> None:
    assert get_profile("qwen3-32b").fits("A100 SXM4", 3) is False
    assert get_profile("qwen3-32b").fits("A100 SXM4", 2) is True


# -- reading a config --------------------------------------------------------------------------------------


def read(config: dict[str, Any], **more: Any) -> Any:
    return read_config(config, "org/model", **more)


def test_a_sliding_window_keeps_no_more_than_its_tokens() -> None:
    """Every second layer of gpt-oss looks 128 tokens back."""
    layer = 2 * 8 * 64 * 2
    assert read(GPT_OSS_20B, context=128).shape.kv_bytes == 24 * layer
    assert read(GPT_OSS_20B, context=128_000).shape.kv_bytes == pytest.approx(12 * layer, rel=0.01)
    assert read(QWEN3_8B | {"sliding_window": 4096, "use_sliding_window": False}).shape.kv_bytes == 147_456


def test_latent_attention_keeps_one_vector_a_layer() -> None:
    deepseek = QWEN3_30B_A3B | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert read(deepseek).shape.kv_bytes == 48 * 576 * 2


@pytest.mark.parametrize(
    ("said", "weights", "method"),
    [
        ({"quant_method": "awq", "bits": 4}, Weights.W4, "awq"),
        ({"quant_method": "gptq", "bits": 8}, Weights.W8, "gptq"),
        ({"quant_method": "fp8", "fmt": "e4m3"}, Weights.W8, "fp8"),
        ({"quant_method": "mxfp4"}, Weights.W4, "mxfp4"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 4}}},
            },
            Weights.W4,
            "compressed-tensors",
        ),
        (None, Weights.W16, None),
    ],
)
def test_how_the_weights_are_kept_is_read(said: Any, weights: Weights, method: str | None) -> None:
    facts = read(QWEN3_8B | {"quantization_config": said}, stored_bytes=6 * 10**9)
    assert (facts.shape.weights, facts.quantization) == (weights, method)
    assert facts.shape.weights_gb == 6.0, "as the files say"


def test_16_bit_weights_are_quantized_while_loading_only_where_vllm_can() -> None:
    facts = read(LLAMA_70B, quantization="fp8")
    assert facts.shape.weights is Weights.W8
    assert facts.shape.weights_gb == pytest.approx(72.7, rel=0.01), "embeddings and head stay in 16 bits"
    assert "--quantization fp8" in make_entry("org/m", facts).profile("m").vllm_args
    with pytest.raises(ConfigError, match="take a repository that is"):
        read(LLAMA_70B, quantization="awq")
    quantized = QWEN3_8B | {"quantization_config": {"quant_method": "awq"}}
    assert "--quantization" not in make_entry("org/m", read(quantized, quantization="awq")).args
    with pytest.raises(ConfigError, match="quantized already, by awq"):
        read(quantized, quantization="fp8")


def test_an_embedding_model_is_told_by_its_architecture_or_by_the_hub() -> None:
    facts = read(BGE_M3)
    assert facts.pooling
    assert facts.shape.params_b == pytest.approx(0.567, rel=0.05)
    args = shlex.split(make_entry("BAAI/bge-m3", facts).profile("bge-m3").vllm_args)
    assert args[args.index("--runner") + 1] == "pooling"
    assert "--enable-auto-tool-choice" not in args
    assert read(QWEN3_8B, pooling=True).pooling
    assert not read(QWEN3_8B).pooling


@pytest.mark.parametrize(
    ("config", "more", "wrong"),
    [
        ({}, {}, "no num_hidden_layers or n_layer|no vocab_size|no hidden_size"),
        (QWEN3_8B | {"num_hidden_layers": 10**9}, {}, "num_hidden_layers: wanted 1 to"),
        (QWEN3_8B | {"hidden_size": True}, {}, "no hidden_size"),
        (BGE_M3 | {"architectures": ["XLMRobertaForSequenceClassification"]}, {}, "scores texts"),
        (QWEN3_8B, {"context": 50_000}, "--context 50000: org/model has at most 40960"),
        (QWEN3_8B | {"quantization_config": {"quant_method": "magic"}}, {}, "quantized by magic"),
    ],
)
def test_a_config_that_cannot_be_measured_is_one_line(
    config: dict[str, Any], more: dict[str, Any], wrong: str
) -> None:
    with pytest.raises(ConfigError, match=wrong):
        read(config, **more)


def test_a_model_that_no_machine_holds_is_refused() -> None:
    huge = read(LLAMA_70B | {"num_hidden_layers": 2000})
    with pytest.raises(ConfigError, match="fit on no machine of 8 GPUs"):
        make_entry("org/huge", huge)


MINE = written({"m": make_entry("a/b", read(QWEN3_8B))})


# -- the file ----------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again() -> None:
    entries = entries_in(TABLE, "models.toml")
    assert entries_in(written(entries), "again") == entries
    odd = {"m": make_entry("org/m", read(QWEN3_8B), revision="abc.1", source=('a "quoted"\n€ line',))}
    assert entries_in(written(odd), "odd") == odd


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[m", "own: no TOML"),
        ("[M]\nmodel = 'a/b'", "wanted 1 to 63 of a-z 0-9"),
        ('["../m"]\nmodel = "a/b"', "wanted 1 to 63"),
        ("[m]\nmodel = 'a/b'", r"\[m\]: .*missing required field `image`"),
        ("m = 3", r"\[m\]: Expected `object`, got `int`"),
        (MINE.replace("gpus", "speed"), "unknown field 'speed'"),
        (MINE.replace("a/b", "a/b; rm"), "model: wanted ORG/MODEL"),
        (MINE.replace("gpus = 1", "gpus = 99"), "gpus: wanted 1 to 16, got 99"),
        (MINE.replace("'hermes'", "'h; x'").replace('"hermes"', '"h; x"'), "tool_parser: wanted one word"),
        (MINE.replace("12.8", "new"), "cuda: wanted two numbers"),
    ],
)
def test_a_wrong_file_is_refused_with_entry_and_field(text: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        profiles_in(text, "own")


def test_own_profiles_stand_beside_the_built_in_ones() -> None:
    try:
        use_own_profiles(written({"mine": make_entry("me/mine", read(QWEN3_8B))}), "own.toml")
        assert get_profile("mine").model == "me/mine"
        assert {"mine", *PROFILES} == set(known_profiles())
        with pytest.raises(ConfigError, match="vllm-13: a built-in profile has that name"):
            use_own_profiles(written({"vllm-13": make_entry("me/mine", read(QWEN3_8B))}), "own.toml")
    finally:
        use_own_profiles("", "none")
    with pytest.raises(ConfigError, match="profile add"):
        get_profile("mine")


@pytest.mark.parametrize(
    ("repository", "name"),
    [("Qwen/Qwen3-8B", "qwen3-8b"), ("me/Llama 3!", "llama-3"), ("x/..hidden", "hidden"), ("A_b.c", "a_b.c")],
)
def test_a_profile_is_named_after_its_repository(repository: str, name: str) -> None:
    assert profile_name(repository) == name


def test_parsers_follow_from_the_kind_of_model_and_its_name() -> None:
    assert parsers_of("qwen3_moe", "Qwen/Qwen3-30B-A3B") == ("hermes", "qwen3")
    assert parsers_of("qwen3_moe", "Qwen/Qwen3-30B-A3B-Instruct-2507") == ("hermes", "")
    assert parsers_of("qwen3_moe", "Qwen/Qwen3-Coder-30B-A3B-Instruct") == ("qwen3_coder", "")
    assert parsers_of("gpt_oss", "openai/gpt-oss-20b") == ("openai", "openai_gptoss")
    assert parsers_of("something new", "a/b") == ("", "")
