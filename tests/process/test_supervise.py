"""The supervisor: both programs of an instance run, what dies comes again, and nothing outlives it."""

import os
import signal
import socket
import stat
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from fleet_client.tls_pins import pinned_context
from remote import boot, events
from remote.events import Events
from remote.supervise import (
    DEATHS,
    EARLY_DEATHS,
    PAUSE_S,
    SETTLED_S,
    Deaths,
    Pause,
    model_command,
)
from tests.instance_home import AUTH, MASTER, MODEL, STUBBORN, Machine, ended_within
from tests.waiting import wait_for

# -- decisions ----------------------------------------------------------------------------------------


def test_a_model_server_that_never_gets_ready_is_given_up() -> None:
    deaths = Deaths()
    assert [deaths.died(False, 60.0 * n) is None for n in range(EARLY_DEATHS)] == [True] * (
        EARLY_DEATHS - 1
    ) + [False]


def test_a_model_server_that_was_ready_may_die_now_and_then() -> None:
    deaths = Deaths()
    assert all(deaths.died(True, 3600.0 * n) is None for n in range(20))


def test_a_model_server_that_dies_again_and_again_is_given_up() -> None:
    deaths = Deaths()
    assert [deaths.died(True, 10.0 * n) is None for n in range(DEATHS)] == [True] * (DEATHS - 1) + [False]


def test_the_pause_doubles_until_a_process_has_settled() -> None:
    pause = Pause()
    assert [pause.after(1.0) for _ in range(7)] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert [pause.after(SETTLED_S), pause.after(0.0)] == [PAUSE_S[0], 2 * PAUSE_S[0]]


def _command(args: list[str], **environ: str) -> list[str]:
    return model_command("/fleet", "vllm-13", "some/model", args, environ)  # type: ignore[arg-type]


def test_vllm_is_started_with_the_check_in_front() -> None:
    assert _command(["--max-model-len", "4096"])[1:] == [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", "some/model"),
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
