"""Secret variables and registry logins on their way to the cloud: nobody beside it sees them.

The real vastai command runs; while the service has its request, every process of the computer is looked at.
"""

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import autoscaler_server
from fleet.outside.config import AutoscalerConfig
from process.errors import ConfigError
from tests.commands import Exited, run_command
from tests.process.test_vast_cli import ASK, Answer, FakeApi, api, real  # noqa: F401 api is a fixture
from tests.vast_answers import create
from vast.account_secrets import RegistryLogin, SecretVariables
from vast.cli import Cli
from vast.errors import ApiError
from vast.settings import VastSettings

TOKEN = "hf_QwertyUiopAsdfGhjkl.42"
NAMES, VARIABLES = "GET /api/v0/secrets/", "/api/v0/secrets/"
KEY = "k-0123456789abcdef0123456789"


def command_lines() -> Iterator[bytes]:
    """The command line of every process there is."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):
                yield (process / "cmdline").read_bytes()


class Watch:
    """Looks, while the service has a request, whether a text is in some command line."""

    def __init__(self, secret: str) -> None:
        self.looked = 0
        self.shown: list[bytes] = []
        self._secret = secret.encode()

    def __call__(self) -> None:
        self.looked += 1
        self.shown += [line for line in command_lines() if self._secret in line]


@pytest.fixture
def variables(api: FakeApi, tmp_path: Path) -> SecretVariables:  # noqa: F811
    return SecretVariables(
        Cli(VastSettings(state_dir=tmp_path, api_key=KEY, url=api.url, local=True, speedup=1000.0))
    )


def leaked(folder: Path, secret: str) -> list[Path]:
    """The files below a folder that have the text."""
    return [p for p in folder.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


def test_a_look_finds_what_is_in_a_command_line(api: FakeApi, tmp_path: Path) -> None:  # noqa: F811
    """The label is an argument: so the test below can fail."""
    api.look = watch = Watch("fleet/a")
    api.on(ASK, Answer(body={"success": True, "new_contract": 1001}))
    create(real(api, tmp_path))
    assert watch.looked == 1
    assert watch.shown


@pytest.mark.parametrize(("there", "method"), [({}, "POST"), ({"HF_TOKEN": "old"}, "PUT")])
def test_a_secret_variable_reaches_the_service_and_nothing_else(
    api: FakeApi,  # noqa: F811
    variables: SecretVariables,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    there: dict[str, str],
    method: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    api.look = watch = Watch(TOKEN)
    api.on(NAMES, Answer(body={"success": True, "secrets": there}))
    api.on(f"{method} {VARIABLES}", Answer(body={"success": True, "msg": "Environment variable added"}))
    variables.set("HF_TOKEN", TOKEN)
    assert api.requests[-1].body == {"key": "HF_TOKEN", "value": TOKEN}
    assert api.requests[-1].authorization == f"Bearer {KEY}"
    assert (watch.looked, watch.shown) == (2, [])
    assert TOKEN not in caplog.text
    assert leaked(tmp_path, TOKEN) == []


def test_a_service_that_echoes_a_secret_does_not_bring_it_into_the_error(
    api: FakeApi,  # noqa: F811
    variables: SecretVariables,
) -> None:
    api.on(NAMES, Answer(body={"success": True, "secrets": {}}))
    api.on(f"POST {VARIABLES}", Answer(400, {"success": False, "msg": f"bad value {TOKEN} given"}))
    with pytest.raises(ApiError) as raised:
        variables.set("HF_TOKEN", TOKEN)
    assert "bad value [secret] given" in str(raised.value)
    assert TOKEN not in repr(vars(raised.value))
    api.on(f"POST {VARIABLES}", Answer(body={"success": False, "msg": f"no room for {TOKEN}"}))
    with pytest.raises(ApiError, match=r"no room for \[secret\]"):
        variables.set("HF_TOKEN", TOKEN)


@pytest.mark.parametrize("value", ["", "two words", "line\nbreak", "quo'te", "ümlaut", "x" * 5000])
def test_a_value_that_the_service_does_not_take_is_refused_unsent_and_unshown(
    api: FakeApi,  # noqa: F811
    variables: SecretVariables,
    value: str,
) -> None:
    with pytest.raises(ValueError, match="HF_TOKEN: the service takes") as raised:
        variables.set("HF_TOKEN", value)
    assert not value or value not in str(raised.value)
    with pytest.raises(ValueError, match="capitals"):
        variables.set("hf token", "x")
    assert api.requests == []


def test_names_are_listed_without_values_and_deleted(
    api: FakeApi,  # noqa: F811
    variables: SecretVariables,
) -> None:
    api.on(NAMES, Answer(body={"success": True, "secrets": {"HF_TOKEN": TOKEN, "A": "b"}}))
    assert variables.names() == ["A", "HF_TOKEN"]
    api.on(f"DELETE {VARIABLES}", Answer(body={"success": True, "msg": "Operation completed successfully"}))
    variables.delete("HF_TOKEN")
    assert api.requests[-1].body == {"key": "HF_TOKEN"}


def test_a_registry_login_reaches_the_service_with_the_create_and_nothing_else(
    api: FakeApi,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    api.look = watch = Watch("p4ss-w0rd!")
    login = RegistryLogin("anna", "p4ss-w0rd!", "ghcr.io")
    vast = real(api, tmp_path)
    api.on(ASK, Answer(body={"success": True, "new_contract": 1001}))
    assert create(vast, login=login, onstart="echo hi\n") == 1001
    (request,) = api.requests
    assert request.body["image_login"] == "-u anna -p p4ss-w0rd! ghcr.io"
    assert (request.body["onstart"], request.body["cancel_unavail"]) == ("echo hi\n", True)
    assert (watch.looked, watch.shown) == (1, [])
    api.on(ASK, Answer(400, {"success": False, "msg": "login -u anna -p p4ss-w0rd! failed"}))
    with pytest.raises(ApiError) as raised:
        create(vast, login=login)
    assert "p4ss-w0rd!" not in str(raised.value) + caplog.text + repr(login)
    assert leaked(tmp_path, "p4ss-w0rd!") == []


@pytest.mark.parametrize(
    "wrong", [("a b", "s3cr3t", ""), ("a", "", ""), ("a", "s3'cr3t", ""), ("a", "s3cr3t", "c d")]
)
def test_a_login_that_the_service_would_misread_is_refused_unshown(wrong: tuple[str, str, str]) -> None:
    with pytest.raises(ValueError, match="registry login") as raised:
        RegistryLogin(*wrong)
    assert "cr3t" not in str(raised.value)


# -- the command ---------------------------------------------------------------------------------------


@pytest.fixture
def command(
    api: FakeApi,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Exited]:
    """Runs `autoscaler_server.py secrets …` with something on its standard input."""
    monkeypatch.setenv("LOCALCLOUD_API_KEY", KEY)

    def run(*argv: str, given: str = "") -> Exited:
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        where = (
            "--local",
            "--cloud-url",
            api.url,
            "--speedup",
            "1000",
            "--state-dir",
            str(tmp_path / "state"),
        )
        return run_command("autoscaler_server.py", autoscaler_server.main, "secrets", *argv, *where)

    return run


def test_the_command_sets_lists_and_deletes_and_shows_no_value(
    api: FakeApi,  # noqa: F811
    command: Callable[..., Exited],
    tmp_path: Path,
) -> None:
    api.on(NAMES, Answer(body={"success": True, "secrets": {}}))
    api.on(f"POST {VARIABLES}", Answer(body={"success": True, "msg": "added"}))
    ended = command("set", "HF_TOKEN", given=TOKEN + "\n")
    assert ended.status == 0
    assert "HF_TOKEN is set: every container that this account" in ended.out
    assert api.requests[-1].body == {"key": "HF_TOKEN", "value": TOKEN}
    assert TOKEN not in ended.out + ended.err
    assert leaked(tmp_path, TOKEN) == []
    api.on(NAMES, Answer(body={"success": True, "secrets": {"HF_TOKEN": TOKEN}}))
    assert command("list").out == "HF_TOKEN\n"
    api.on(f"DELETE {VARIABLES}", Answer(body={"success": True, "msg": "done"}))
    assert "HF_TOKEN is deleted" in command("delete", "HF_TOKEN").out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("set",), "wanted a name, as HF_TOKEN"),
        (("list", "HF_TOKEN"), "wanted no name"),
        (("set", "HF_TOKEN"), "HF_TOKEN: the service takes"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(
    command: Callable[..., Exited], argv: tuple[str, ...], says: str
) -> None:
    ended = command(*argv, given="")
    assert ended.status == 2
    assert says in ended.err
    assert "Traceback" not in ended.err


def test_a_key_without_the_permission_is_told_in_one_line(
    api: FakeApi,  # noqa: F811
    command: Callable[..., Exited],
) -> None:
    api.on(NAMES, Answer(401, {"success": False, "error": "auth_error", "msg": "Invalid user key"}))
    ended = command("list")
    assert ended.status == 2
    assert "the cloud did not do it" in ended.err
    assert "Invalid user key" in ended.err


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        ("anna p4ss ghcr.io\n", 0o600, None),
        ("anna p4ss ghcr.io\n", 0o644, "can be read by others"),
        ("anna\n", 0o600, "wanted one line, USER PASSWORD"),
        ("anna p4'ss\n", 0o600, "registry login, password"),
    ],
)
def test_a_registry_login_is_a_file_that_others_cannot_read(
    tmp_path: Path, text: str, mode: int, says: str | None
) -> None:
    path = tmp_path / "login"
    path.write_text(text)
    path.chmod(mode)
    config = AutoscalerConfig(registry_login=path)
    if says is None:
        assert config.login() == RegistryLogin("anna", "p4ss", "ghcr.io")
        return
    with pytest.raises(ConfigError, match=says) as raised:
        config.login()
    assert "p4" not in str(raised.value).replace(str(path), "")
