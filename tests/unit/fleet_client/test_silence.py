"""An instance that falls silent: the loadbalancer is asked, and what it has given up is not waited for."""

import json
from typing import Any

import httpx2
import openai
import pytest

from fleet_client import connection_pool, loop_side, thread_transport
from fleet_client.leases import Refusal, read_well
from tests.fake_fleet import FakeFleet, FakeLoadbalancer, Out, Seen
from tests.unit.fleet_client.users import ALL, Make, plan, silent, stall, told


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long."""
    for module in (connection_pool, loop_side):
        monkeypatch.setattr(module, "SILENT_S", 0.2)
        monkeypatch.setattr(module, "LOOK_S", 0.1)
    monkeypatch.setattr(thread_transport, "ASKED_S", 0.05)


class Well:
    """What the loadbalancer says of instances, and what it was asked."""

    def __init__(self, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[list[int]] = []
        self.status = 200
        self.out: dict[int, str] = {}
        self._fleet = fleet
        monkeypatch.setattr(fleet.loadbalancer, "act", self._act)

    def all_out(self, why: str) -> None:
        """Say of every instance that it is out."""
        self.out = {instance.number: why for instance in self._fleet.instances}

    async def _act(self, seen: Seen, out: Out) -> None:
        if seen.target != "/well":
            await FakeLoadbalancer.act(self._fleet.loadbalancer, seen, out)
            return
        asked = seen.json["instances"]
        self.asked.append(asked)
        said = {str(one): self.out[one] for one in asked if one in self.out}
        await out.answer(self.status, {"out": said})


@pytest.fixture
def well(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> Well:
    """The loadbalancer, which can be asked."""
    return Well(fleet, monkeypatch)


def test_before_the_first_byte_another_instance_is_tried(user: Make, fleet: FakeFleet, well: Well) -> None:
    plan(fleet, silent)
    well.all_out("silent")
    assert user(fleet.url).stream() == ALL
    assert told(fleet) == [("failed", "instance_out")]
    assert fleet.loadbalancer.routes[1]["avoid"] == [fleet.loadbalancer.given[0].instance_id]
    assert well.asked == [[fleet.loadbalancer.given[0].instance_id]]


def test_after_the_first_byte_the_stream_ends_with_an_error(user: Make, fleet: FakeFleet, well: Well) -> None:
    plan(fleet, stall)
    well.all_out("not_hot")
    with pytest.raises((openai.APIConnectionError, httpx2.RemoteProtocolError)) as e:
        user(fleet.url).stream()
    assert "went out while it answered (not_hot): send the request again" in f"{e.value} {e.value.__cause__}"
    assert told(fleet) == [("failed", "instance_out")]


@pytest.mark.parametrize("act", [silent, stall])
@pytest.mark.parametrize("how", ["well", "other", "old loadbalancer"])
def test_as_long_as_it_is_not_known_to_be_out_it_is_waited_for(
    user: Make, fleet: FakeFleet, well: Well, act: Any, how: str
) -> None:
    if how == "other":
        well.out = {77: "silent"}
    elif how == "old loadbalancer":
        well.all_out("silent")
        well.status = 404
    plan(fleet, act)
    with pytest.raises((openai.APITimeoutError, httpx2.ReadTimeout)):
        user(fleet.url).stream(timeout=1.0)
    assert len(well.asked) >= 2
    assert told(fleet) == [("failed", "read_timeout")]


def test_many_that_wait_ask_together(user: Make, fleet: FakeFleet, well: Well) -> None:
    plan(fleet, *[silent] * 16)
    well.all_out("silent")
    assert user(fleet.url, max_tries=32).streams(16) == [ALL] * 16
    assert len(well.asked) <= 16


def test_an_answer_that_keeps_coming_asks_nothing(user: Make, fleet: FakeFleet, well: Well) -> None:
    for instance in fleet.instances:
        instance.pause_s = 0.1  # 0.5 s in all
    well.all_out("silent")
    assert user(fleet.url).stream() == ALL
    assert well.asked == []


@pytest.mark.parametrize(
    ("said", "out"),
    [
        ((200, b'{"out": {"7": "silent"}}', None), {7: "silent"}),
        ((200, json.dumps({"out": {"7": ["x"] * 99, "a": "b", "-1": "c"}}).encode(), None), {7: "['x', 'x'"}),
        ((200, b'{"out": ["7"]}', None), {}),
        ((200, b"[]", None), {}),
        ((200, b"{", None), {}),
        ((404, b'{"out": {"7": "silent"}}', None), {}),
        (Refusal(0, "no"), {}),
    ],
)
def test_what_the_loadbalancer_says_is_read_with_care(said: Any, out: dict[int, str]) -> None:
    assert {one: why[:9] for one, why in read_well(said).items()} == {one: w[:9] for one, w in out.items()}
