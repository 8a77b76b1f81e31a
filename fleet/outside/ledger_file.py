"""What may become of the ledger's file, and one transaction on it."""

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path


def is_damage(error: sqlite3.DatabaseError) -> bool:
    """Return whether the file itself is at fault, and not a lock, a full disk or a missing right."""
    # What SQLite calls corrupt or no database comes as plain DatabaseError, those as kinds of it.
    return type(error) is sqlite3.DatabaseError


def set_aside(path: Path) -> Path:
    """Rename a damaged ledger and the files that belong to it; return the new name of the ledger."""
    number = 1
    while (kept := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    for end in ("-wal", "-shm", ""):
        found = path.with_name(path.name + end)
        if found.exists():
            os.replace(found, path.with_name(kept.name + end))
    return kept


def loss(path: Path, inode: int) -> str | None:
    """Return what somebody has done to the file that was opened with that inode; None when it is there."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return "was removed"
    except OSError:
        return None
    if found.st_ino != inode:
        return "was replaced"
    return None if found.st_size else "was emptied"


class Transaction:
    """A context manager: BEGIN IMMEDIATE … COMMIT, or ROLLBACK when the block raises."""

    def __init__(self, db: sqlite3.Connection, failed: Callable[[BaseException | None], None]) -> None:
        """failed: is told what was raised."""
        self._db = db
        self._failed = failed

    def __enter__(self) -> None:
        self._execute("BEGIN IMMEDIATE")

    def _execute(self, sql: str) -> None:
        try:
            self._db.execute(sql)
        except sqlite3.Error as e:
            self._failed(e)
            raise

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        self._failed(error)
        try:
            if kind is None:
                self._execute("COMMIT")
        finally:
            # Also after a COMMIT that failed: else no transaction could ever begin again.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
