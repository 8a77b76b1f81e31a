"""Flags as fields of a settings dataclass, and how a command ends."""

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


@dataclass(frozen=True)
class Kettle:
    """Settings of a made-up command."""

    cups: int = flags.flag(2, "cups of water", least=1, most=8)
    boil_s: float = flags.flag(90.5, "seconds until it boils", least=0.0, most=600.0)
    lid: bool = flags.flag(True, "close the lid (default --lid)")
    loud: bool = flags.flag(False, "whistle")
    colour: str = flags.flag("red", "of the outside", choices=("red", "green", "blue"))
    log: Path | None = flags.flag(None, "where steam is noted (default: nowhere)")
    tea: tuple[str, ...] = flags.flag(("black",), "what to make; may be repeated")
    secret: str = "not a flag"


def parsed(*argv: str) -> Kettle:
    parser = flags.Parser(prog="kettle")
    flags.add_flags(parser, Kettle)
    return Kettle(**vars(parser.parse_args(argv)))


def test_a_flag_of_a_tuple_may_be_repeated_and_replaces_the_default() -> None:
    assert parsed("--tea", "green", "--tea", "mint").tea == ("green", "mint")
    assert parsed().tea == ("black",)


def test_some_fields_may_be_no_flags_of_a_command() -> None:
    parser = flags.Parser(prog="kettle")
    flags.add_flags(parser, Kettle, without={"lid", "loud"})
    assert not {"lid", "loud"} & vars(parser.parse_args([])).keys()


def test_each_field_is_a_flag_with_its_type_and_default() -> None:
    assert parsed() == Kettle()
    told = ["--cups", "3", "--boil-s", "1.5", "--no-lid", "--loud", "--colour", "blue", "--log", "a/b"]
    assert parsed(*told) == Kettle(3, 1.5, False, True, "blue", Path("a/b"))


def test_help_shows_meaning_and_default() -> None:
    parser = flags.Parser(prog="kettle")
    flags.add_flags(parser, Kettle)
    text = " ".join(parser.format_help().split())
    assert "--cups N cups of water (default 2)" in text
    assert "--boil-s S seconds until it boils (default 90.5)" in text
    assert "--log FILE where steam is noted (default: nowhere)" in text
    assert "--colour {red,green,blue} of the outside (default red)" in text
    assert "secret" not in text


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
