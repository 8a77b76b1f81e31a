"""Flags, middleware, and the file that describes the machine."""

import json
import socket
from pathlib import Path

import pytest

from engine.gpus import GPUS
from engine.model_config import read_config
from engine.new_profile import make_entry
from engine.profile_table import written
from engine.profiles import PROFILES, use_own_profiles
from localcloud.paced.command import load_middleware, main, parse_flags, profile_of
from localcloud.paced.machine import SimulatedMachine
from process.errors import ConfigError
from tests.model_configs import QWEN3_8B


def write_machine(folder: Path, **more: object) -> Path:
    path = folder / "machine.json"
    machine = {
        "gpu_name": "A100 SXM4",
        "num_gpus": 1,
        "load_s": 0.05,
        "start_s": 0.01,
        "fatal_line": None,
        "loaded": str(folder / "loaded"),
    }
    path.write_text(json.dumps(machine | more))
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which loading takes longer than any test may."""
    path = write_machine(tmp_path, load_s=1000.0)
    monkeypatch.setenv("LOCALCLOUD_MACHINE", str(path))
    return path


def test_vllms_flags_are_read_and_those_without_a_meaning_are_kept_apart() -> None:
    given = "--model M --served-model-name vllm-13 M --port 81 --max-model-len 4k"
    more = "--middleware a.B --middleware c.D --enforce-eager --swap-space 4"
    flags, others = parse_flags([*given.split(), *more.split()])
    assert (flags.model, flags.served_model_name, flags.port) == ("M", ["vllm-13", "M"], 81)
    assert (flags.max_model_len, flags.middleware) == (4_000, ["a.B", "c.D"])
    assert others == ["--enforce-eager", "--swap-space", "4"]


@pytest.mark.parametrize(
    "wrong", ["--port 70000", "--port x", "--max-model-len 0", "-tp 0", "--max-num-seqs -1"]
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse_flags(["--model", "M", *wrong.split()])
    assert exit.value.code == 2
    assert wrong.split()[0] in capsys.readouterr().err


def test_the_profile_is_found_by_name_or_by_model() -> None:
    assert profile_of(["x", "vllm-70"], "M") == "vllm-70"
    assert profile_of(["x"], "hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4") == "vllm-70"
    assert profile_of(["x"], "M") == "vllm-13"


@pytest.mark.parametrize(
    "path", ["nonsense", "no.such.Module", "localcloud.paced.command.main", "localcloud.paced.command.Gone"]
)
def test_middleware_that_is_no_class_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="--middleware"):
        load_middleware(path)


def test_a_machine_takes_its_start_time_once_the_model_was_loaded(tmp_path: Path) -> None:
    path = write_machine(tmp_path, load_s=60.0, start_s=9.0)
    assert SimulatedMachine.read(str(path)).ready_s == 60.0
    (tmp_path / "loaded").touch()
    assert SimulatedMachine.read(str(path)).ready_s == 9.0
    path.write_text('{"gpu_name": "L40S"}')
    with pytest.raises(ConfigError, match="LOCALCLOUD_MACHINE"):
        SimulatedMachine.read(str(path))


def last_words(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What the stand-in writes before it exits with 1 without having loaded anything."""
    with pytest.raises(SystemExit) as end:
        main(["--model", "org/name", "--served-model-name", "vllm-13", *flags])
    assert end.value.code == 1
    (line,) = capsys.readouterr().out.splitlines()
    return line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-model-len", "100k"], "Engine core initialization failed"),
        (["--tensor-parallel-size", "2"], "tensor parallel size 2, but 1 GPUs"),
        (["--middleware", "gates.missing.Gate"], "--middleware gates.missing.Gate cannot be loaded"),
    ],
)
def test_the_stand_in_says_in_one_line_why_it_cannot_start(
    machine: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert words in last_words(capsys, "--port", "0", *flags)


def test_a_port_in_use_is_said_before_loading(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in last_words(capsys, "--port", str(port))


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("gpu_name", [*GPUS, "A card that nobody knows"])
def test_every_profile_is_paced_on_every_gpu(name: str, gpu_name: str) -> None:
    """A paced engine holds the longest request of its model, whatever machine it pretends to be."""
    machine = SimulatedMachine(gpu_name, 1, 0.0, 0.0, None, None, 48.0, 900.0, 60.0)
    timing = PROFILES[name].timing_on(gpu_name, 1, machine.told)
    assert timing.kv_tokens >= PROFILES[name].max_model_len
    assert 0.0 < timing.step_ms(1, 100) < 10_000.0


def test_the_pace_of_a_profile_of_ones_own_is_its_own() -> None:
    mine = make_entry("me/mine", read_config(QWEN3_8B, "me/mine"))
    use_own_profiles(written({"mine": mine}), "own.toml")
    try:
        assert profile_of(["mine"], "me/mine") == "mine"
        assert profile_of(["other"], "me/mine") == "mine"
    finally:
        use_own_profiles("", "none")
