"""A made-up fleet, and users of both transports."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.fake_fleet import FakeFleet, fake_fleet
from tests.unit.fleet_client.users import Loop, Make, Threads, User


@pytest.fixture(params=[Threads, Loop], ids=["threads", "asyncio"])
def user(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes users, and closes them."""
    users: list[User] = []

    def make(url: str, **more: Any) -> User:
        made: User = request.param(url, **more)
        users.append(made)
        return made

    yield make
    for one in users:
        one.close()


@pytest.fixture
def fleet() -> Iterator[FakeFleet]:
    """Two instances with TLS."""
    made = fake_fleet()
    yield made
    made.stop()
