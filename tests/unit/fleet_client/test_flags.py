"""Flags as fields of a settings dataclass, and how a command ends."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fleet_client import flags
from process.errors import ConfigError


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (None, 0, ""),
        (ConfigError("--port 0: wanted 1"), 2, "--port 0: wanted 1\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["fine", "config-error", "ctrl-c"],
)
def test_a_main_ends_with_one_line_at_most(
    fault: BaseException | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        if fault is not None:
            raise fault

    with pytest.raises(SystemExit) as ended:
        flags.run_main(main)
    assert ended.value.code == code
    assert capsys.readouterr().err.endswith(said)
    assert capsys.readouterr().err.count("\n") <= 1


def floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


@dataclass(frozen=True)
class Kettle:
    """Settings of a made-up command."""

    cups: int = flags.flag(2, "cups of water", least=1, most=8)
    boil_s: float = flags.flag(90.5, "seconds until it boils", least=0.0, most=600.0)
    lid: bool = flags.flag(True, "close the lid")
    loud: bool = flags.flag(False, "whistle")
    colour: str = flags.flag("red", "of the outside", choices=("red", "green", "blue"))
    log: Path | None = flags.flag(None, "where steam is noted", shown="nowhere")
    heat: bool | None = flags.flag(None, "heat it", shown="as it is")
    shape: tuple[float, ...] = flags.flag((1.0,), "of the spout", read=floats, unit="cm")
    tea: tuple[str, ...] = flags.flag(("black",), "what to make; may be repeated")
    secret: str = "not a flag"


def kettle(without: Collection[str] = ()) -> flags.Parser:
    parser = flags.Parser(prog="kettle", environment="KETTLE_")
    flags.add_flags(parser, Kettle, without)
    return parser


def parsed(*argv: str, without: Collection[str] = ()) -> Kettle:
    return Kettle(**vars(kettle(without).parse_args(argv)))


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "kettle.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_flag_of_a_tuple_may_be_repeated_and_replaces_the_default() -> None:
    assert parsed("--tea", "green", "--tea", "mint").tea == ("green", "mint")
    assert parsed().tea == ("black",)


def test_some_fields_may_be_no_flags_of_a_command() -> None:
    assert not {"--lid", "--loud"} & set(kettle({"lid", "loud"}).format_help().split())
    with pytest.raises(ConfigError, match="unrecognized arguments: --loud"):
        parsed("--loud", without={"loud"})


def test_each_field_is_a_flag_with_its_type_and_default() -> None:
    assert parsed() == Kettle()
    told = ["--cups", "3", "--boil-s", "1.5", "--no-lid", "--loud", "--colour", "blue", "--log", "a/b"]
    told += ["--no-heat", "--shape", "1,2.5"]
    assert parsed(*told) == Kettle(3, 1.5, False, True, "blue", Path("a/b"), False, (1.0, 2.5))


def test_only_what_was_given_is_told() -> None:
    assert vars(kettle().parse_args([])) == {}
    assert vars(kettle().parse_args(["--cups", "2"])) == {"cups": 2}


def test_help_shows_meaning_range_and_default() -> None:
    text = " ".join(kettle().format_help().split())
    assert "usage: kettle [flags]" in text
    assert "--cups N cups of water (1 to 8; default 2)" in text
    assert "--boil-s S seconds until it boils (0 to 600; default 90.5)" in text
    assert "--lid, --no-lid close the lid (default on)" in text
    assert "--log FILE where steam is noted (default nowhere)" in text
    assert "--heat, --no-heat heat it (default as it is)" in text
    assert "--colour red|green|blue of the outside (default red)" in text
    assert "environment, as KETTLE_PORT" in text
    assert "secret" not in text


FULL = """
cups = 3
boil-s = 100
lid = false
loud = true
colour = "green"
log = "steam.txt"
tea = ["green", "mint"]
heat = true
shape = "1,2"
"""


@pytest.mark.parametrize("text", [FULL, FULL.replace("\n", "\r\n"), "\ufeff" + FULL, FULL.replace("-", "_")])
def test_a_file_may_say_each_flag(file: Callable[[str], Path], text: str) -> None:
    found = parsed("--config", str(file(text)))
    assert found == Kettle(
        3, 100.0, False, True, "green", Path("steam.txt"), True, (1.0, 2.0), ("green", "mint")
    )
    assert isinstance(found.boil_s, float)


def test_the_environment_may_say_each_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "CUPS": "3",
        "BOIL_S": "100",
        "LID": "false",
        "LOUD": "1",
        "COLOUR": "green",
        "LOG": "~/steam.txt",
    }
    for name, value in (said | {"HEAT": "Yes", "SHAPE": "1,2", "TEA": "green mint"}).items():
        monkeypatch.setenv(f"KETTLE_{name}", value)
    steam = Path.home() / "steam.txt"
    assert parsed() == Kettle(3, 100.0, False, True, "green", steam, True, (1.0, 2.0), ("green", "mint"))


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(
    file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file("cups = 3\nboil-s = 30\ntea = ['file']\nlid = false\nloud = true")
    monkeypatch.setenv("KETTLE_CONFIG", str(path))
    monkeypatch.setenv("KETTLE_BOIL_S", "40")
    monkeypatch.setenv("KETTLE_TEA", "environment too")
    monkeypatch.setenv("KETTLE_COLOUR", "")  # says nothing
    found = parsed("--tea", "mint", "--lid")
    assert found == Kettle(cups=3, boil_s=40.0, tea=("mint",), lid=True, loud=True)
    other = file("cups = 4").rename(path.with_name("other.toml"))
    assert parsed("--config", str(other)).cups == 4


def test_a_file_may_have_flags_of_other_commands_of_the_program(file: Callable[[str], Path]) -> None:
    assert parsed("--config", str(file("lid = false\ncups = 3")), without={"lid"}) == Kettle(cups=3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cup = 3", "{}: cup is not known; the nearest name is cups"),
        ("boil_seconds = 3", "{}: boil_seconds is not known; the nearest name is boil-s"),
        ("secret = 'x'", "{}: secret is not known; the nearest name is "),
        ("cups = 0", "{}: cups = 0: wanted 1 to 8"),
        ("cups = '3'", "{}: cups = 3: wanted a whole number"),
        ("cups = 3.0", "{}: cups = 3.0: wanted a whole number"),
        ("cups = true", "{}: cups = True: wanted a whole number"),
        ("cups = [3]", "{}: cups = [3]: wanted a whole number"),
        ("boil-s = nan", "{}: boil-s = nan: wanted 0 to 600"),
        ("boil-s = false", "{}: boil-s = False: wanted a number"),
        ("lid = 1", "{}: lid = 1: wanted true or false"),
        ("lid = 'true'", "{}: lid = true: wanted true or false"),
        ("colour = 'pink'", "{}: colour = pink: wanted red, green or blue"),
        ("log = 3", "{}: log = 3: wanted the path of a file"),
        ("tea = [1]", "{}: tea = 1: wanted a text"),
        ("shape = '1,x'", "{}: shape = 1,x: wanted "),
        ("[cups]\nx = 1", "{}: cups = {{'x': 1}}: wanted a whole number"),
        ("boil-s = 1\nboil_s = 2", "{}: boil-s and boil_s are the same name"),
        ("cups = 3\ncups = 4", "{}: Cannot overwrite a value (at "),
        ("cups = ", "{}: Invalid value (at end of document)"),
        (b"cups = 3\ncolour = '\xff'", "the file of --config {}, line 2: not text in UTF-8"),
        ("cups = 3".encode("utf-16"), "the file of --config {}, line 1: it is UTF-16 or UTF-32"),
    ],
)
def test_what_a_file_gets_wrong_is_said_with_file_and_name(
    file: Callable[[str | bytes], Path], text: str | bytes, said: str
) -> None:
    path = file(text)
    with pytest.raises(ConfigError) as refused:
        parsed("--config", str(path), "--cups", "3")
    assert str(refused.value).startswith(said.format(path))


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the file of --config .*none\.toml cannot be read: No such file"):
        parsed("--config", str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("KETTLE_CUPS", "9", "KETTLE_CUPS=9: wanted 1 to 8"),
        ("KETTLE_CUPS", "tcp://10.0.0.1:80", "KETTLE_CUPS=tcp://10.0.0.1:80: wanted a whole number"),
        ("KETTLE_LID", "perhaps", "KETTLE_LID=perhaps: wanted true or false"),
        ("KETTLE_COLOUR", "pink", "KETTLE_COLOUR=pink: wanted red, green or blue"),
        ("KETTLE_COLOR", "red", "KETTLE_COLOR is not known; the nearest name is KETTLE_COLOUR"),
        (
            "KETTLE_LOG",
            "~nobody-of-that-name/x",
            "KETTLE_LOG=~nobody-of-that-name/x: wanted the path of a file",
        ),
    ],
)
def test_what_the_environment_gets_wrong_is_said_with_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refused:
        parsed()
    assert str(refused.value) == said


def test_variables_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KETTLE_SERVICE_HOST", "KETTLE_PORT_8100_TCP_ADDR", "KETTLE_API_KEY", "TEAKETTLE_CUPS"):
        monkeypatch.setenv(name, "x")
    assert parsed() == Kettle()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"cups": 0}, "--cups 0: wanted 1 to 8"),
        ({"boil_s": float("nan")}, "--boil-s nan: wanted 0 to 600"),
        ({"colour": "pink"}, "--colour pink: wanted red, green or blue"),
    ],
)
def test_a_wrong_value_names_flag_and_range(wrong: dict[str, Any], said: str) -> None:
    flags.check_flags(Kettle())
    with pytest.raises(ConfigError, match=said):
        flags.check_flags(Kettle(**wrong))
