"""The supervisor: both programs of an instance run, what dies comes again, and nothing outlives it."""

import hashlib
import os
import signal
import socket
import stat
import subprocess
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from engine.profiles import get_profile
from fleet_client.tls_pins import pinned_context
from remote import boot, events
from remote.events import Events
from remote.log_lines import NO_INTERNET, cause_of_death
from remote.supervise import (
    DEATHS,
    EARLY_DEATHS,
    PAUSE_S,
    SETTLED_S,
    Deaths,
    Pause,
    model_command,
)
from tests.instance_home import AUTH, ENGINE, MASTER, MODEL, STUBBORN, Ears, Machine, ended_within
from tests.waiting import wait_for

OLD_DRIVER = "its driver is too old for the image"
DIGEST = hashlib.sha256(MASTER.encode()).hexdigest()

# -- decisions ----------------------------------------------------------------------------------------


def deaths_until_given_up(
    deaths: Deaths, ready: bool, every_s: float, why: str = "", lasts: bool = False
) -> tuple[int, str]:
    """How many it takes, and what is said then."""
    for n in range(1, 100):
        if (said := deaths.died(ready, why, lasts, every_s * n)) is not None:
            return n, said
    return 0, ""


def test_a_model_server_that_never_gets_ready_is_given_up() -> None:
    said = f"the model server ended {EARLY_DEATHS} times before it was ready"
    assert deaths_until_given_up(Deaths(0.0), False, 60.0) == (EARLY_DEATHS, said)


def test_a_model_server_that_was_ready_may_die_now_and_then() -> None:
    assert deaths_until_given_up(Deaths(0.0), True, 3600.0) == (0, "")


def test_a_model_server_that_dies_again_and_again_is_given_up() -> None:
    said = f"the model server ended {DEATHS} times in 600 s"
    assert deaths_until_given_up(Deaths(0.0), True, 10.0) == (DEATHS, said)


def test_what_lasts_is_given_up_at_the_first_death() -> None:
    why = "its driver is too old for the image"
    assert deaths_until_given_up(Deaths(0.0), False, 1.0, why, lasts=True) == (1, why)


def test_without_internet_it_tries_for_five_minutes_and_no_longer() -> None:
    tries, said = deaths_until_given_up(Deaths(0.0), False, 40.0, NO_INTERNET)
    assert 300.0 <= tries * 40.0 < 340.0
    assert said == "no internet on this machine: the hub was not reached in 320 s"


@pytest.mark.parametrize(
    ("line", "why", "lasts"),
    [
        (
            "RuntimeError: Unexpected error: forward compatibility was attempted on non supported HW",
            "its driver is too old for the image",
            True,
        ),
        ("RuntimeError: No CUDA GPUs are available", "no GPU in the container", True),
        ("api_server.py: error: unrecognized arguments: --x", "error: unrecognized arguments of vLLM", True),
        ("OSError: You are trying to access a gated repo.", "You are trying to access a gated repo", True),
        ("OSError: We couldn't connect to 'https://huggingface.co' to load the files", NO_INTERNET, False),
        ("RuntimeError: Engine core initialization failed. See root cause above.", "", False),
        ("torch.OutOfMemoryError: CUDA out of memory.", "", False),
    ],
)
def test_why_a_model_server_died_is_known_by_its_log(line: str, why: str, lasts: bool) -> None:
    """Memory of a killed process is free soon; what the engine's core says alone is no reason."""
    assert cause_of_death(f"(EngineCore pid=7) {line}\nmore".encode()) == (why, lasts)


def test_the_pause_doubles_until_a_process_has_settled() -> None:
    pause = Pause()
    assert [pause.after(1.0) for _ in range(7)] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert [pause.after(SETTLED_S), pause.after(0.0)] == [PAUSE_S[0], 2 * PAUSE_S[0]]


def _command(args: list[str], **environ: str) -> list[str]:
    return model_command("/fleet", "vllm-13", "some/model", args, environ, serve=True)


SERVE = ("-m", "vllm.entrypoints.cli.main", "serve", "some/model")
OLDER = ("-m", "vllm.entrypoints.openai.api_server", "--model", "some/model")


@pytest.mark.parametrize(("serve", "begins"), [(True, SERVE), (False, OLDER)])
def test_vllm_is_started_with_the_check_in_front(serve: bool, begins: tuple[str, ...]) -> None:
    args = ["--max-model-len", "4096"]
    assert model_command("/fleet", "vllm-13", "some/model", args, {}, serve=serve)[1:] == [
        *begins,
        *("--served-model-name", "vllm-13", "some/model", "--host", "0.0.0.0", "--port", "8000"),
        *("--ssl-keyfile", "/fleet/tls.key", "--ssl-certfile", "/fleet/tls.crt"),
        "--disable-uvicorn-access-log",
        *("--middleware", "remote.token_check.TokenCheck", "--max-model-len", "4096"),
    ]


@pytest.mark.parametrize(
    ("gpus", "args", "parallel"),
    [
        ("1", [], False),
        ("2", [], True),
        ("2", ["--tensor-parallel-size", "1"], False),
        ("2", ["--tensor-parallel-size=1"], False),
        ("2", ["-tp", "1"], False),
        ("two", [], False),
    ],
)
def test_all_gpus_are_used_unless_the_profile_says_otherwise(
    gpus: str, args: list[str], parallel: bool
) -> None:
    command = _command(args, GPU_COUNT=gpus)
    assert (
        command[command.index("--disable-uvicorn-access-log") + 1 :][:2] == ["--tensor-parallel-size", "2"]
    ) is parallel


def test_each_boot_has_other_keys_and_no_events(tmp_path: Path) -> None:
    def keys() -> list[bytes]:
        made = Path(boot.begin(str(tmp_path)))
        assert Events(str(made)).newest() == 0
        Events(str(made)).write("0123456789abcdef", events.STARTED)
        return [(made / name).read_bytes() for name in ("boot_id", "local.key", "token.key")]

    first, second = keys(), keys()
    assert all(a != b and len(a) == len(b) >= 32 for a, b in zip(first, second, strict=True))


# -- a whole instance ----------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_boot_serves_tokens_restarts_what_dies_and_ends_when_told(machine: Machine) -> None:
    with machine.running() as running:
        machine.wait_until_ready()
        first = wait_for("tokens", machine.tokens)
        machine.wait_for_another(MODEL, machine.kill(MODEL))
        machine.wait_until_ready()
        machine.wait_for_another(AUTH, machine.kill(AUTH))
        again = wait_for("tokens", machine.tokens)
        assert again["boot_id"] == first["boot_id"], "a dead process is no new boot"
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=15) == 0
        assert machine.processes() == {}
    with machine.running():
        last = wait_for("tokens after a restart of the container", machine.tokens)
        assert last["boot_id"] != first["boot_id"]


def test_the_log_is_that_of_the_model_server_that_runs(machine: Machine) -> None:
    """Else an old ready line would make a machine hot whose model is not loaded."""
    with machine.running():
        machine.wait_until_ready()
        (machine.fleet / "broken").touch()
        pid = machine.kill(MODEL)
        wait_for("another log", lambda: not machine.is_ready() and machine.model_log())
        assert "Application startup complete." in (machine.fleet / "model.log.old").read_text()
        assert machine.processes().get(MODEL) != pid


def test_requests_of_a_dead_model_server_are_reported_failed(machine: Machine) -> None:
    with machine.running():
        machine.wait_until_ready()
        wait_for("tokens", machine.tokens)
        ring = Events(str(machine.fleet / "boot"))
        ring.write("0123456789abcdef", events.STARTED)
        machine.kill(MODEL)
        failed = {"id": "0123456789abcdef", "status": "failed", "output_tokens": 0}
        wait_for("told", lambda: (machine.ask("/load?after=1") or {}).get("ended") == [failed])


def test_a_model_server_that_cannot_start_is_given_up_where_the_log_check_sees_it(machine: Machine) -> None:
    machine.fleet.mkdir()
    (machine.fleet / "broken").touch()
    with machine.running() as running:
        wait_for("giving up", lambda: "fleet: giving up" in machine.model_log())
        said = wait_for("the auth_server is still there", machine.tokens)
        assert said["load"]["model_up"] is False
        assert MODEL not in machine.processes()
        assert running.poll() is None


DIES = """
import os, sys
print("offline" if os.environ.get("HF_HUB_OFFLINE") == "1" else "online", flush=True)
print(open("says").read(), flush=True)
sys.exit(3)
"""
"""Says whether it may ask the hub, then what is in the file "says", and dies."""


def test_what_lasts_is_given_up_at_once_and_said_where_the_cloud_shows_it(tmp_path: Path) -> None:
    machine = Machine(tmp_path, engine=DIES)
    machine.fleet.mkdir()
    (machine.fleet / "says").write_text("RuntimeError: No CUDA GPUs are available")
    with machine.running():
        wait_for("giving up", lambda: "fleet: giving up: no GPU in the container" in machine.model_log())
        assert not (machine.fleet / "model.log.old").exists(), "it was tried once"
    assert "fleet: giving up: no GPU in the container" in machine.log.read_text()


MODE = 'print("offline" if os.environ.get("HF_HUB_OFFLINE") else "online", flush=True)\n'


def test_a_model_that_was_ready_once_is_started_without_the_hub_until_that_fails(tmp_path: Path) -> None:
    machine = Machine(tmp_path, engine=ENGINE.replace('print("starting"', MODE + 'print("starting"'))
    kept = machine.fleet / "model.log.old"
    with machine.running():
        machine.wait_until_ready()
        assert machine.model_log().startswith("online")
        wait_for("noted on the disk", (machine.fleet / "complete").exists)
    with machine.running():
        wait_for("ready offline", lambda: machine.model_log().startswith("offline") and machine.is_ready())
        (machine.fleet / "broken").touch()
        machine.kill(MODEL)
        wait_for("a start has failed offline", lambda: machine.model_log().startswith("online"))
        assert kept.read_text().startswith("offline")
        (machine.fleet / "broken").unlink()
        machine.wait_until_ready()
    other = replace(get_profile("vllm-13"), vllm_args="--revision other")
    machine.give(other)
    with machine.running():
        wait_for("another revision may lack files", lambda: machine.model_log().startswith("online"))


def test_a_version_without_serve_is_started_by_its_forerunner(tmp_path: Path) -> None:
    """So is a build whose package has no metadata: `vllm serve` asks for them."""
    machine = Machine(tmp_path)
    package = machine.image / "vllm" / "entrypoints"
    (package / "openai").mkdir()
    (package / "cli" / "main.py").rename(package / "openai" / "api_server.py")
    with machine.running():
        machine.wait_until_ready()
        assert "vllm.entrypoints.openai.api_server" in machine.processes()


def test_a_version_with_other_words_is_ready_when_it_answers(tmp_path: Path) -> None:
    machine = Machine(tmp_path, engine=ENGINE.replace("Application startup complete.", "Serving now"))
    with Ears() as ears:
        machine.give(get_profile("vllm-13"), ears.url)
        with machine.running():
            wait_for("our line", lambda: "\nfleet: the model server answers\n" in machine.model_log())
            wait_for("said", lambda: "ready" in [s["state"] for s in ears.heard(DIGEST)])
    assert "Serving now" in machine.model_log(), "nothing was written over"
    certificate = (machine.fleet / "tls.crt").read_text()
    assert {said["certificate"] for said in ears.heard(DIGEST)} == {certificate}


def test_nothing_outlives_a_killed_supervisor(machine: Machine) -> None:
    with machine.running() as running:
        wait_for("both run", lambda: len(machine.processes()) == 3)
        running.kill()
        running.wait()
        wait_for("the kernel has ended them", lambda: not machine.processes())


@pytest.mark.alone
def test_who_does_not_hear_sigterm_is_ended_in_the_ten_seconds_of_docker_stop(tmp_path: Path) -> None:
    machine = Machine(tmp_path, engine=STUBBORN)
    with machine.running() as running:
        machine.wait_until_ready()
        wait_for("all four run", lambda: len(machine.all_processes()) == 4)
        running.send_signal(signal.SIGTERM)
        assert ended_within(running, 10.0) < 10.0
        assert running.returncode == 0
        wait_for("the child's child is gone too", lambda: not machine.all_processes())


def test_what_a_dead_model_server_started_ends_before_the_next_one_starts(tmp_path: Path) -> None:
    """An engine process that stays would hold the memory of the GPU."""
    machine = Machine(tmp_path, engine=STUBBORN)

    def core() -> int:
        found = machine.model_log().partition("core ")[2].partition("\n")
        return int(found[0]) if found[1] else 0

    with machine.running() as running:
        first = wait_for("its core runs", core)
        (server,) = {pid for pid, module in machine.all_processes() if module == MODEL} - {first}
        os.kill(server, signal.SIGKILL)
        wait_for("another core", lambda: core() not in (0, first))
        assert first not in {pid for pid, _ in machine.all_processes()}
        running.kill()
        os.kill(core(), signal.SIGKILL)


def test_a_second_supervisor_in_one_home_leaves_the_first_alone(machine: Machine) -> None:
    with machine.running():
        first = wait_for("tokens", machine.tokens)
        second = subprocess.run(
            ["bash", str(machine.script)], env=machine.environ, capture_output=True, timeout=30, check=False
        )
        assert (second.returncode, b"another one runs here already" in second.stderr) == (1, True)
        assert wait_for("tokens", machine.tokens)["boot_id"] == first["boot_id"]


def test_what_cannot_be_started_is_started_later(machine: Machine) -> None:
    """As on a disk that is full for a while."""
    machine.fleet.mkdir()
    (machine.fleet / "auth.log").touch()
    in_the_way = machine.fleet / "auth.log.old"
    in_the_way.mkdir()
    with machine.running():
        machine.wait_until_ready()
        assert machine.tokens() is None
        in_the_way.rmdir()
        wait_for("tokens", machine.tokens)


def test_a_log_that_somebody_removed_costs_nothing(machine: Machine) -> None:
    with machine.running():
        machine.wait_until_ready()
        (machine.fleet / "model.log").unlink()
        machine.wait_for_another(MODEL, machine.kill(MODEL))
        machine.wait_until_ready()


def test_no_secret_of_an_instance_can_be_seen_by_others(machine: Machine) -> None:
    with machine.running():
        machine.wait_until_ready()
        (token,) = wait_for("tokens", machine.tokens)["tokens"]
        machine.ask(f"/load?after={token}")
        machine.ask(f"/nowhere/{MASTER}?key={MASTER}", b"x")
        keys = machine.fleet / "boot"
        secrets = [token, MASTER, (keys / "local.key").read_text()]
        for pid, module in machine.all_processes():
            for where in ("cmdline", "environ"):
                seen = Path(f"/proc/{pid}/{where}").read_text(errors="replace")
                assert not [s for s in secrets if s in seen], (module, where)
        for path in machine.fleet.rglob("*"):
            mode = path.stat().st_mode
            assert stat.S_IMODE(mode) & 0o077 == 0, path
            if path.is_file() and path.parent != keys:
                assert not [s for s in secrets if s in path.read_text(errors="replace")], path
        assert not [s for s in secrets if s in machine.log.read_text()]


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"


def test_strangers_at_the_auth_server_keep_its_owner_from_nothing(machine: Machine) -> None:
    """No connection without a request, no long head, and an offer of HTTP/2 loses no body."""
    with machine.running(), ExitStack() as stack:
        wait_for("tokens", machine.tokens)
        context = pinned_context((machine.fleet / "tls.crt").read_text())

        def connected() -> socket.socket:
            sock = socket.create_connection(("127.0.0.1", machine.auth_port), timeout=20.0)
            return stack.enter_context(context.wrap_socket(sock, server_hostname="127.0.0.1"))

        silent = [connected() for _ in range(150)]
        assert silent[0].recv(1) == b"", "the oldest have ended"
        body, key = b'{"count": 1}', b"Authorization: Bearer " + MASTER.encode() + b"\r\n"
        head = b"POST /tokens HTTP/1.1\r\nHost: i\r\nContent-Length: 12\r\n"
        owner = connected()
        for _ in range(2):
            owner.sendall(head + key + H2C + b"\r\n" + body)
            assert b'"tokens"' in owner.recv(65536) + owner.recv(65536)
        stranger = connected()
        stranger.sendall(head + b"\r\n")  # the body never comes
        answer = stranger.recv(65536)
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"connection: close" in answer
        long = connected()
        long.sendall(b"GET /health HTTP/1.1\r\nHost: i\r\nX: " + b"a" * 100_000)
        assert long.recv(65536).startswith(b"HTTP/1.1 400 ")
        assert machine.tokens()
