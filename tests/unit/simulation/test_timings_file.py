"""The file of step-time constants of one's own."""

import json
from pathlib import Path

import pytest

from engine.profiles import get_profile
from engine.step_time_constants import TIMINGS
from process.errors import ConfigError
from simulation.virtual.timings_file import read_timings

OWN: dict[str, object] = {
    "model": "13B", "quantization": "awq4", "gpu": "RTX 5090", "num_gpus": 1,
    "a": 6.0, "b": 0.05, "c": 0.6, "d": 6.0, "e": 110.0, "f": 3.5, "kv_tokens": 25_000,
}  # fmt: skip


def test_own_constants_go_before_those_of_the_table(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps([OWN, OWN | {"gpu": "L40S", "max_seqs": 64}]))
    own = read_timings(path)
    assert get_profile("vllm-13").timing_on("RTX 5090", 1, own=own).a == 6.0
    assert get_profile("vllm-13").timing_on("L40S", 1, own=own).max_seqs == 64
    assert get_profile("vllm-13").timing_on("L40S", 1).a == TIMINGS["13B", "awq4", "L40S", 1].a


@pytest.mark.parametrize(
    ("entry", "wrong"),
    [
        (OWN | {"a": "fast"}, "[0].a: wanted `float`, got `str`"),
        (OWN | {"kv_tokens": 0}, "[0].kv_tokens: wanted `int` >= 1"),
        (OWN | {"max_seqs": 4096}, "[0].max_seqs: wanted at most step_tokens, 2048, got 4096"),
        (OWN | {"speed": 1}, "[0].speed: unknown field"),
        ({k: v for k, v in OWN.items() if k != "gpu"}, "[0].gpu: is missing"),
        (OWN | {"a": -0.1}, "[0].a: wanted `float` >= 0.0"),
        (OWN | {"a": 1e7}, "[0].a: wanted `float` <= 1000000.0"),
        (OWN | {"a": float("nan")}, "body: not JSON: JSON is malformed: invalid character (byte 81)"),
        (7, "[0]: wanted `object`, got `int`"),
    ],
)
def test_wrong_constants_are_refused_with_file_entry_and_field(
    tmp_path: Path, entry: object, wrong: str
) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps([entry]))
    with pytest.raises(ConfigError) as refused:
        read_timings(path)
    assert str(refused.value) == f"{path}: {wrong}"


def test_constants_that_are_given_twice_and_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    for text, wrong in (
        (json.dumps([OWN, OWN | {"a": 7.0}]), "[1]: 13B awq4 on 1x RTX 5090 is there already"),
        ("[]", "wanted a list of at least one object"),
        ("[{", "body: not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as refused:
            read_timings(path)
        assert str(refused.value).startswith(f"{path}: {wrong}")
    with pytest.raises(ConfigError, match="No such file"):
        read_timings(tmp_path / "none.json")
    path.write_bytes(b"[\n\xff]")
    with pytest.raises(ConfigError, match="line 2: not text in UTF-8"):
        read_timings(path)


def test_a_byte_order_mark_before_constants_is_no_part_of_them(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text("\ufeff" + json.dumps([OWN]))
    assert len(read_timings(path)) == 1
