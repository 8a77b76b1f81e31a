"""Which service is asked with which key, and which settings are refused."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from process.errors import ConfigError
from tests.vast_answers import KEY
from vast.settings import VastSettings, find_api_key

LOCAL = VastSettings(state_dir=Path("state"), api_key=KEY, url="http://127.0.0.1:9", local=True)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"local": True, "url": None}, "loopback"),
        ({"local": True, "url": "https://console.vast.ai"}, "loopback"),
        ({"local": True, "url": "https://127.0.0.1.evil.org"}, "loopback"),
        ({"local": True, "url": "http://localhost@evil.org"}, "without a slash"),
        ({"local": True, "url": "http://127.0.0.1:8500/"}, "without a slash"),
        ({"local": True, "url": "http://127.0.0.1:8500/api"}, "without a slash"),
        ({"local": True, "url": "http://127.0.0.1:99999"}, "http://127.0.0.1:PORT"),
        ({"local": True, "url": "127.0.0.1:8500"}, "http://127.0.0.1:PORT"),
        ({"local": True, "url": "http://10.0.0.1:8500"}, "unencrypted"),
        ({"local": False, "url": "http://console.vast.ai"}, "unencrypted"),
        ({"local": False, "url": None, "speedup": 30.0}, "local cloud only"),
        ({"speedup": 0.5}, "1 or more"),
        ({"speedup": float("nan")}, "1 or more"),
        ({"api_key": ""}, "API key"),
        ({"api_key": "two words"}, "API key"),
    ],
)
def test_settings_that_would_ask_the_wrong_service_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        replace(LOCAL, **changed)
    assert words in str(raised.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8500", "http://localhost:8500", "http://[::1]:8500"])
def test_a_loopback_url_is_accepted(url: str) -> None:
    assert replace(LOCAL, url=url).url == url


def test_the_command_is_the_one_beside_this_python(tmp_path: Path) -> None:
    settings = VastSettings(state_dir=tmp_path, api_key=KEY)
    assert settings.executable == [str(Path(sys.executable).with_name("vastai"))]


def test_the_key_is_found_where_the_cli_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vastai set api-key"):
        find_api_key({"VAST_API_KEY": " "}, tmp_path)
    (tmp_path / ".vast_api_key").write_text("legacy\n")
    assert find_api_key({}, tmp_path) == "legacy"
    (tmp_path / ".config" / "vastai").mkdir(parents=True)
    (tmp_path / ".config" / "vastai" / "vast_api_key").write_text("set\n")
    assert find_api_key({}, tmp_path) == "set"
    assert find_api_key({"VAST_API_KEY": "given\n"}, tmp_path) == "given"
    elsewhere = tmp_path / "xdg" / "vastai"
    elsewhere.mkdir(parents=True)
    (elsewhere / "vast_api_key").write_text("xdg\n")
    assert find_api_key({"XDG_CONFIG_HOME": str(tmp_path / "xdg")}, tmp_path) == "xdg"


@pytest.mark.parametrize(
    "raw", [b"\xef\xbb\xbfk3y\r\n", b"# of the team's account\n\nk3y\n"], ids=["mark", "comment"]
)
def test_a_key_file_that_an_editor_wrote_is_understood(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / ".vast_api_key").write_bytes(raw)
    assert find_api_key({}, tmp_path) == "k3y"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("clé\n".encode(), "line 1: wanted one key of printable ASCII"),
        (b"k3y # mine\n", "line 1: wanted one key of printable ASCII"),
        (b"k3y\nother\n", "wanted one key, got 2"),
        ("k3y".encode("utf-16"), "line 1: it is UTF-16"),
        (b"\n\xff\n", "line 2: not text in UTF-8"),
    ],
)
def test_what_is_no_key_is_refused_with_file_and_line(tmp_path: Path, raw: bytes, said: str) -> None:
    file = tmp_path / ".vast_api_key"
    file.write_bytes(raw)
    with pytest.raises(ConfigError, match=f"the Vast.ai key file {file}(, |: ){said}"):
        find_api_key({}, tmp_path)


def test_a_key_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / ".vast_api_key").mkdir()
    with pytest.raises(ConfigError, match="vast_api_key"):
        find_api_key({}, tmp_path)
