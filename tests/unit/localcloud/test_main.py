"""The command line: wrong flags are one line and exit 2."""

from pathlib import Path

import pytest

from localcloud.__main__ import main
from localcloud.offers_file import read_machines
from tests.commands import run_command


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fault", "no-such"], "unknown fault"),
        (["--fault", "list-500:odd=1"], "no parameter"),
        (["--speedup", "0"], "--speedup 0"),
        (["--offers", "/nowhere"], "--offers /nowhere"),
        (["--host", "0.0.0.0"], "loopback only"),
        (["--engine", "gpt"], "--engine gpt: wanted paced or vllm"),
        (["--port", "99999"], "--port 99999"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_2(tmp_path: Path, flags: list[str], words: str) -> None:
    ended = run_command("localcloud", main, "--root", str(tmp_path / "c"), *flags)
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert words in ended.err


def test_a_file_of_offers_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    offers = tmp_path / "offers.json"
    for raw, words in (
        (b"{", f"--offers {offers}: Expecting"),
        (b'[{"machine_id": 1}]', f"--offers {offers}: offers: entry 0: missing gpu_name, usd_gpu_h"),
        (b"[\n\xff]", f"--offers {offers}, line 2: not text in UTF-8"),
    ):
        offers.write_bytes(raw)
        ended = run_command("localcloud", main, "--root", str(tmp_path / "c"), "--offers", str(offers))
        assert (ended.status, ended.err.count("\n")) == (2, 1)
        assert words in ended.err
    offers.write_text('\ufeff[{"machine_id": 1, "gpu_name": "L40S", "usd_gpu_h": 0.3}]', "utf-8")
    assert [m.gpu_name for m in read_machines(offers)] == ["L40S"]


def test_flags_may_be_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "cloud.toml"
    file.write_text('speedup = 10\nfault = ["list-500", "no-such"]\nroot = "/nowhere"\n')
    ended = run_command("localcloud", main, "--root", str(tmp_path / "c"), "--config", str(file))
    assert (ended.status, ended.err) == (
        2,
        "localcloud: --fault no-such: " + ended.err.partition("no-such: ")[2],
    )
    assert "unknown fault" in ended.err
