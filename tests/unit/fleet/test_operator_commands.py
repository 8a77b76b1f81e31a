"""The operator's commands, against the real routes on a loopback port."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from flask import Flask, Response, redirect
from rich.console import Console

import autoscaler_server
from fleet.holds import HoldKind
from fleet.outside.ledger import Ledger
from fleet.outside.operator_commands import ACT, SHOW, OperatorConfig, run_operator_command
from process.errors import ConfigError
from tests.ports import free_port
from tests.process.test_autoscaler_server import OPERATOR, Face
from tests.web_server import served


@pytest.fixture
def face(tmp_path: Path) -> Iterator[Face]:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    yield Face(ledger, tmp_path, operator=frozenset({OPERATOR}))
    ledger.close()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "operator.key"
    path.write_text(OPERATOR)
    path.chmod(0o600)
    return path


def run(
    command: str, face: Face, key: Path | None, of: int | str | None = None, as_json: bool = False
) -> str:
    console = Console(width=200, record=True, quiet=False)
    with served(face.app) as port, console.capture() as captured:
        config = OperatorConfig(autoscaler=f"http://127.0.0.1:{port}", operator_key_file=key, json=as_json)
        run_operator_command(command, of, config, console)
    return captured.get()


def hot_id(face: Face) -> int:
    found = next(i.id for i in face.world.fleet if i.label == face.hot_label)
    assert found is not None
    return found


def test_status_has_a_line_for_each_instance(face: Face, key_file: Path) -> None:
    shown = run("status", face, key_file)
    assert "2 hot" in shown
    for i in face.world.fleet:
        assert f"{i.id} " in shown
        assert str(i.state) in shown


def test_decisions_and_costs_are_shown(face: Face, key_file: Path) -> None:
    assert "Wanted:" in run("decisions", face, key_file)
    costs = run("costs", face, key_file)
    assert "hot working" in costs
    assert "total" in costs


@pytest.mark.parametrize("command", list(SHOW))
def test_each_is_json_where_that_is_wanted(
    face: Face, key_file: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, face, key_file, as_json=True) == ""
    assert json.loads(capsys.readouterr().out)


def test_what_is_done_by_hand_is_done(face: Face, key_file: Path) -> None:
    number = hot_id(face)
    assert f"drain: instance {number}" in run("drain", face, key_file, number)
    assert face.world.fleet[face.hot_label].taken_out
    assert "banned_hours 24" in run("ban", face, key_file, 4711)
    assert 4711 in face.world.fleet.market.bad_machines
    assert "was_banned True" in run("forgive", face, key_file, 4711)
    assert face.world.fleet.market.bad_machines == {}


def test_a_hold_is_told_and_manage_on_ends_it(face: Face, key_file: Path) -> None:
    holds = face.world.fleet.holds
    holds.set(HoldKind.DEPLOYMENT, "the model is gated", face.world.now)
    assert "NOT WELL: creates are held (deployment): the model is gated" in run("status", face, key_file)
    assert run("manage", face, key_file, "off") == "manage: off\n"
    assert (face.world.fleet.manage, len(holds)) == (False, 1)
    assert run("manage", face, key_file, "on") == "manage: on\n"
    assert (face.world.fleet.manage, len(holds)) == (True, 0)


@pytest.mark.parametrize(
    ("command", "number", "says"),
    [
        ("drain", 99, "404: the fleet has no instance 99"),
        ("destroy", 99, "404: the fleet has no instance 99"),
    ],
)
def test_what_was_not_done_is_one_line(
    face: Face, key_file: Path, command: str, number: int, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        run(command, face, key_file, number)


def test_without_the_key_it_is_refused_in_one_line(face: Face) -> None:
    with pytest.raises(ConfigError, match="answers 401: this route needs"):
        run("status", face, None)


def test_where_nobody_answers_it_says_so() -> None:
    config = OperatorConfig(autoscaler=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match="does not answer"):
        run_operator_command("status", None, config)


def test_the_key_does_not_follow_a_redirect(key_file: Path) -> None:
    app, seen = Flask("elsewhere"), []

    @app.get("/overview")
    def overview() -> Response:
        return redirect("/stolen")  # type: ignore[return-value]

    @app.get("/stolen")
    def stolen() -> str:
        seen.append(1)
        return "{}"

    app.config["LARGE_BODIES"] = {}
    with served(app) as port, pytest.raises(ConfigError, match="answers 302"):
        run_operator_command(
            "status", None, OperatorConfig(autoscaler=f"http://127.0.0.1:{port}", operator_key_file=key_file)
        )
    assert seen == []


def test_a_key_goes_unencrypted_to_another_machine_only_where_that_is_allowed(key_file: Path) -> None:
    config = OperatorConfig(autoscaler="http://10.0.0.1:8100", operator_key_file=key_file)
    with pytest.raises(ConfigError, match="--trust-network"):
        run_operator_command("status", None, config)


def test_each_command_has_its_flags_and_its_number() -> None:
    parse = autoscaler_server.parser().parse_args
    for name in SHOW:
        assert parse([name, "--json"]).json is True
    for name in ACT:
        assert parse([name, "17"]).of == 17
    assert parse(["manage", "on"]).of == "on"


# -- past the autoscaler, over the operator's own ssh --------------------------------------------------


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ssh that writes down how it was called, and the host keys that it was given; it ends with 7."""
    tools = tmp_path / "bin"
    tools.mkdir()
    said = tmp_path / "said"
    program = tools / "ssh"
    program.write_text(
        f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {said}\n"
        f'for one in "$@"; do case "$one" in UserKnownHostsFile=*) cat "${{one#*=}}" >> {said};; esac; done\n'
        "exit 7\n"
    )
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return said


@pytest.mark.parametrize(("command", "remote"), [("logs", "tail -n 100 -F"), ("ssh", None)])
def test_logs_and_ssh_go_to_the_instance_itself_by_the_host_key_seen_first(
    face: Face, key_file: Path, tmp_path: Path, fake_ssh: Path, command: str, remote: str | None
) -> None:
    number = hot_id(face)
    face.scaler.remember_host_key(face.hot_label, "ssh-ed25519 AAAAkey")
    host, port = face.world.fleet[face.hot_label].ssh or ("", 0)
    (tmp_path / "ssh_ed25519").write_text("key")
    with served(face.app) as at:
        config = OperatorConfig(f"http://127.0.0.1:{at}", operator_key_file=key_file, state_dir=tmp_path)
        with pytest.raises(SystemExit, match="7"):
            run_operator_command(command, number, config)
    said = fake_ssh.read_text()
    assert f"[{host}]:{port} ssh-ed25519 AAAAkey" in said
    assert f"root@{host}" in said
    assert "StrictHostKeyChecking=yes" in said
    assert (remote is None and "tail" not in said) or (remote is not None and remote in said)


def test_an_instance_that_cannot_be_reached_is_said_so(face: Face, key_file: Path, tmp_path: Path) -> None:
    with served(face.app) as at:
        config = OperatorConfig(f"http://127.0.0.1:{at}", operator_key_file=key_file, state_dir=tmp_path)
        with pytest.raises(ConfigError, match="the fleet has no instance 4711"):
            run_operator_command("logs", 4711, config)
        with pytest.raises(ConfigError, match="ssh_ed25519 is missing"):
            run_operator_command("logs", hot_id(face), config)


def test_status_says_which_machines_are_not_rented_and_decisions_what_was_done_by_hand(
    face: Face, key_file: Path
) -> None:
    run("ban", face, key_file, 4711)
    assert "machine 4711 is not rented until" in run("status", face, key_file)
    assert "ban machine 4711 for 24 h" in run("decisions", face, key_file)
