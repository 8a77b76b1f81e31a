"""Each unkindness of the local cloud is a field that can be switched on alone."""

from dataclasses import asdict, fields

import pytest

from localcloud.__main__ import main
from localcloud.realism import HARSH, MILD, NONE, Realism
from process.errors import ConfigError
from tests.commands import run_command

FIELDS = [f.name for f in fields(Realism)]


@pytest.mark.parametrize("name", FIELDS)
def test_an_unkindness_is_off_by_default_on_when_harsh_and_can_be_on_alone(name: str) -> None:
    alone = HARSH.only([name])
    assert getattr(NONE, name) != getattr(HARSH, name) == getattr(alone, name)
    assert {k: v for k, v in asdict(alone).items() if k != name} == {
        k: v for k, v in asdict(NONE).items() if k != name
    }


def test_what_is_mild_is_kind_or_somewhere_on_the_way_to_harsh() -> None:
    for name in FIELDS:
        kind, mild, harsh = (getattr(level, name) for level in (NONE, MILD, HARSH))
        if isinstance(kind, int | float) and isinstance(harsh, int | float):
            assert min(kind, harsh) <= mild <= max(kind, harsh), name
        else:
            assert mild in (kind, harsh), name


def test_an_unknown_unkindness_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unknown unkindness 'rain'; known: .*rate_limits"):
        HARSH.only(["rain"])


def test_a_wrong_flag_is_one_line(tmp_path: object) -> None:
    for flags, words in (
        (("--realism", "real"), "--realism real: wanted none, mild or harsh"),
        (("--only", "rain"), "--only: unknown unkindness 'rain'"),
    ):
        ended = run_command("localcloud", main, "--root", f"{tmp_path}/c", *flags)
        assert (ended.status, ended.err.count("\n")) == (2, 1)
        assert words in ended.err
