"""What happened to requests, in order: a ring of numbered records that the auth_server reports from.

    record = request id (8 bytes) | kind u8 | output tokens u32

Numbers count from 1 in a boot. The ring holds the last RECORDS; who asks for older ones is told that some
are missing. Several processes may write; records stand in the order in which they were written.
"""

import os
import struct
from dataclasses import dataclass

from remote.shared_file import HEADER, SharedFile, make_file

RECORDS = 65_536
"""Of 16 bytes, 1 MiB: half a minute of a thousand requests a second, and a loadbalancer asks each second."""

STARTED, FINISHED, ABORTED, FAILED = 0, 1, 2, 3
KINDS = ("started", "finished", "aborted", "failed")

_RECORD = struct.Struct("<8sB3xI")


@dataclass(frozen=True)
class Event:
    """One record: "started", or how the request ended and with how many output tokens."""

    request_id: str
    kind: str
    output_tokens: int = 0


@dataclass(frozen=True)
class News:
    """Events up to number seq. missed: some of those asked for are gone from the ring."""

    seq: int
    missed: bool
    events: tuple[Event, ...]


def events_told(news: News) -> dict[str, object]:
    """The part of a load report that tells them."""
    return {
        "seq": news.seq,
        "missed": news.missed,
        "started": [e.request_id for e in news.events if e.kind == "started"],
        "ended": [
            {"id": e.request_id, "status": e.kind, "output_tokens": e.output_tokens}
            for e in news.events
            if e.kind != "started"
        ],
    }


def make_ring(boot_dir: str) -> None:
    """An empty ring is in the directory."""
    make_file(os.path.join(boot_dir, "events"), RECORDS * _RECORD.size)


class Events:
    """The ring of one boot, opened."""

    def __init__(self, boot_dir: str) -> None:
        """Open it; raises OSError."""
        self._file = SharedFile(os.path.join(boot_dir, "events"))

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def write(self, request_id: str, kind: int, output_tokens: int = 0) -> None:
        """The event is the newest one."""
        record = _RECORD.pack(bytes.fromhex(request_id), kind, min(output_tokens, 0xFFFFFFFF))
        with self._file as file:
            at = HEADER + file.counter % RECORDS * _RECORD.size
            file.data[at : at + _RECORD.size] = record
            file.counter += 1

    def after(self, seq: int) -> News:
        """The events with greater numbers. A number from the future is another boot's: all there are."""
        with self._file as file:
            newest = file.counter
            asked = seq if seq <= newest else 0
            begin = max(asked, newest - RECORDS)
            # One or two copies of memory; the model server waits for this lock, so nothing is read in it.
            first, end = begin % RECORDS, begin % RECORDS + newest - begin
            raw = self._raw(first, min(end, RECORDS)) + self._raw(0, max(0, end - RECORDS))
        return News(newest, begin > asked, tuple(_event(*fields) for fields in _RECORD.iter_unpack(raw)))

    def newest(self) -> int:
        """The number of the newest event."""
        with self._file as file:
            return file.counter

    def peek(self) -> int:
        """The number of the newest event, without the lock: one that is just being written may be missed."""
        return self._file.counter

    def fail_open(self) -> int:
        """Every request that has started and not ended has failed: its model server is gone. How many."""
        under_way: dict[str, None] = {}
        for event in self.after(0).events:
            if event.kind == "started":
                under_way[event.request_id] = None
            else:
                under_way.pop(event.request_id, None)
        for request_id in under_way:
            self.write(request_id, FAILED)
        return len(under_way)

    def _raw(self, begin: int, end: int) -> bytes:
        return self._file.data[HEADER + begin * _RECORD.size : HEADER + end * _RECORD.size]


def _event(request_id: bytes, kind: int, output_tokens: int) -> Event:
    return Event(request_id.hex(), KINDS[kind], output_tokens)
