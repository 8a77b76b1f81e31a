"""The tables of the ledger, and the migrations that bring an older one to them."""

import sqlite3
from pathlib import Path

from fleet.history import NAMES
from process.errors import ConfigError

_VERSION_1 = """
CREATE TABLE IF NOT EXISTS stretch(
  label TEXT NOT NULL, instance INTEGER, machine INTEGER, state TEXT NOT NULL,
  from_s REAL NOT NULL, to_s REAL, usd_h REAL NOT NULL, running_usd_h REAL NOT NULL, why TEXT NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS open_stretch ON stretch(label) WHERE to_s IS NULL;
CREATE INDEX IF NOT EXISTS stretch_to ON stretch(to_s);
CREATE TABLE IF NOT EXISTS worked(
  label TEXT NOT NULL, bucket INTEGER NOT NULL, seconds REAL NOT NULL, PRIMARY KEY(label, bucket));
CREATE TABLE IF NOT EXISTS worked_day(
  label TEXT NOT NULL, day INTEGER NOT NULL, seconds REAL NOT NULL, PRIMARY KEY(label, day));
CREATE INDEX IF NOT EXISTS worked_bucket ON worked(bucket);
CREATE TABLE IF NOT EXISTS arrived(
  second INTEGER PRIMARY KEY, requests REAL NOT NULL, work REAL NOT NULL, prompt_tokens REAL NOT NULL);
CREATE TABLE IF NOT EXISTS fleet(
  label TEXT PRIMARY KEY, instance INTEGER, machine INTEGER, loaded INTEGER NOT NULL,
  doomed INTEGER NOT NULL, ordered_s REAL NOT NULL, throughput REAL);
CREATE TABLE IF NOT EXISTS bad_machine(machine INTEGER PRIMARY KEY, until_s REAL NOT NULL, why TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS mourned(label TEXT PRIMARY KEY, until_s REAL NOT NULL, usd_h REAL NOT NULL);
CREATE TABLE IF NOT EXISTS host_key(label TEXT PRIMARY KEY, key TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS took(kind TEXT NOT NULL, at_s REAL NOT NULL, seconds REAL NOT NULL);
CREATE INDEX IF NOT EXISTS took_at ON took(at_s);
"""

_VERSION_2 = """
CREATE TABLE IF NOT EXISTS noted(name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS clock_step(at_s REAL NOT NULL, by_s REAL NOT NULL);
"""

_VERSION_3 = """
CREATE TABLE IF NOT EXISTS sampled(
  at_s REAL PRIMARY KEY, hot INTEGER NOT NULL, draining INTEGER NOT NULL, booting INTEGER NOT NULL,
  cold INTEGER NOT NULL, lost INTEGER NOT NULL, wanted_hot INTEGER NOT NULL, wanted_total INTEGER NOT NULL,
  offered REAL NOT NULL, busy REAL NOT NULL, held INTEGER NOT NULL, oldest_wait_s REAL NOT NULL,
  arrived INTEGER NOT NULL, late INTEGER NOT NULL, usd_h REAL NOT NULL);
"""

_VERSION_4 = """
CREATE TABLE IF NOT EXISTS unwatched(from_s REAL NOT NULL, to_s REAL NOT NULL);
"""

_VERSION_5 = """
ALTER TABLE sampled ADD COLUMN answers INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sampled ADD COLUMN answers_late INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sampled ADD COLUMN first_p50 REAL; ALTER TABLE sampled ADD COLUMN first_p95 REAL;
ALTER TABLE sampled ADD COLUMN first_p99 REAL; ALTER TABLE sampled ADD COLUMN token_p50 REAL;
ALTER TABLE sampled ADD COLUMN token_p95 REAL; ALTER TABLE sampled ADD COLUMN token_p99 REAL;
ALTER TABLE sampled ADD COLUMN whole_p50 REAL; ALTER TABLE sampled ADD COLUMN whole_p95 REAL;
ALTER TABLE sampled ADD COLUMN whole_p99 REAL;
ALTER TABLE sampled ADD COLUMN held_high INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sampled ADD COLUMN held_normal INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sampled ADD COLUMN held_low INTEGER NOT NULL DEFAULT 0;
"""

_VERSION_6 = """
CREATE TABLE IF NOT EXISTS traffic(
  label TEXT NOT NULL, instance INTEGER, at_s REAL NOT NULL, usd REAL NOT NULL, gb REAL,
  source TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS traffic_at ON traffic(at_s);
CREATE TABLE IF NOT EXISTS charged(
  day_s REAL NOT NULL, instance INTEGER NOT NULL, label TEXT NOT NULL, gpu REAL NOT NULL,
  storage REAL NOT NULL, traffic REAL NOT NULL, PRIMARY KEY(day_s, instance));
CREATE TABLE IF NOT EXISTS reconciled(
  day_s REAL PRIMARY KEY, at_s REAL NOT NULL, charged_usd REAL NOT NULL, ledger_usd REAL NOT NULL);
"""

MIGRATIONS = (
    (1, _VERSION_1),
    (2, _VERSION_2),
    (3, _VERSION_3),
    (4, _VERSION_4),
    (5, _VERSION_5),
    (6, _VERSION_6),
)
"""(version, SQL that brings a ledger of the version before to it), oldest first; released ones never change.

Version 0 is an empty file, or a ledger from before versions (commit 0abccd6), which has these tables, or all
but the youngest of them.
"""


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Run the migrations that the ledger has not had, each in one transaction with its version."""
    [(version,)] = db.execute("PRAGMA user_version").fetchall()
    newest = MIGRATIONS[-1][0]
    if version > newest:
        raise ConfigError(
            f"{path} was written by a newer autoscaler: it has version {version}, and this one knows "
            f"versions up to {newest}"
        )
    for to_version, sql in MIGRATIONS:
        if to_version > version:
            db.executescript(f"BEGIN IMMEDIATE;{sql}PRAGMA user_version={to_version};COMMIT;")


def check_tables(db: sqlite3.Connection) -> None:
    """Raise DatabaseError where the ledger lacks a table or column: then a page of the file is damaged."""
    for table, columns in _TABLES.items():
        try:
            db.execute(f"SELECT {columns} FROM {table} LIMIT 1").fetchall()  # noqa: S608 names of this file
        except sqlite3.OperationalError as e:
            if "no such" not in str(e):
                raise
            raise sqlite3.DatabaseError(str(e)) from e


_TABLES = {
    "stretch": "label, instance, machine, state, from_s, to_s, usd_h, running_usd_h, why",
    "worked": "label, bucket, seconds",
    "worked_day": "label, day, seconds",
    "arrived": "second, requests, work, prompt_tokens",
    "fleet": "label, instance, machine, loaded, doomed, ordered_s, throughput",
    "bad_machine": "machine, until_s, why",
    "mourned": "label, until_s, usd_h",
    "host_key": "label, key",
    "took": "kind, at_s, seconds",
    "sampled": ", ".join(NAMES),
    "noted": "name, value",
    "clock_step": "at_s, by_s",
    "unwatched": "from_s, to_s",
    "traffic": "label, instance, at_s, usd, gb, source",
    "charged": "day_s, instance, label, gpu, storage, traffic",
    "reconciled": "day_s, at_s, charged_usd, ledger_usd",
}
"""What a sound ledger has."""
