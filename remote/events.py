"""The events of an instance's requests: a ring of numbered records that the auth_server reports from.

    record = request id (8 bytes) | kind u8 | size u32: bytes of a request, or output tokens

Numbers count from 1 in a boot. The ring holds the last RECORDS; a reader that asks for older ones is told
that some are missing. Several processes may write; records stand in the order in which they were written.
"""

import contextlib
import os
import select
import struct
from dataclasses import dataclass

from remote.shared_file import HEADER, SharedFile, make_file

RECORDS = 65_536
"""Of 16 bytes, 1 MiB: half a minute of a thousand requests a second, and a loadbalancer asks each second."""

_PIPE_BYTES = 65_536
"""What a pipe holds on Linux (pipe(7))."""

STARTED, FINISHED, ABORTED, FAILED = 0, 1, 2, 3
KINDS = ("started", "finished", "aborted", "failed")

_FULL_OR_EMPTY = contextlib.suppress(BlockingIOError)
"""Of the pipe: enough wakes are in it, or none."""

_RECORD = struct.Struct("<8sB3xI")


@dataclass(frozen=True)
class Event:
    """One event of a request: "started", or how it ended ("finished", "aborted", "failed").

    size: bytes of a request that started, or output tokens of one that ended; 0 where not known.
    """

    request_id: str
    kind: str
    size: int = 0


@dataclass(frozen=True)
class News:
    """The events after some number, up to number seq. missed: some of them are gone from the ring."""

    seq: int
    missed: bool
    events: tuple[Event, ...]


def events_told(news: News) -> dict[str, object]:
    """Return the fields of a load report that tell these events."""
    started = [e for e in news.events if e.kind == "started"]
    return {
        "seq": news.seq,
        "missed": news.missed,
        "started": [e.request_id for e in started],
        "started_bytes": [e.size for e in started],
        "ended": [
            {"id": e.request_id, "status": e.kind, "output_tokens": e.size}
            for e in news.events
            if e.kind != "started"
        ],
    }


def make_ring(boot_dir: str) -> None:
    """Make an empty ring in the boot directory, and the pipe that wakes a process waiting for events."""
    os.mkfifo(os.path.join(boot_dir, "wake"), 0o600)
    make_file(os.path.join(boot_dir, "events"), RECORDS * _RECORD.size)


class Events:
    """The ring of events of one boot, opened."""

    def __init__(self, boot_dir: str) -> None:
        """Open the ring in that boot directory; raise OSError."""
        self._file = SharedFile(os.path.join(boot_dir, "events"))
        # Open for both ways nobody waits for the other side, or ends with it (Linux, fifo(7)).
        self._pipe = os.open(os.path.join(boot_dir, "wake"), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the files of the ring."""
        self._file.close()
        os.close(self._pipe)

    def write(self, request_id: str, kind: int, size: int = 0) -> None:
        """Add an event, which becomes the newest one. kind: STARTED, FINISHED, ABORTED or FAILED."""
        record = _RECORD.pack(bytes.fromhex(request_id), kind, min(size, 0xFFFFFFFF))
        with self._file as file:
            at = HEADER + file.counter % RECORDS * _RECORD.size
            file.data[at : at + _RECORD.size] = record
            file.counter += 1
        self.wake()

    def wake(self) -> None:
        """End the wait of the process that waits for events; if none does, the next wait."""
        with _FULL_OR_EMPTY:
            os.write(self._pipe, b"!")

    def wait(self, limit_s: float) -> None:
        """Wait for an event or a wake since `forget`, or for limit_s seconds."""
        poll = select.poll()  # select() takes no number of a file above 1023
        poll.register(self._pipe, select.POLLIN)
        poll.poll(limit_s * 1e3)

    def forget(self) -> None:
        """Let the events so far end no wait. Only for the one process that waits, before it looks at them."""
        with _FULL_OR_EMPTY:
            os.read(self._pipe, _PIPE_BYTES)

    def after(self, seq: int) -> News:
        """Return the events with greater numbers; all, when the number is another boot's, from the future."""
        with self._file as file:
            newest = file.counter
            asked = seq if seq <= newest else 0
            begin = max(asked, newest - RECORDS)
            # One or two copies of memory; the model server waits for this lock, so nothing is read in it.
            first, end = begin % RECORDS, begin % RECORDS + newest - begin
            raw = self._raw(first, min(end, RECORDS)) + self._raw(0, max(0, end - RECORDS))
        return News(newest, begin > asked, tuple(_event(*fields) for fields in _RECORD.iter_unpack(raw)))

    def newest(self) -> int:
        """Return the number of the newest event."""
        with self._file as file:
            return file.counter

    def peek(self) -> int:
        """Return the number of the newest event without the lock; one that is being written may be missed."""
        return self._file.counter

    def fail_open(self) -> int:
        """Record that all requests that have started and not ended have failed; return how many.

        Their model server is gone.
        """
        under_way: dict[str, None] = {}
        for event in self.after(0).events:
            if event.kind == "started":
                under_way[event.request_id] = None
            else:
                under_way.pop(event.request_id, None)
        for request_id in under_way:
            self.write(request_id, FAILED)
        self.wake()  # also where none had: who waits shall see that the model server is gone
        return len(under_way)

    def _raw(self, begin: int, end: int) -> bytes:
        return self._file.data[HEADER + begin * _RECORD.size : HEADER + end * _RECORD.size]


def _event(request_id: bytes, kind: int, size: int) -> Event:
    return Event(request_id.hex(), KINDS[kind], size)
