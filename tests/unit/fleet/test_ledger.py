"""Every dollar is in the ledger, and a restart loses none."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fleet.arrivals import Arrived
from fleet.journal import BillingInterval, Entries, SavedInstance
from fleet.outside.ledger import KEPT_S, PRUNE_EVERY_S, Ledger
from fleet.outside.ledger_reading import BUCKET_S, DAY_S
from fleet.outside.ledger_schema import MIGRATIONS
from process.errors import ConfigError


def interval(label: str, state: str, at: float, usd_h: float, running: float = 3600.0) -> BillingInterval:
    return BillingInterval(label, 1, 7, state, at, None, usd_h, running, "test")


@pytest.fixture
def ledger(tmp_path: Path):  # type: ignore[no-untyped-def]
    made = Ledger(tmp_path / "ledger.sqlite")
    yield made
    made.close()


def test_dollars_are_seconds_times_price_by_state(ledger: Ledger) -> None:
    """Prices of 3600 $/h make a dollar a second."""
    ledger.write(
        Entries(
            [
                interval("f/a", "ordered", 0.0, 36.0),
                interval("f/a", "running", 10.0, 3600.0),
                interval("f/a", "hot", 30.0, 3600.0),
                interval("f/a", "draining", 90.0, 3600.0),
                interval("f/a", "stopping", 100.0, 3600.0),
                interval("f/a", "cold", 110.0, 36.0),
                interval("f/a", "failed", 210.0, 36.0),
                interval("f/a", "gone", 220.0, 0.0),
            ]
        )
    )
    costs = ledger.costs(0.0, 1000.0)
    assert costs.loading == pytest.approx(0.1 + 20)
    assert costs.hot_idle == pytest.approx(70)
    assert costs.hot_working == 0.0
    assert costs.stopped == pytest.approx(10 + 1)
    assert costs.lost == pytest.approx(0.1)
    assert costs.total == pytest.approx(0.1 + 20 + 70 + 11 + 0.1)
    assert costs.usd_if_all_hot == pytest.approx(220)


def test_a_window_counts_what_lies_inside_it(ledger: Ledger) -> None:
    ledger.write(Entries([interval("f/a", "hot", 0.0, 3600.0), interval("f/a", "cold", 100.0, 36.0)]))
    assert ledger.costs(40.0, 60.0).total == pytest.approx(20)
    assert ledger.costs(90.0, 110.0).total == pytest.approx(10.1)
    assert ledger.costs(200.0, 200.0).total == 0.0


def test_hot_dollars_are_split_by_the_seconds_that_had_a_request(ledger: Ledger) -> None:
    ledger.write(Entries([interval("f/a", "hot", 0.0, 3600.0), interval("f/b", "hot", 0.0, 3600.0)]))
    for n in range(10):
        ledger.add_counts({("f/a", n): BUCKET_S / 3, ("f/b", n): 0.0}, (), n * BUCKET_S + 1)
    costs = ledger.costs(0.0, 10 * BUCKET_S)
    assert costs.hot_working == pytest.approx(50)
    assert costs.hot_idle == pytest.approx(250)
    assert costs.utilisation == pytest.approx(1 / 6)
    assert ledger.costs(0.0, 5 * BUCKET_S).hot_working == pytest.approx(25)


def test_a_second_process_goes_on_where_the_first_was_killed(tmp_path: Path) -> None:
    """kill -9 in the middle: what was written is there, open intervals go on, nothing is counted twice."""
    path = tmp_path / "ledger.sqlite"
    script = (
        "import sys, time; sys.path.insert(0, '.'); from pathlib import Path\n"
        "from fleet.journal import BillingInterval, Entries, SavedInstance\n"
        "from fleet.outside.ledger import Ledger\n"
        f"l = Ledger(Path({str(path)!r}))\n"
        "l.write(Entries([BillingInterval('f/a', 1, 7, 'hot', 100.0, None, 3600.0, 3600.0, 'x')],"
        " {'f/a': SavedInstance('f/a', 1, 7, True, False, 50.0, 900.0, 'hot', 100.0)}))\n"
        "print('written', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
        os.kill(child.pid, signal.SIGKILL)
    again = Ledger(path)
    try:
        assert again.saved_fleet(200.0).instances == [
            SavedInstance("f/a", 1, 7, True, False, 50.0, 900.0, "hot", 100.0, 3600.0, 3600.0)
        ]
        again.write(Entries([interval("f/a", "running", 160.0, 3600.0)]))
        costs = again.costs(0.0, 200.0)
        assert [costs.hot_idle, costs.loading] == pytest.approx([60.0, 40.0])
    finally:
        again.close()


def test_what_is_gone_is_not_saved_but_what_is_condemned_is(ledger: Ledger) -> None:
    for label, condemned in (("f/a", False), ("f/b", True)):
        ledger.write(
            Entries(
                [interval(label, "hot", 0.0, 1.0), interval(label, "gone", 5.0, 0.0)],
                {label: SavedInstance(label, 1, 7, True, condemned, 0.0, None, "gone", 5.0)},
            )
        )
    assert [(r.label, r.condemned, r.state) for r in ledger.saved_fleet(9.0).instances] == [
        ("f/b", True, None)
    ]


def test_bad_machines_are_forgotten_when_their_time_is_up(ledger: Ledger) -> None:
    ledger.write(Entries(bad_machines={7: (100.0, "never ready"), 8: (50.0, "died")}))
    assert ledger.saved_fleet(60.0).bad_machines == {7: 100.0}


def test_the_host_key_that_is_believed_is_kept(ledger: Ledger) -> None:
    ledger.write(Entries(host_keys={"f/a": "ed25519 AAA"}))
    ledger.write(Entries(host_keys={"f/a": "ed25519 BBB", "f/b": "ed25519 CCC"}))
    assert ledger.saved_fleet(0.0).host_keys == {"f/a": "ed25519 BBB", "f/b": "ed25519 CCC"}


def test_a_write_that_fails_changes_nothing(ledger: Ledger) -> None:
    ledger.write(Entries([interval("f/a", "hot", 0.0, 3600.0)]))
    none: Any = None
    with pytest.raises(sqlite3.Error):
        ledger.write(Entries([interval("f/a", "cold", 10.0, 36.0), interval(none, "hot", 1.0, 1.0)]))
    assert ledger.costs(0.0, 20.0).hot_idle == pytest.approx(20)


def test_the_file_is_private(tmp_path: Path) -> None:
    Ledger(tmp_path / "l.sqlite").close()
    assert (tmp_path / "l.sqlite").stat().st_mode & 0o077 == 0


def test_what_vanished_is_remembered_until_its_time_is_up(ledger: Ledger) -> None:
    ledger.write(Entries(vanished={"f/a": (100.0, 0.4), "f/b": (50.0, 0.3)}))
    assert ledger.saved_fleet(60.0).vanished == {"f/a": (100.0, 0.4)}


class FailsToCommit(sqlite3.Connection):
    """Refuses the first COMMIT and leaves the transaction open, as SQLite does while others read."""

    refuses = True

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        if sql == "COMMIT" and self.refuses:
            self.refuses = False
            raise sqlite3.OperationalError("database is locked")
        return super().execute(sql, *parameters)


def test_a_commit_that_failed_does_not_keep_the_next_from_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=FailsToCommit))
    made = Ledger(tmp_path / "l.sqlite")
    with pytest.raises(sqlite3.OperationalError):
        made.write(Entries([interval("f/a", "hot", 0.0, 1.0)]))
    made.write(Entries([interval("f/a", "hot", 0.0, 1.0)]))
    assert [s.label for s in made.costs(0.0, 10.0).intervals] == ["f/a"]
    made.close()


def test_arrivals_are_kept_by_second_and_a_second_may_come_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.add_counts({}, [Arrived(100, 2.0, 50.0, 300.0), Arrived(103, 1.0, 20.0, 10.0)], 104.0)
    ledger.add_counts({}, [Arrived(103, 0.5, 5.0, 90.0)], 105.0)
    ledger.close()
    again = Ledger(tmp_path / "ledger.sqlite")
    assert again.arrived(0.0, 1000.0) == [Arrived(100, 2.0, 50.0, 300.0), Arrived(103, 1.5, 25.0, 100.0)]
    assert again.arrived(101.0, 103.0) == []
    assert again.arrived(103.0, 104.0) == [Arrived(103, 1.5, 25.0, 100.0)]
    again.close()


def rows(path: Path, sql: str) -> list[Any]:
    """What another process reads in the file."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(sql).fetchall()


def test_of_what_arrived_only_times_and_counts_are_kept(tmp_path: Path, ledger: Ledger) -> None:
    columns = [name for _, name, *_ in rows(tmp_path / "ledger.sqlite", "PRAGMA table_info(arrived)")]
    assert columns == ["second", "requests", "work", "prompt_tokens"]


def test_arrivals_are_forgotten_after_eight_days(ledger: Ledger) -> None:
    day = [Arrived(int(n * DAY_S), 1.0, 1.0, 1.0) for n in range(20)]
    ledger.add_counts({}, day[:10], 9 * DAY_S)
    assert [a.second for a in ledger.arrived(0.0, 1e9)] == [a.second for a in day[1:10]]
    ledger.add_counts({}, day[10:11], 9 * DAY_S + PRUNE_EVERY_S - 1.0)
    assert len(ledger.arrived(0.0, 1e9)) == 10, "it is looked once an hour"
    ledger.add_counts({}, day[11:], 19 * DAY_S)
    assert [a.second for a in ledger.arrived(0.0, 1e9)] == [a.second for a in day[11:]]


def test_what_is_forgotten_of_the_work_changes_no_dollar(tmp_path: Path, ledger: Ledger) -> None:
    """Buckets of 15 s become days; hot dollars that were for work stay so."""
    start = 100 * DAY_S
    ledger.write(Entries([interval("f/a", "hot", start, 3600.0), interval("f/b", "hot", start, 3600.0)]))
    for n in range(0, 12 * 24):  # 9 s of each 15, for 12 days, in a bucket an hour
        at = start + n * 3600.0 + 1.0
        bucket = int(at // BUCKET_S)
        ledger.add_counts({("f/a", bucket): 9.0, ("f/b", bucket): 3.0}, (), at)
    before = ledger.costs(0.0, start + 2 * DAY_S), ledger.costs(0.0, start + 12 * DAY_S)
    for _ in range(2):  # the second time there is nothing to forget
        again = Ledger(tmp_path / "ledger.sqlite")
        again.add_counts({}, [Arrived(1, 1.0, 1.0, 1.0)], start + 12 * DAY_S)
        again.close()
    assert rows(tmp_path / "ledger.sqlite", "SELECT COUNT(*) FROM worked_day") == [(8,)]
    assert rows(tmp_path / "ledger.sqlite", "SELECT COUNT(*) FROM worked") == [(2 * KEPT_S / 3600.0,)]
    after = ledger.costs(0.0, start + 2 * DAY_S), ledger.costs(0.0, start + 12 * DAY_S)
    for one, other in zip(before, after, strict=True):
        assert other.hot_working == pytest.approx(one.hot_working)
        assert other.total == pytest.approx(one.total)
    half = ledger.costs(start, start + DAY_S / 2.0)
    assert half.hot_working == pytest.approx(12 * 12.0), "inside a day that was folded its work is even"


def test_a_ledger_of_before_gets_the_new_tables(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE arrived")
        db.execute("DROP TABLE worked_day")
        db.execute("DROP TABLE sampled")
        db.execute("PRAGMA user_version = 0")
    db.close()
    again = Ledger(path)
    again.add_counts({}, [Arrived(1, 1.0, 1.0, 1.0)], 1.0)
    assert again.costs(0.0, 10.0).total == 0.0
    again.close()


def version_of(path: Path) -> int:
    """The version that the file says it has."""
    db = sqlite3.connect(path)
    [(version,)] = db.execute("PRAGMA user_version").fetchall()
    db.close()
    return int(version)


def test_a_new_ledger_has_the_newest_version(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    assert version_of(path) == MIGRATIONS[-1][0]


def test_versions_rise_by_one() -> None:
    assert [version for version, _ in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))


def test_a_ledger_of_a_newer_autoscaler_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path, newest = tmp_path / "ledger.sqlite", MIGRATIONS[-1][0]
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {newest + 1}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError) as raised:
        Ledger(path)
    assert str(raised.value) == (
        f"{path} was written by a newer autoscaler: it has version {newest + 1}, and this one knows "
        f"versions up to {newest}"
    )
    assert path.read_bytes() == before


def test_a_ledger_of_an_older_version_gets_what_is_new_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.sqlite"
    made = Ledger(path)
    made.write(Entries([interval("f/a", "hot", 0.0, 3600.0)]))
    made.close()
    newest = MIGRATIONS[-1][0]
    added = (newest + 1, "ALTER TABLE took ADD COLUMN note TEXT; CREATE TABLE extra(a); ")
    monkeypatch.setattr("fleet.outside.ledger_schema.MIGRATIONS", (*MIGRATIONS, added))
    for _ in range(2):  # the second time there is nothing to do
        again = Ledger(path)
        assert again.costs(0.0, 20.0).hot_idle == pytest.approx(20)
        again.close()
        assert version_of(path) == newest + 1


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    newest = MIGRATIONS[-1][0]
    with monkeypatch.context() as patched:
        broken = (newest + 1, "DROP TABLE took; INSERT INTO nowhere VALUES (1);")
        patched.setattr("fleet.outside.ledger_schema.MIGRATIONS", (*MIGRATIONS, broken))
        with pytest.raises(sqlite3.OperationalError, match="nowhere"):
            Ledger(path)
    assert version_of(path) == newest
    again = Ledger(path)
    assert again.durations(0.0, 1e9) == []
    again.close()


def damage(path: Path, at: int, what: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(what)


@pytest.mark.parametrize(
    ("at", "what"),
    [
        (0, b"no database at all"),
        (20, b"\0" * 80),
        (100, b"\xff" * 3000),
        (4096, b"\0" * 4096),
        (4096, b"\xff" * 4096),
        (8192, b"\x5a" * 2000),
        (5000, b"\xff" * 8000),
        (4096, b"\x0d" + b"\xff" * 20),
    ],
)
def test_a_damaged_ledger_is_kept_aside_and_a_new_one_begun(tmp_path: Path, at: int, what: bytes) -> None:
    """Field fault C8: a traceback and a crash loop, with the fleet unmanaged and billing; or silence."""
    path = tmp_path / "ledger.sqlite"
    made = Ledger(path)
    for n in range(200):
        made.write(Entries([interval(f"f/{n}", "hot", float(n), 1.0)], {}, [("boot", float(n), 60.0)]))
    made.close()
    before = path.read_bytes()
    damage(path, at, what)
    damaged = path.read_bytes()
    assert damaged != before
    again = Ledger(path)
    try:
        again.write(Entries([interval("f/new", "hot", 1000.0, 1.0)]))
        assert again.saved_fleet(2000.0) is not None
        assert "f/new" in {i.label for i in again.costs(0.0, 1e9).intervals}
    finally:
        again.close()
    [kept] = tmp_path.glob("ledger.sqlite.damaged-1")
    assert kept.read_bytes() == damaged
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_row_of_the_fleet_that_cannot_be_is_left_out_and_found_by_its_label(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    made = Ledger(path)
    for label in ("f/a", "f/b"):
        saved = SavedInstance(label, 1, 7, True, False, 0.0, 900.0, "hot", 5.0)
        made.write(Entries([interval(label, "hot", 5.0, 1.0)], {label: saved}))
    made.close()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE stretch SET state = 'h\x07t' WHERE label = 'f/a'")
    again = Ledger(path)
    assert [i.label for i in again.saved_fleet(9.0).instances] == ["f/b"]
    again.close()


def test_a_locked_ledger_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode=DELETE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError):
            Ledger(path)
        other.execute("ROLLBACK")
    Ledger(path).close()
    assert [p.name for p in tmp_path.glob("*damaged*")] == []


def another(path: Path) -> Path:
    made = path.with_name("another")
    made.touch(mode=0o600)
    return made


GONE_WRONG: list[tuple[str, Callable[[Path], object]]] = [
    ("was removed", lambda path: path.unlink()),
    ("was emptied", lambda path: os.truncate(path, 0)),
    ("was replaced", lambda path: another(path).replace(path)),
    ("is damaged", lambda path: path.write_bytes(b"no database " * 2000)),
    ("is damaged", lambda path: os.truncate(path, 5000)),
]


@pytest.mark.parametrize(("what", "spoil"), GONE_WRONG)
def test_a_ledger_that_is_spoilt_while_it_is_in_use_begins_anew(
    tmp_path: Path, what: str, spoil: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    """Field fault C8, under load: it went on into a file that nobody could open again, and said nothing."""
    path = tmp_path / "ledger.sqlite"
    made = Ledger(path)
    made.note({"clock_offset": "7.5"})
    made.write(Entries([interval("f/a", "hot", 5.0, 1.0)]))
    assert not made.begin_anew()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    spoil(path)
    if what == "is damaged":
        with pytest.raises(sqlite3.DatabaseError):
            made.costs(0.0, 1e9)
    assert made.begin_anew()
    assert f"ledger.sqlite {what}" in caplog.text
    made.write(Entries([interval("f/b", "hot", 6.0, 1.0)]))
    assert not made.begin_anew()
    made.close()
    again = Ledger(path)
    assert [i.label for i in again.costs(0.0, 1e9).intervals] == ["f/b"]
    assert again.noted("clock_offset") == "7.5", "what this process noted is noted again"
    again.close()
    assert path.stat().st_mode & 0o777 == 0o600
