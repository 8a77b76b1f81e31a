"""The command line: wrong flags are one line and exit 2."""

from pathlib import Path

import pytest

from localcloud.__main__ import main
from tests.commands import run_command


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fault", "no-such"], "unknown fault"),
        (["--fault", "list-500:odd=1"], "no parameter"),
        (["--speedup", "0"], "--speedup 0"),
        (["--offers", "/nowhere"], "--offers /nowhere"),
        (["--host", "0.0.0.0"], "loopback only"),
        (["--engine", "gpt"], "--engine"),
        (["--port", "99999"], "--port 99999"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_2(tmp_path: Path, flags: list[str], words: str) -> None:
    ended = run_command("localcloud", main, "--root", str(tmp_path / "c"), *flags)
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert words in ended.err
