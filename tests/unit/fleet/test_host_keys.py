"""Whose ssh host key is believed: the first one, and another only where the container is a new one."""

from dataclasses import replace

import pytest

from engine.profiles import get_profile
from fleet.host_keys import ROUNDED_S, HostKeys
from fleet.instance import Instance
from fleet.states import State
from tests.fleet_world import Contract
from web.messages.reports import ReadyBody

PROFILE = get_profile("vllm-13")
PEM = "-----BEGIN CERTIFICATE-----\nA\n-----END CERTIFICATE-----\n"
T = 1_000_000.0
ROW = Contract(1, "f/a", 7, 0.3, "running").row()


def instance() -> Instance:
    """One that was ordered and came up long before T."""
    i = Instance("f/a", State.RUNNING, T - 900.0, "", T - 1000.0, id=1)
    i.come_up(T - 900.0)
    return i


def shown(keys: HostKeys, i: Instance | None, key: str, now: float) -> str | None:
    """The key that is believed once that one is shown."""
    keys.show("f/a", key, i, now)
    return keys.get("f/a")


def test_the_first_key_is_believed_and_another_is_not() -> None:
    keys, i = HostKeys(), instance()
    assert keys.show("f/a", "first", i, T), "new: to be saved"
    assert not keys.show("f/a", "first", i, T + 60.0)
    assert shown(keys, i, "second", T + 120.0) == "first"
    assert shown(keys, None, "second", T + 120.0) == "first", "nor of one that is not known any more"
    assert list(keys) == [("f/a", "first")]


def test_a_signed_word_of_a_newer_boot_makes_another_key_believed_once() -> None:
    keys, i = HostKeys(), instance()
    i.hear(ReadyBody("ready", "boot-1", 1, "", PEM), T)
    assert shown(keys, i, "first", T) == "first"
    assert shown(keys, i, "second", T + 10.0) == "first", "the same boot: somebody else answers"
    i.hear(ReadyBody("ready", "boot-2", 2, "", PEM), T + 20.0)
    assert shown(keys, i, "second", T + 30.0) == "second"
    assert shown(keys, i, "third", T + 40.0) == "second"


def test_a_word_without_a_certificate_says_nothing_of_keys() -> None:
    """It comes from an older start script, whose signature covers no certificate."""
    keys, i = HostKeys(), instance()
    shown(keys, i, "first", T)
    i.hear(ReadyBody("ready", "boot-2", 2), T + 20.0)
    assert shown(keys, i, "second", T + 30.0) == "first"


@pytest.mark.parametrize(
    ("age_s", "ordered", "believed"),
    [
        (100.0, False, "second"),  # made anew by its host, as the listing says
        (1000.0 - ROUNDED_S, False, "first"),  # ages are in minutes
        (100.0, True, "first"),  # started by us: its disk has stayed, and so has its key
        (None, False, "first"),
    ],
)
def test_a_younger_container_that_we_did_not_start_makes_another_key_believed(
    age_s: float | None, ordered: bool, believed: str
) -> None:
    keys, i = HostKeys(), instance()
    shown(keys, i, "first", T)
    if ordered:
        i.order_start(T + 800.0)
    i.read_row(replace(ROW, up_s=age_s), PROFILE, T + 1000.0)
    assert shown(keys, i, "second", T + 1001.0) == believed


def test_keys_of_an_earlier_process_need_a_word_to_be_replaced() -> None:
    keys, i = HostKeys(), instance()
    keys.restore({"f/a": "first"})
    i.read_row(replace(ROW, up_s=10.0), PROFILE, T)
    assert shown(keys, i, "second", T) == "first"
    i.hear(ReadyBody("ready", "boot-2", 2, "", PEM), T)
    assert shown(keys, i, "second", T) == "second"
