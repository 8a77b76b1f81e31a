"""`profile add`: from ORG/MODEL, or a folder, to an entry in profiles.toml."""

import io
import json
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

import autoscaler_server
from engine.estimate import Weights
from engine.profile_table import entries_in
from fleet.outside.config import AutoscalerConfig
from fleet.outside.model_files import HubFiles
from fleet.outside.profile_command import NewProfile, profile_command
from process.errors import ConfigError
from tests.loopback_hub import TOKEN, HubModel, LoopbackHub, running_hub
from tests.model_configs import BGE_M3, BUILT_IN, GPT_OSS_20B, LLAMA_70B, QWEN3_8B, QWEN3_30B_A3B

GB = 10**9
GEMMA_3_12B = BUILT_IN["gemma-3-12b"][1]


def shards(total: int, count: int) -> dict[str, int]:
    """So many files of weights, together that many bytes."""
    names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    return dict.fromkeys(names, total // count)


AWQ = QWEN3_8B | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
MODELS = {
    "Qwen/Qwen3-8B": HubModel(QWEN3_8B, shards(16_381_470_720, 5), revisions=("main", "v1")),
    "Qwen/Qwen3-30B-A3B": HubModel(QWEN3_30B_A3B, shards(61_064_000_000, 16)),
    "meta-llama/Llama-3.1-70B-Instruct": HubModel(LLAMA_70B, shards(141_107_412_992, 30), gated=True),
    "google/gemma-3-12b-it": HubModel(GEMMA_3_12B, shards(24_374_000_000, 5), gated=True),
    "BAAI/bge-m3": HubModel(
        BGE_M3, {"model.safetensors": 2_271_064_456, "modules.json": 349}, pipeline_tag="sentence-similarity"
    ),
    "Qwen/Qwen3-8B-AWQ": HubModel(AWQ, shards(6_100_000_000, 2)),
    "openai/gpt-oss-20b": HubModel(
        GPT_OSS_20B, shards(13_744_000_000, 3) | {"original/model.safetensors": 13 * GB}
    ),
    "org/no-config": HubModel(None, {"model.gguf": GB}),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with running_hub(dict(MODELS)) as running:
        yield running


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def add(hub: LoopbackHub, asked: NewProfile, token: str = "", profiles: Path | None = None) -> str:
    """Run the command without a market; return what it prints."""
    out = io.StringIO()
    environ = {"HF_ENDPOINT": hub.url} | ({"HF_TOKEN": token} if token else {})
    config = AutoscalerConfig(profiles=profiles)
    profile_command(asked, config, Console(file=out, width=200), environ)
    return out.getvalue()


def asked(model: str, **more: object) -> NewProfile:
    return NewProfile(model, market=False, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "token", "weights", "gb", "gpus", "parser"),
    [
        ("Qwen/Qwen3-8B", "", Weights.W16, 16.38, 1, "hermes"),
        ("Qwen/Qwen3-30B-A3B", "", Weights.W16, 61.06, 2, "hermes"),
        ("meta-llama/Llama-3.1-70B-Instruct", TOKEN, Weights.W16, 141.1, 4, "llama3_json"),
        ("BAAI/bge-m3", "", Weights.W16, 2.271, 1, ""),
        ("Qwen/Qwen3-8B-AWQ", "", Weights.W4, 6.1, 1, "hermes"),
        ("openai/gpt-oss-20b", "", Weights.W4, 13.74, 1, "openai"),
    ],
    ids=["dense", "mixture", "gated", "embedding", "awq", "mxfp4"],
)
def test_a_model_of_the_hub_becomes_a_profile(
    hub: LoopbackHub, here: Path, model: str, token: str, weights: Weights, gb: float, gpus: int, parser: str
) -> None:
    name = f"my-{model.rpartition('/')[2].lower()}"
    said = add(hub, asked(model, name=name), token)
    assert f"serve it with --model {name}" in said
    entry = entries_in((here / "profiles.toml").read_text(), "profiles.toml")[name]
    assert (entry.model, entry.weights, entry.gpus, entry.tool_parser) == (model, weights, gpus, parser)
    assert entry.weights_gb == gb
    assert entry.source == [f"{hub.url}/{model} at {'a' * 40}"]
    assert entry.pooling == (model == "BAAI/bge-m3")
    assert entry.profile(name).chats != entry.pooling
    assert TOKEN not in (here / "profiles.toml").read_text() + said


def test_a_gated_model_is_refused_clearly_without_a_token_that_may_and_nothing_is_written(
    hub: LoopbackHub, here: Path
) -> None:
    for token, as_who in (("", "without a token"), ("hf_another", "with this token")):
        with pytest.raises(ConfigError, match=f"is gated, and cannot be read {as_who}: .*HF_TOKEN"):
            add(hub, asked("meta-llama/Llama-3.1-70B-Instruct"), token)
    assert list(here.iterdir()) == []


def test_the_token_may_come_from_standard_input(
    hub: LoopbackHub, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TOKEN}\n"))
    add(hub, asked("meta-llama/Llama-3.1-70B-Instruct", token_stdin=True), "hf_not_this")
    assert (here / "profiles.toml").exists()
    assert {said for _, said in hub.asked[-3:]} == {f"Bearer {TOKEN}"}


def test_a_folder_needs_no_hub(here: Path, hub: LoopbackHub) -> None:
    folder = here / "Qwen" / "Qwen3-8B"
    folder.mkdir(parents=True)
    for name, body in MODELS["Qwen/Qwen3-8B"].files().items():
        (folder / name).write_bytes(body)
    before = len(hub.asked)
    add(hub, asked(str(folder), name="qwen"))
    assert len(hub.asked) == before
    entry = entries_in((here / "profiles.toml").read_text(), "x")["qwen"]
    assert (entry.model, entry.weights_gb) == ("Qwen/Qwen3-8B", 16.38)


def test_what_is_asked_for_goes_into_the_entry(hub: LoopbackHub, here: Path) -> None:
    more = {"context": 8192, "revision": "v1", "name": "short", "quantization": "fp8"}
    add(hub, asked("Qwen/Qwen3-8B", **more), profiles=here / "own.toml")
    entry = entries_in((here / "own.toml").read_text(), "own.toml")["short"]
    assert (entry.context, entry.revision, entry.weights) == (8192, "v1", Weights.W8)
    args = entry.profile("short").vllm_args
    assert "--revision v1" in args
    assert "--quantization fp8" in args


def test_an_entry_is_added_after_what_is_there_and_comments_stay(hub: LoopbackHub, here: Path) -> None:
    add(hub, asked("Qwen/Qwen3-8B", name="one"))
    path = here / "profiles.toml"
    path.write_text(f"# mine\n{path.read_text()}")
    add(hub, asked("Qwen/Qwen3-8B-AWQ", name="two"))
    assert path.read_text().startswith("# mine\n[one]")
    assert set(entries_in(path.read_text(), "x")) == {"one", "two"}
    with pytest.raises(ConfigError, match="has a profile two already"):
        add(hub, asked("Qwen/Qwen3-8B", name="two"))
    assert [p.name for p in here.iterdir()] == ["profiles.toml"]


@pytest.mark.parametrize(
    ("model", "more", "wrong"),
    [
        ("org/none", {}, "the hub shows no org/none without a token"),
        ("org/no-config", {}, "org/no-config has no config.json"),
        ("Qwen/Qwen3-8B", {"name": "x", "revision": "v9"}, "has no such revision"),
        ("Qwen/Qwen3-8B", {"revision": "../x y"}, "--revision .*: wanted a branch"),
        ("Qwen/Qwen3-8B", {"name": "../x"}, "--name .*: wanted 1 to 63"),
        ("Qwen/Qwen3-8B", {"name": "vllm-13"}, "vllm-13 is a built-in profile"),
        ("Qwen/Qwen3-8B", {}, "qwen3-8b is a built-in profile"),
        ("Qwen/Qwen3-8B", {"name": "x", "context": 10**6}, "--context 1000000: .* at most 40960"),
        ("not a model", {}, "wanted ORG/MODEL of the hub, or a folder"),
        ("../../etc", {}, "wanted ORG/MODEL of the hub, or a folder|no config.json|cannot be read"),
    ],
)
def test_what_cannot_become_a_profile_is_one_line(
    hub: LoopbackHub, here: Path, model: str, more: dict[str, object], wrong: str
) -> None:
    with pytest.raises(ConfigError, match=wrong):
        add(hub, asked(model, **more))
    assert list(here.iterdir()) == []


def test_the_token_goes_to_the_hub_and_nobody_else(hub: LoopbackHub, here: Path) -> None:
    """Large files are kept elsewhere, to where the hub redirects; a small one may be, too."""
    assert here.is_dir()
    heard: list[str] = []

    class Elsewhere(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while (line := self.rfile.readline().strip()) != b"":
                heard.append(line.decode())
            body = json.dumps(QWEN3_8B).encode()
            self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    with socketserver.TCPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        path = "/Qwen/Qwen3-8B/resolve/main/config.json"
        hub.moved[path] = f"http://localhost:{server.server_address[1]}/config.json"
        try:
            files = HubFiles(TOKEN, {"HF_ENDPOINT": hub.url}).read("Qwen/Qwen3-8B")
        finally:
            del hub.moved[path]
            thread.join()
    assert files.config == QWEN3_8B
    assert heard
    assert not any(TOKEN in line for line in heard)


def test_a_hub_in_the_clear_beyond_this_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"HF_ENDPOINT .*: wanted https"):
        HubFiles(TOKEN, {"HF_ENDPOINT": "http://hub.example"})


def test_a_hub_that_does_not_answer_is_one_line() -> None:
    with pytest.raises(ConfigError, match="does not answer"):
        HubFiles(None, {"HF_ENDPOINT": "http://127.0.0.1:9"}).read("a/b")


def test_the_flags_say_what_is_asked_for() -> None:
    line = "profile add a/b --context 4096 --quantization fp8 --revision r --name n --token-stdin --no-market"
    args = autoscaler_server.parser().parse_args(line.split())
    assert NewProfile.of(args) == NewProfile("a/b", 4096, "fp8", "r", "n", True, False)
