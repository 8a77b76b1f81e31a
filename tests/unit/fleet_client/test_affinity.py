"""A conversation goes where its beginning was read before."""

from itertools import pairwise
from typing import Any

import pytest

from fleet_client import leases_ahead
from tests.fake_fleet import FakeFleet, fake_fleet
from tests.unit.fleet_client.users import SECRET, Make
from tests.waiting import wait_for


def turns(count: int) -> list[dict[str, Any]]:
    """A conversation of so many messages, each with a few blocks of the secret."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": f"{n} " + SECRET * 100} for n in range(count)]


def test_a_conversation_goes_where_it_was_read_before(user: Make, fleet: FakeFleet) -> None:
    one = user(fleet.url)
    for n in (1, 3, 5, 7):
        one.chat(messages=turns(n))
    said = [body["affinity"] for body in fleet.loadbalancer.routes]
    assert [len(hashes) for hashes in said] == [3, 9, 16, 23]
    for shorter, longer in pairwise(said):
        assert longer[: len(shorter)] == shorter
    assert len({given.instance_id for given in fleet.loadbalancer.given}) == 1
    assert SECRET.encode() not in fleet.loadbalancer.received


def test_each_transport_has_a_salt_of_its_own_unless_one_is_given(
    user: Make, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLEET_AFFINITY_SALT", raising=False)
    salt = "a salt that is shared"
    options: list[dict[str, Any]] = [{}, {}, {"affinity_salt": salt}, {"affinity_salt": salt.encode()}]
    for more in options:
        user(fleet.url, **more).chat(messages=turns(1))
    monkeypatch.setenv("FLEET_AFFINITY_SALT", salt)
    user(fleet.url).chat(messages=turns(1))
    user(fleet.url, affinity_salt=salt + "!").chat(messages=turns(1))
    first, second, *shared, other = [tuple(body["affinity"]) for body in fleet.loadbalancer.routes]
    assert len(set(shared)) == 1
    assert len({first, second, shared[0], other}) == 4
    assert salt.encode() not in fleet.loadbalancer.received


def test_without_affinity_no_hash_is_told(user: Make, fleet: FakeFleet) -> None:
    user(fleet.url, affinity=False).chat(messages=turns(3))
    assert "affinity" not in fleet.loadbalancer.routes[0]


def test_with_leases_ahead_a_conversation_stays_where_it_was_read(
    user: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases_ahead, "READ_S", 1.0)  # worth a question however slow this machine is
    fleet = fake_fleet(4)
    try:
        one = user(fleet.url, ahead=8)
        for n in (1, 3, 5, 7):
            one.chat(messages=turns(n))
            wait_for("leases ahead", lambda: one.transport.leases_ahead >= 7)
        served = [len(instance.seen) for instance in fleet.instances]
        assert sorted(served) == [0, 0, 0, 4]
        # Either with one that was here, or with one that was asked for with the hashes and without a wait.
        asked = [body for body in fleet.loadbalancer.routes if "count" not in body]
        assert all("affinity" in body for body in asked)
        assert all("wait_s" not in body for body in asked[1:])
    finally:
        fleet.stop()


def test_when_there_is_no_room_where_the_prefix_lies_a_lease_ahead_is_used(
    user: Make, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases_ahead, "READ_S", 1.0)  # worth a question however slow this machine is
    one = user(fleet.url, ahead=4)
    one.chat(messages=turns(3))
    wait_for("leases ahead", lambda: one.transport.leases_ahead == 4)
    fleet.loadbalancer.room = 0
    for n in (5, 7, 9, 11):  # two leases where it was read, and then two that are elsewhere
        one.chat(messages=turns(n))
    assert sorted(len(instance.seen) for instance in fleet.instances) == [2, 3]
    asked = [body for body in fleet.loadbalancer.routes if "count" not in body]
    assert ["wait_s" in body for body in asked] == [True, False]  # the second time it has read it there, too
    assert all(body["affinity"] for body in asked)
