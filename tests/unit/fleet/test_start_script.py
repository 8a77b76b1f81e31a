"""The start script: what travels to an instance is what is tested, and it runs again at every start."""

import base64
import hashlib
import lzma
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest

from engine.profiles import PROFILES, get_profile
from fleet.outside.start_script import LIMIT_BYTES, REMOTE, minified, render
from process.errors import ConfigError
from tests.instance_home import MASTER, Machine
from tests.waiting import wait_for

# -- the text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PROFILES))
def test_every_profile_fits_into_the_services_limit_with_room(name: str) -> None:
    """Room for a longer model name and more arguments of a user's own profile."""
    assert len(render(get_profile(name), MASTER).encode()) <= LIMIT_BYTES - 1_800


def test_a_script_over_the_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match="16384"):
        render(replace(get_profile("vllm-13"), vllm_args="--x " * 2000), MASTER)


def test_arguments_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ConfigError, match="vllm_args"):
        render(replace(get_profile("vllm-13"), vllm_args="--x 'open"), MASTER)


def test_the_script_holds_the_hash_of_the_master_token_only() -> None:
    script = render(get_profile("vllm-13"), MASTER)
    assert MASTER not in script
    assert hashlib.sha256(MASTER.encode()).hexdigest() in script


def test_what_travels_is_all_of_remote_but_its_words() -> None:
    script = render(get_profile("vllm-13"), MASTER)
    packed = script.split("<<'END'\n")[1].split("\nEND\n")[0]
    files = lzma.decompress(base64.b85decode(packed)).decode().split("\0")
    found = dict(file.split("\n", 1) for file in files)
    assert set(found) == {p.name for p in REMOTE.glob("*.py")}
    for name, source in found.items():
        assert source == minified((REMOTE / name).read_text()), name
        assert '"""' not in source


SMALL = """
from dataclasses import dataclass

@dataclass
class C:
    'Words.'

    field: int = 7

def empty() -> None:
    'Words.'

def area(*, width: int, height: int) -> int:
    long_name: int = width * height
    return long_name
"""


def test_what_is_taken_off_changes_nothing() -> None:
    """A function of words only stays one, names that others know stay, and a dataclass keeps its fields."""
    small = minified(SMALL)
    assert "Words" not in small
    assert "long_name" not in small
    seen: dict[str, Any] = {}
    exec(small, seen)  # noqa: S102 ours, from above
    assert (seen["C"](field=3).field, seen["C"]().field) == (3, 7)
    assert (seen["empty"](), seen["area"](width=2, height=3)) == (None, 6)


def test_a_word_of_a_profile_cannot_become_a_command(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    evil = f"x'; touch {trap}; echo '$(touch {trap})`touch {trap}`\n touch {trap}\nEND\ntouch {trap}"
    profile = replace(get_profile("vllm-13"), name=evil, model=evil, vllm_args=f'"$(touch {trap})"')
    script = render(profile, MASTER).replace("exec python3", "exit 0; exec python3")
    subprocess.run(
        ["bash", "-c", script],
        env={"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
        check=False,
        timeout=30,
    )
    assert not trap.exists()


RECORDER = """#!/bin/sh
case "$*" in *remote.supervise*) printf '%s\\0' "$VLLM_MODEL" "$VLLM_ARGS" > "$HOME/arguments"; exit;; esac
exec {python} "$@"
"""


def test_the_arguments_of_a_profile_arrive_as_they_were_written(tmp_path: Path) -> None:
    words = [
        "--a",
        "two words",
        "--b",
        '{"x": "$HOME `id` \\\\"}',
        "--c",
        "it's",
        "--d",
        "",
        "--e",
        "*",
        "--f",
        "ä\n;&|",
    ]
    recorder = tmp_path / "bin"
    recorder.mkdir()
    (recorder / "python3").write_text(RECORDER.format(python=sys.executable))
    (recorder / "python3").chmod(0o700)
    machine = Machine(tmp_path, python=recorder)
    machine.give(replace(get_profile("vllm-13"), vllm_args=shlex.join(words)))
    with machine.running() as boot:
        assert boot.wait(timeout=30) == 0
    model, args, _ = (machine.home / "arguments").read_text().split("\0")
    assert (model, shlex.split(args)) == (get_profile("vllm-13").model, words)


def test_model_and_arguments_of_the_environment_go_before_those_of_the_profile(tmp_path: Path) -> None:
    machine = Machine(tmp_path, engine="import sys; print('told', *sys.argv, flush=True); input()")
    machine.environ |= {"VLLM_MODEL": "/models/my own", "VLLM_ARGS": "--seed '7 8'"}
    with machine.running():
        wait_for("its arguments", lambda: "told" in machine.model_log())
    said = machine.model_log()
    assert "--model /models/my own --served-model-name vllm-13 /models/my own" in said
    assert said.split("TokenCheck ")[1].startswith("--seed 7 8")


# -- starts, on an image that has what vLLM brings and nothing else ---------------------------------------

BROUGHT = ("uvicorn", "h11", "click")
"""By an image of vLLM."""


@pytest.fixture
def bare(tmp_path: Path) -> Machine:
    """A machine whose Python has no pip, no Flask and no cryptography."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=60)
    machine = Machine(tmp_path, python=tmp_path / "venv" / "bin")
    for name in BROUGHT:
        for top in {f.parts[0] for f in files(name) or () if f.parts[0] not in ("..", "__pycache__")}:
            (machine.image / top).symlink_to(Path(sys.prefix, "lib", _version(), "site-packages", top))
    return machine


def _version() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the image's openssl makes its certificate")
def test_nothing_is_installed_on_an_image_of_vllm(bare: Machine) -> None:
    """What pip brought was of versions that nobody had looked at, beside the prompts (field fault A8)."""
    script = bare.script.read_text()
    assert "pip" not in script
    assert "install" not in script
    with bare.running() as boot:
        first = wait_for("tokens", bare.tokens)
        bare.wait_until_ready()
        boot.send_signal(signal.SIGTERM)
        assert boot.wait(timeout=15) == 0
    certificate = (bare.fleet / "tls.crt").read_text()
    assert (bare.fleet / "tls.key").stat().st_mode & 0o777 == 0o600
    with bare.running():
        second = wait_for("tokens after a stop and a start", bare.tokens)
        bare.wait_until_ready()
    assert second["boot_id"] != first["boot_id"]
    assert (bare.fleet / "tls.crt").read_text() == certificate, "it stays as long as the disk does"
    assert not (bare.fleet / "site").exists()
