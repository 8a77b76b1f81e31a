"""A hot set is read a little at a time, and only what has changed anew."""

import asyncio
import json
from itertools import count
from typing import Any

import pytest

from dispatch.outside.hot_set import HotSetReader
from tests.loadbalancer_app import (
    HOT,
    INSTANCE,
)
from tests.messages import hot_set
from web.messages.decoding import BadField
from web.messages.hot_set import HotSet


def read(reader: HotSetReader, said: dict[str, Any]) -> HotSet:
    """The hot set in that body."""
    return asyncio.run(reader.read(json.dumps(said).encode()))


def test_of_a_hot_set_only_what_has_changed_is_read_anew() -> None:
    reader = HotSetReader()
    many = [{**INSTANCE, "id": i} for i in range(100)]
    first = read(reader, {**HOT, "instances": many})
    assert first == hot_set({**HOT, "instances": many})
    changed = [*many[:50], {**many[50], "capacity_work": 7.0}, *many[60:]]
    second = read(reader, {**HOT, "version": 2, "instances": changed})
    same = [one for one in second.instances if one is first.instances[one.id]]
    assert [len(second.instances), len(same)] == [91, 90]
    assert second.instances[50].capacity_work == 7.0


def test_a_hot_set_that_is_wrong_leaves_what_was_read_before() -> None:
    reader = HotSetReader()
    first = read(reader, HOT)
    for change, field in (
        ({"instances": [{**INSTANCE, "id": 9}, {**INSTANCE, "state": "warm"}]}, r"instances\[1\].state"),
        ({"instances": [[{}]]}, r"instances\[0\]"),
        ({"instances": [[]]}, r"instances\[0\]"),
        ({"instances": None}, "instances"),
        ({"instances": [{**INSTANCE, "certificate": "none"}]}, r"instances\[0\].certificate"),
    ):
        with pytest.raises(BadField, match=f"^{field}: "):
            read(reader, {**HOT, **change})
    with pytest.raises(BadField, match=r"^instances: is missing"):
        read(reader, {name: value for name, value in HOT.items() if name != "instances"})
    assert read(reader, {**HOT, "colour": "blue"}).instances[0] is first.instances[0]


def test_while_a_hot_set_of_thousands_is_read_others_are_answered() -> None:
    """An instance takes 1.5 ms here, so that three of them are a slice of 4 ms."""
    ticks = count()
    many = [{**INSTANCE, "id": i} for i in range(5000)]
    raw = json.dumps({**HOT, "instances": many}).encode()

    async def turns() -> int:
        """Turns of the loop while it is read."""
        found = 0
        reading = asyncio.ensure_future(HotSetReader(lambda: 0.0015 * next(ticks)).read(raw))
        while not reading.done():
            found += 1
            await asyncio.sleep(0)
        assert len(reading.result().instances) == 5000
        return found

    assert asyncio.run(turns()) >= 5000 // 3
