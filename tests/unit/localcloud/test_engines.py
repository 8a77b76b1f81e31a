"""What the image of each engine gives an instance, and what is said when real vLLM is not there."""

import os
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import pytest

from localcloud import engines
from localcloud.__main__ import main
from localcloud.account import Boot, Cloud, Order, Times
from localcloud.engines import ENGINES, VLLM_STOP_S, Engine
from localcloud.machines import MACHINES
from localcloud.world import Host, World
from process.errors import ConfigError
from tests.process.test_localcloud import LocalCloud, cloud
from tests.waiting import wait_for

__all__ = ["cloud"]  # the fixture

BOOT = Boot(
    id=7,
    boot=1,
    order=Order("vllm/vllm-openai:x", env={"-p 8000:8000": "1", "A": "7", "OMP_NUM_THREADS": "3"}),
    machine=MACHINES[0],
    authorized_keys=(),
    keep_ports={},
    drop_ports=False,
    load_s=0.0,
    start_s=0.0,
    fatal_line=None,
    new_host_key=False,
    ssh="ok",
)


def world_of(tmp_path: Path, engine: str) -> World:
    return World(Cloud(MACHINES, Random(1)), tmp_path / "cloud", engine)


def environment(tmp_path: Path, engine: str) -> dict[str, str]:
    """What an instance of that engine sees."""
    world = world_of(tmp_path, engine)
    try:
        return world._environment(Host(7, tmp_path / "7"), BOOT, {"8000/tcp": 20_123}, tmp_path / "m.json")
    finally:
        world.stop()


# -- what an instance sees ---------------------------------------------------------------------------


def test_the_image_of_the_paced_engine_has_our_python_and_the_stand_in(tmp_path: Path) -> None:
    seen = environment(tmp_path, "paced")
    assert seen["PYTHONPATH"].split(os.pathsep)[0].endswith("/localcloud/image")
    assert "VLLM_MODEL" not in seen


def test_the_image_of_real_vllm_has_its_python_its_model_and_nothing_of_ours(tmp_path: Path) -> None:
    seen = environment(tmp_path, "vllm")
    assert seen["PATH"].split(":")[0] == str(engines.VLLM_ENVIRONMENT / "bin")
    assert "PYTHONPATH" not in seen
    assert seen["VLLM_MODEL"] == str(engines.TINY_MODEL)
    assert (seen["VLLM_TARGET_DEVICE"], seen["HF_HUB_OFFLINE"]) == ("cpu", "1")


@pytest.mark.parametrize("engine", ENGINES)
def test_every_instance_has_its_own_home_and_tmp_and_what_its_order_says(tmp_path: Path, engine: str) -> None:
    """As with docker, -e goes before what the image sets, and HOME is the container's."""
    seen = environment(tmp_path, engine)
    assert (seen["HOME"], seen["TMPDIR"]) == (str(tmp_path / "7" / "home"), str(tmp_path / "7" / "tmp"))
    assert (seen["A"], seen["OMP_NUM_THREADS"], seen["FLEET_PORT_8000"]) == ("7", "3", "20123")


def test_an_instance_gets_the_processor_that_fewest_others_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    world = world_of(tmp_path, "vllm")
    hosts = {n: Host(n, tmp_path / str(n)) for n in (1, 2, 3)}
    world._hosts.update(hosts)
    got = []
    for host in hosts.values():
        host.process = subprocess.Popen(("true",))
        host.processor = world._least_used_processor(host)
        got.append(host.processor)
        host.process.wait()
    assert got == [3, 5, 3]
    hosts[1].process = hosts[3].process = None
    assert world._least_used_processor(hosts[3]) == 3, "only the second runs, on 5"
    world._hosts.clear()
    world.stop()


# -- times and faults --------------------------------------------------------------------------------


def test_with_real_vllm_the_cloud_is_sped_up_and_the_model_server_is_not() -> None:
    paced, vllm = ENGINES["paced"].times(60.0), ENGINES["vllm"].times(60.0)
    assert paced == Times()
    assert (vllm.pull_s, vllm.restart_s) == (paced.pull_s, paced.restart_s)
    assert (vllm.load_s, vllm.start_s) == (0.0, 0.0)
    assert vllm.stop_s / 60.0 == vllm.reboot_s / 60.0 == VLLM_STOP_S


@pytest.mark.parametrize("fault", ["never-ready", "fatal-line:count=1"])
def test_a_fault_that_real_vllm_cannot_play_is_refused(fault: str) -> None:
    with pytest.raises(ConfigError, match="the vllm engine cannot play it"):
        main(["--engine", "vllm", "--fault", fault])


# -- getting ready -----------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment of vLLM whose Python is a script, to be written; gives that."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / "venv" / ".ready").touch()
    monkeypatch.setattr(engines, "VLLM_ENVIRONMENT", tmp_path / "venv")
    monkeypatch.setattr(engines, "TINY_MODEL", tmp_path / "tiny")
    return python


def write(python: Path, *lines: str) -> None:
    python.write_text("\n".join(("#!/bin/sh", *lines, "")))
    python.chmod(0o700)


def test_without_vllm_it_is_said_how_it_is_installed(installed: Path) -> None:
    (installed.parent.parent / ".ready").unlink()
    with pytest.raises(ConfigError, match=r"`make -C .* \.venv-vllm/\.ready` installs it"):
        main(["--engine", "vllm"])


def test_the_model_is_made_once_by_the_python_of_vllm(installed: Path) -> None:
    write(installed, 'mkdir "$3" && echo made >> "$3/log"')
    for _ in range(2):
        ENGINES["vllm"].make_ready()
    assert (engines.TINY_MODEL / "log").read_text() == "made\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("echo Traceback; echo No space left; exit 1", "cannot be made: No space left"),
        ("exit 3", "cannot be made: 3"),
        ("sleep 60", "cannot be made: .* timed out"),
    ],
)
def test_a_model_that_cannot_be_made_is_one_line(
    installed: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: str
) -> None:
    monkeypatch.setattr(engines, "MAKE_MODEL_TIMEOUT_S", 0.5)
    write(installed, f"exec sh -c '{line}'")
    with pytest.raises(ConfigError, match=words):
        ENGINES["vllm"].make_ready()


def test_a_python_that_is_not_there_is_one_line(installed: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be made: .*No such file"):
        ENGINES["vllm"].make_ready()


def test_the_paced_engine_needs_nothing() -> None:
    engine: Engine = ENGINES["paced"]
    engine.make_ready()


# -- what ends with an instance ----------------------------------------------------------------------

SHARES_MEMORY = """\
exec python3 -c '
import multiprocessing, os, time
from multiprocessing.shared_memory import SharedMemory
block, lock = SharedMemory(create=True, size=1000), multiprocessing.get_context("spawn").Lock()
print(block.name, lock._semlock.name, flush=True)
time.sleep(1000)'
"""


@pytest.mark.parametrize("how", ["destroy", "kill", "stop"])
def test_the_shared_memory_of_an_instance_ends_with_it(cloud: LocalCloud, how: str) -> None:
    """A container's vanishes with the container; here SIGKILL leaves it, and nobody else would remove it."""
    number = cloud.rent_by_hand(SHARES_MEMORY)

    def names() -> Any:
        console = cloud.root / "instances" / str(number) / "console.log"
        return console.exists() and console.read_text().split()

    block, lock = wait_for("it has shared memory", names)
    files = [Path("/dev/shm") / block, Path("/dev/shm") / f"sem.{lock.lstrip('/')}"]
    assert all(path.exists() for path in files), files
    if how == "destroy":
        cloud.ask("DELETE", f"/api/v0/instances/{number}/")
    elif how == "kill":
        cloud.ask("POST", f"/localcloud/instances/{number}/kill", {"part": "all"})
    else:
        cloud.ask("PUT", f"/api/v0/instances/{number}/", {"state": "stopped"})
    wait_for("all is gone", lambda: not any(path.exists() for path in files))
