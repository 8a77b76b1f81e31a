"""Which connection ends when there are too many: the oldest that waits, of who has most of them."""

import pytest

from fleet_client import connection_table
from fleet_client.connection_table import ConnectionTable, Seat, network_of


class Clients:
    """Clients that come to a server that may have so many files open, and those whose connections ended."""

    def __init__(self, files: int) -> None:
        self.table = ConnectionTable(files)
        self.ended: list[str] = []
        self.seats: dict[str, Seat | None] = {}

    def come(self, *names: str, address: str = "10.0.0.1") -> None:
        """Let them in, if there is room."""
        for name in names:
            self.seats[name] = self.table.admit(address, lambda name=name: self.ended.append(name))  # type: ignore[misc]

    def seat(self, name: str) -> Seat:
        found = self.seats[name]
        assert found is not None
        return found


@pytest.fixture(autouse=True)
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_table, "END_AT_ONCE", 1)


def test_the_one_that_was_silent_longest_ends_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_table, "MAX_SILENT", 2)
    clients = Clients(1000)
    clients.come("a", "b")
    clients.seat("a").works()
    clients.come("c", "d", "e")
    assert clients.ended == ["b", "c"]
    assert len(clients.table) == 3


def test_the_one_that_rested_longest_ends_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_table, "MAX_RESTED", 2)
    clients = Clients(1000)
    clients.come("a", "b", "c")
    for name in ("b", "c", "a"):
        clients.seat(name).works()
        clients.seat(name).rests()
    clients.seat("b").works()
    clients.seat("b").rests()
    clients.come("d")
    assert clients.ended == ["c"]


def test_who_has_most_ends_his_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_table, "MAX_SILENT", 4)
    clients = Clients(1000)
    clients.come("victim", address="10.0.0.2")
    clients.come(*(f"flood {n}" for n in range(50)))
    assert "victim" not in clients.ended
    assert len(clients.ended) == 47


def test_an_address_has_a_share_of_all() -> None:
    clients = Clients(16)  # 8 in all, 6 of one address
    clients.come(*"abcdef")
    for name in "abcdef":
        clients.seat(name).works()
    clients.come("g")
    assert clients.seats["g"] is None, "all of that address are working"
    clients.come("x", "y", "z", address="10.0.0.2")
    assert clients.seats["z"] is not None
    assert clients.ended == ["x"], "8 in all; the oldest that does not work has ended"
    clients.seat("a").rests()
    clients.come("h")
    assert clients.seats["h"] is not None
    assert clients.ended == ["x", "a"]


def test_those_that_went_leave_room() -> None:
    clients = Clients(16)
    for n in range(100):
        clients.come(f"{n}")
        clients.seat(f"{n}").works()
        clients.seat(f"{n}").leave()
        clients.seat(f"{n}").leave()
    assert (len(clients.table), clients.ended) == (0, [])


def test_some_end_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_table, "MAX_SILENT", 100)
    monkeypatch.setattr(connection_table, "END_AT_ONCE", 10)
    clients = Clients(1000)
    clients.come(*(f"{n}" for n in range(101)))
    assert clients.ended == [f"{n}" for n in range(10)]


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("fe80::1%eth0", "fe80::/64"),
        ("not:an:address", "not:an:address"),
    ],
)
def test_a_network_of_ipv6_is_one_address(address: str, network: str) -> None:
    assert network_of(address) == network
