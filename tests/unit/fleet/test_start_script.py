"""The start script: what travels to an instance is what is tested, and it runs again at every start."""

import base64
import hashlib
import lzma
import re
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

from engine.profile import Profile
from engine.profiles import PROFILES, get_profile
from fleet.outside.start_script import REMOTE, StartScript, render, stripped
from process.errors import ConfigError
from tests.instance_home import MASTER, Ears, Machine
from tests.vast_env import received
from tests.waiting import wait_for
from vast.client import check_env

# -- the text ------------------------------------------------------------------------------------------


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


LONG_URL = f"https://{'autoscaler.' * 9}example.com:29000/a/path/of/a/proxy/ready"
SSH_KEY = "ssh-ed25519 " + "A" * 68 + " autoscaler-py"
DOCUMENTED_SCRIPT, DOCUMENTED_ENV, DOCUMENTED_ENTRIES = 4_048, 32_768, 256


def made(profile: Profile) -> StartScript:
    return render(profile, MASTER, LONG_URL, SSH_KEY)


@pytest.mark.parametrize("name", list(PROFILES))
def test_every_profile_stays_below_all_documented_limits_with_room(name: str) -> None:
    """Room for a longer model name, more arguments and variables of a user's own profile."""
    script = made(get_profile(name))
    assert len(script.onstart.encode()) <= 4_000 - 1_000 < DOCUMENTED_SCRIPT
    assert len(script.env) <= 30_000 - 4_000 < DOCUMENTED_ENV
    check_env(script.env)
    arrived = received(script.env)
    assert len(arrived) <= DOCUMENTED_ENTRIES
    assert sum(len(name) + len(value) for name, value in arrived.items()) <= DOCUMENTED_ENV
    assert max(map(len, arrived.values())) < 4_096


def test_a_script_over_the_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"start script has .* at most 4000"):
        render(replace(get_profile("vllm-13"), vllm_args="--x " * 800), MASTER)


def test_an_environment_over_the_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"environment has .* at most 30000"):
        render(replace(get_profile("vllm-13"), env={"LONG": "x" * 12_000}), MASTER)


def test_arguments_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ConfigError, match="vllm_args"):
        render(replace(get_profile("vllm-13"), vllm_args="--x 'open"), MASTER)


@pytest.mark.parametrize(
    ("name", "value"),
    [("FLEET_0", "x"), ("VLLM_MODEL", "x"), ("A-B", "x"), ("A", "it's"), ("A", 'a "b"'), ("A", "a\nb")],
)
def test_a_variable_of_a_profile_that_would_not_arrive_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        render(replace(get_profile("vllm-13"), env={name: value}), MASTER)


def test_the_variables_of_a_profile_arrive_through_the_cli_as_they_were_written() -> None:
    env = {"NCCL_P2P_DISABLE": "1", "WORDS": "two words=2", "URL": "http://a/b?c=d&e=f", "EMPTY": ""}
    arrived = received(render(replace(get_profile("vllm-13"), env=env), MASTER).env)
    assert {name: arrived[name] for name in env} == env


def test_only_the_hash_of_the_master_token_is_in_the_script_and_nothing_of_it_in_the_environment() -> None:
    script = made(get_profile("vllm-13"))
    hashed = hashlib.sha256(MASTER.encode()).hexdigest()
    assert hashed in script.onstart
    assert MASTER not in script.onstart + script.env
    assert hashed not in script.env


def test_what_travels_is_all_of_remote_but_its_words() -> None:
    arrived = received(made(get_profile("vllm-13")).env)
    code = "".join(arrived[f"FLEET_{n}"] for n in range(sum(bool(re.match(r"FLEET_\d", k)) for k in arrived)))
    files = lzma.decompress(base64.b64decode(code)).decode().split("\0")
    found = dict(file.split("\n", 1) for file in files)
    assert set(found) == {p.name for p in REMOTE.glob("*.py")}
    for name, source in found.items():
        assert source == stripped((REMOTE / name).read_text()), name
        assert '"""' not in source


SMALL = """
from dataclasses import dataclass

@dataclass
class C:
    'Words.'

    field: int = 7

class Empty:
    'Words.'

def empty() -> None:
    'Words.'

def area(*, width: int, height: int) -> int:
    return width * height
"""


def test_what_is_taken_off_changes_nothing() -> None:
    """A function or class of words only stays one, and a dataclass keeps its fields."""
    small = stripped(SMALL)
    assert "Words" not in small
    seen: dict[str, Any] = {}
    exec(small, seen)  # noqa: S102 ours, from above
    assert (seen["C"](field=3).field, seen["C"]().field) == (3, 7)
    assert (seen["empty"](), seen["area"](width=2, height=3), seen["Empty"]().__doc__) == (None, 6, None)


def test_a_word_of_a_profile_cannot_become_a_command(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    evil = f"x'; touch {trap}; echo '$(touch {trap})`touch {trap}`\n touch {trap}\nEND\ntouch {trap}"
    profile = replace(get_profile("vllm-13"), name=evil, model=evil, vllm_args=f'"$(touch {trap})"')
    machine = Machine(tmp_path, engine="print('started')")
    machine.give(profile)
    machine.script.write_text(machine.script.read_text().replace('exec "$python"', 'exit 7; exec "$python"'))
    with machine.running() as boot:
        assert boot.wait(timeout=30) == 7, "all of it ran but its last line"
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
    assert "serve /models/my own --served-model-name vllm-13 /models/my own" in said
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


# -- the Python that has vLLM, among those of an image ---------------------------------------------------

INTERPRETER = """#!/bin/sh
echo {name} "$@" | head -n 1 >> "$HOME/asked"
[ -z "{vllm}" ] || export PYTHONPATH="$PYTHONPATH:{vllm}"
exec {python} {without} "$@"
"""


def interpreter(where: Path, name: str, vllm: Path | None) -> Path:
    """A python3 with or without vLLM, in the bin directory that is returned."""
    where.mkdir(parents=True)
    script = INTERPRETER.format(
        name=name, python=sys.executable, vllm=vllm or "", without="" if vllm else "-S"
    )
    (where / "python3").write_text(script)
    (where / "python3").chmod(0o700)
    return where


def test_the_python_that_has_vllm_is_found_behind_others(tmp_path: Path) -> None:
    """As on vastai/vllm images, whose own entrypoint ssh mode replaces."""
    machine = Machine(tmp_path)
    del machine.environ["PYTHONPATH"]
    first = interpreter(tmp_path / "usr" / "bin", "system", None)
    second = interpreter(tmp_path / "conda" / "bin", "conda", None)
    third = interpreter(machine.home / "venv" / "bin", "venv", machine.image)  # not in PATH
    machine.environ["PATH"] = f"{first}:{second}:/usr/bin:/bin"
    with machine.running():
        machine.wait_until_ready()
    ran = [line.split()[0] for line in (machine.home / "asked").read_text().splitlines()]
    assert ran[:2] == ["system", "conda"]
    assert "-m remote.supervise" in (machine.home / "asked").read_text()
    assert third.exists()
    assert ran[-1] == "venv"


def test_the_first_of_two_that_have_vllm_is_taken(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    del machine.environ["PYTHONPATH"]
    paths = [interpreter(tmp_path / name, name, machine.image) for name in ("one", "two")]
    machine.environ["PATH"] = ":".join([*map(str, paths), "/usr/bin:/bin"])
    with machine.running():
        machine.wait_until_ready()
    assert "two" not in (machine.home / "asked").read_text()


def test_an_image_without_vllm_is_given_up_in_the_log_and_by_a_signed_word(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    del machine.environ["PYTHONPATH"]
    only = interpreter(tmp_path / "bin", "only", None)
    machine.environ["PATH"] = f"{only}:/usr/bin:/bin"
    with Ears() as ears:
        machine.give(get_profile("vllm-13"), ears.url)
        with machine.running() as boot:
            assert boot.wait(timeout=60) == 1
    why = "no python3 on this image has vLLM"
    assert machine.model_log() == f"fleet: giving up: {why}\n"
    assert f"fleet: giving up: {why}" in machine.log.read_text(), "vastai logs shows it"
    (said,) = ears.heard(sha256(MASTER))
    assert (said["state"], said["why"]) == ("failed", why)


def test_a_chunk_that_did_not_arrive_is_said_in_the_log(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    del machine.environ["FLEET_1"]
    with machine.running() as boot:
        assert boot.wait(timeout=30) == 1
    assert machine.model_log() == "fleet: giving up: its code did not arrive in its environment\n"


def test_nothing_of_what_carried_the_code_is_left_to_the_model_server(tmp_path: Path) -> None:
    """But the account's variables are there, which vLLM reads, and in no log."""
    engine = "import os, time; print(sorted(os.environ), os.environ['VLLM_USE_RUST_FRONTEND'], flush=True)"
    machine = Machine(tmp_path, engine=f"{engine}; time.sleep(60)")
    machine.environ["HF_TOKEN"] = "hf_secret_of_the_account"
    with machine.running():
        wait_for("its variables", lambda: "HF_TOKEN" in machine.model_log())
    assert "FLEET_0" not in machine.model_log()
    assert machine.model_log().rstrip().endswith(" 0")
    logs = [machine.log, *machine.fleet.glob("*.log*")]
    assert not any("hf_secret" in log.read_text() for log in logs)


def test_tmux_is_off_and_the_fleets_key_is_authorized_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    keys = machine.home / ".ssh" / "authorized_keys"
    keys.parent.mkdir()
    keys.write_text("ssh-rsa BBBB somebody")
    machine.environ["FLEET_SSH_KEY"] = "ssh-ed25519:AAAAC3"
    for _ in range(2):
        with machine.running():
            machine.wait_until_ready()
    assert (machine.home / ".no_auto_tmux").exists()
    assert keys.read_text().split("\n") == ["ssh-rsa BBBB somebody", "ssh-ed25519 AAAAC3", ""]
    assert machine.script.read_text().splitlines()[2] == "touch ~/.no_auto_tmux", "before all else"
