"""What a transport can be told, and what is refused."""

from typing import Any

import pytest

from fleet_client import AsyncFleetTransport, FleetTransport


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tries": 0},
        {"wait_s": -1},
        {"wait_s": float("nan")},
        {"connect_s": 0},
        {"ahead": 257},
        {"priority": "urgent"},
        {"affinity_salt": b"short"},
        {"affinity_salt": ""},
    ],
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any]) -> None:
    for kind in (FleetTransport, AsyncFleetTransport):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: wanted"):
            kind(**wrong)


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:8200", "ftp://x", "http://127.0.0.1:8200/route", "http://u:p@127.0.0.1", "http://[::1"],
)
def test_a_wrong_loadbalancer_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="wanted http://HOST:PORT"):
        FleetTransport(url)


def test_leases_do_not_travel_in_the_clear_unless_the_network_is_trusted() -> None:
    with pytest.raises(ValueError, match="leases in the clear"):
        AsyncFleetTransport("http://10.0.0.1:8200")
    AsyncFleetTransport("http://10.0.0.1:8200", trust_network=True)
    AsyncFleetTransport("https://lb.example")
    FleetTransport("http://[::1]:8200/").close()


def test_a_key_that_no_header_can_carry_is_refused_without_being_shown() -> None:
    with pytest.raises(ValueError, match=r"^api_key: wanted printable ASCII$"):
        FleetTransport(api_key="secret\r\nX: 1")


def test_a_salt_that_can_be_guessed_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_AFFINITY_SALT", "hello-world")
    with pytest.raises(ValueError, match=r"^affinity_salt: wanted at least 16 bytes, got 11$"):
        FleetTransport()
    FleetTransport(affinity=False).close()
