"""A file of fixed size that several processes of one instance read and write: a header and slots.

The pages are mapped and shared, so what was written survives `kill -9` of the writer. `flock` keeps processes
apart (it belongs to the open file, so two openings in one process are kept apart as well); a thread lock
keeps the threads apart that share one opening. Both are held for a few microseconds of arithmetic.
"""

import fcntl
import mmap
import os
import struct
import threading
from types import TracebackType

HEADER = 64
"""Bytes before the first slot; the first eight are a counter, the next eight a mark."""

_NUMBER = struct.Struct("<Q")


def make_file(path: str, slots_bytes: int) -> None:
    """Make a file with a header and so many bytes of slots, all zeros, mode 0600."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, HEADER + slots_bytes)
    finally:
        os.close(fd)


class SharedFile:
    """An opened file; `with` holds its lock, under which `counter`, `mark` and `data` may be used."""

    def __init__(self, path: str) -> None:
        """Open the file; raise OSError, or ValueError when it is empty."""
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.data = mmap.mmap(self._fd, 0)
        except BaseException:
            os.close(self._fd)
            raise
        self._lock = threading.Lock()

    def __enter__(self) -> "SharedFile":
        """Lock the file, against threads and processes."""
        self._lock.acquire()
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Unlock the file."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._lock.release()

    @property
    def counter(self) -> int:
        """The first number in the file's header: its users count with it."""
        found: int = _NUMBER.unpack_from(self.data, 0)[0]
        return found

    @counter.setter
    def counter(self, value: int) -> None:
        _NUMBER.pack_into(self.data, 0, value)

    @property
    def mark(self) -> int:
        """The second number in the file's header: what came before it is done with."""
        found: int = _NUMBER.unpack_from(self.data, _NUMBER.size)[0]
        return found

    @mark.setter
    def mark(self, value: int) -> None:
        _NUMBER.pack_into(self.data, _NUMBER.size, value)

    def close(self) -> None:
        """Close the file; what was written stays."""
        self.data.close()
        os.close(self._fd)
