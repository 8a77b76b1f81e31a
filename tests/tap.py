"""Runs a program of ours and records all that its process reads, writes, starts and opens.

    python -m tests.tap DIR MODULE [arguments]     MODULE.main() runs; DIR/MODULE-<pid>.tap is written

What is recorded, each stream by itself and in order, so that nothing is cut in two:

    socket N in/out     what every socket received and sent
    tls N in/out        the plaintext inside TLS, of SSLSocket (N: its socket) and of asyncio's SSLObject
    ssh in/out          the plaintext inside ssh (paramiko), message by message
    fd N in/out         os.read, os.write and their kin: pipes of children, terminals, and every file, because
                        open() is Python's own _pyio here, which is made of those; so log lines, too
    sqlite              statements with their values
    events              arguments of all that Python itself tells auditors: files opened, processes started
                        with their arguments and environments, connections, names that were looked up, …
    start               arguments and environment of the process itself

uvloop has its sockets in C, where nobody sees them: asyncio's own loop takes its place. What goes past all of
this is refused (sendfile, splice). A program that wanted to hide something could; this is for ours.
"""

import _pyio  # type: ignore[import-not-found]
import asyncio
import builtins
import importlib
import io
import os
import socket
import sqlite3
import ssl
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

_HEAD = struct.Struct(">HI")

NOISE = ("object.", "import", "compile", "exec", "marshal.", "code.", "sys.", "cpython.", "builtins.", "gc.")
"""Events that say what Python does with itself."""


# -- recordings ----------------------------------------------------------------------------------------


class Recorder:
    """Appends to one file; safe in several threads, because each record is one write."""

    def __init__(self, path: Path) -> None:
        """The file is new."""
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._write = os.write  # before it is tapped itself

    def __call__(self, stream: str, data: bytes) -> None:
        """The data belongs to that stream."""
        name = stream.encode()
        self._write(self._fd, _HEAD.pack(len(name), len(data)) + name + data)


def read_recording(path: Path) -> dict[str, bytes]:
    """What is in a recording so far, by stream."""
    raw = path.read_bytes()
    found: dict[str, list[bytes]] = {}
    at = 0
    while at + _HEAD.size <= len(raw):
        name_size, size = _HEAD.unpack_from(raw, at)
        at += _HEAD.size
        if at + name_size + size > len(raw):
            break  # it is being written
        found.setdefault(raw[at : at + name_size].decode(), []).append(
            raw[at + name_size : at + name_size + size]
        )
        at += name_size + size
    return {name: b"".join(parts) for name, parts in found.items()}


def plain(value: object) -> Iterator[bytes]:
    """The texts and bytes in an argument, as bytes."""
    if isinstance(value, str):
        yield value.encode(errors="surrogateescape")
    elif isinstance(value, bytes | bytearray | memoryview):
        yield bytes(value)
    elif isinstance(value, dict):
        for one in value.items():
            yield from plain(one)
    elif isinstance(value, list | tuple | set | frozenset):
        for one in value:
            yield from plain(one)
    elif isinstance(value, os.PathLike):
        yield os.fsencode(value)
    else:
        yield repr(value).encode() if isinstance(value, int | float) else type(value).__name__.encode()


# -- taps ----------------------------------------------------------------------------------------------

Record = Callable[[str, bytes], None]
Look = Callable[[Any, tuple[Any, ...], Any], Iterable[bytes]]
"""Finds the data of a call: what it was called on, the arguments after that, the result."""


def joined(buffers: Iterable[Any]) -> bytes:
    """What several buffers hold."""
    return b"".join(bytes(b) for b in buffers)


def filled(buffers: Iterable[Any], size: int) -> bytes:
    """The first bytes of what several buffers hold."""
    return joined(memoryview(b).cast("B") for b in buffers)[:size]


RECEIVE: dict[str, Look] = {
    "recv": lambda s, args, got: [got],
    "recvfrom": lambda s, args, got: [got[0]],
    "recvmsg": lambda s, args, got: [got[0]],
    "recv_into": lambda s, args, got: [filled([args[0]], got)],
    "recvfrom_into": lambda s, args, got: [filled([args[0]], got[0])],
    "recvmsg_into": lambda s, args, got: [filled(args[0], got[0])],
}
SEND: dict[str, Look] = {
    "send": lambda s, args, sent: [bytes(args[0])[:sent]],
    "sendall": lambda s, args, _: [bytes(args[0])],
    "sendto": lambda s, args, sent: [bytes(args[0])[:sent]],
    "sendmsg": lambda s, args, sent: [joined(args[0])[:sent]],
}
TLS_READ: Look = lambda s, args, got: [got if isinstance(got, bytes) else filled([args[1]], got)]  # noqa: E731
TLS_WRITE: Look = lambda s, args, sent: [bytes(args[0])[:sent]]  # noqa: E731
READ: dict[str, Look] = {
    "read": lambda fd, args, got: [got],
    "pread": lambda fd, args, got: [got],
    "readv": lambda fd, args, got: [filled(args[0], got)],
    "preadv": lambda fd, args, got: [filled(args[0], got)],
}
WRITE: dict[str, Look] = {
    "write": lambda fd, args, sent: [bytes(args[0])[:sent]],
    "pwrite": lambda fd, args, sent: [bytes(args[0])[:sent]],
    "writev": lambda fd, args, sent: [joined(args[0])[:sent]],
    "pwritev": lambda fd, args, sent: [joined(args[0])[:sent]],
}
REFUSED = ("sendfile", "splice", "copy_file_range")


def tap(owner: Any, name: str, way: str, stream: Callable[[Any], str], look: Look, record: Record) -> None:
    """Calls of owner.name are recorded from now on."""
    original = getattr(owner, name)

    def tapped(what: Any, *args: Any, **more: Any) -> Any:
        label = f"{stream(what)} {way}"
        result = original(what, *args, **more)
        for data in look(what, args + tuple(more.values()), result):
            record(label, data)
        return result

    setattr(owner, name, tapped)


def refuse(name: str) -> None:
    """os.<name> does not work."""

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(f"os.{name} would go past the tap")

    setattr(os, name, refused)


def tap_process(record: Record) -> None:
    """Everything of this process is recorded from now on, but what it imported and keeps from before."""
    for value in (*sys.argv, *(f"{name}={value}" for name, value in os.environ.items())):
        record("start", value.encode(errors="surrogateescape") + b"\0")
    sys.addaudithook(lambda event, args: _event(record, event, args))

    for looks, way in ((RECEIVE, "in"), (SEND, "out")):
        for name, look in looks.items():
            tap(socket.socket, name, way, lambda s: f"socket {s.fileno()}", look, record)
    for kind in (ssl.SSLSocket, ssl.SSLObject):
        number = (
            (lambda s: f"tls {s.fileno()}") if kind is ssl.SSLSocket else (lambda s: f"tls object {id(s)}")
        )
        tap(kind, "read", "in", number, TLS_READ, record)
        tap(kind, "write", "out", number, TLS_WRITE, record)
    tap(ssl.SSLSocket, "send", "out", lambda s: f"tls {s.fileno()}", TLS_WRITE, record)
    for looks, way in ((READ, "in"), (WRITE, "out")):
        for name, look in looks.items():
            tap(os, name, way, lambda fd: f"fd {fd}", look, record)
    for name in REFUSED:
        refuse(name)

    io.open = builtins.open = _pyio.open
    sys.stdout, sys.stderr = (
        _pyio.open(fd, "w", buffering=-1, encoding="utf-8", closefd=False) for fd in (1, 2)
    )
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)

    connect = sqlite3.connect

    def tapped_connect(*args: Any, **more: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **more)
        connection.set_trace_callback(lambda said: record("sqlite", said.encode() + b"\n"))
        return connection

    sqlite3.connect = tapped_connect  # type: ignore[assignment]

    with suppress(ImportError):
        import uvloop

        uvloop.new_event_loop = asyncio.new_event_loop  # type: ignore[assignment]
    with suppress(ImportError):
        from paramiko.packet import Packetizer

        tap(
            Packetizer, "send_message", "out", lambda _: "ssh", lambda p, args, _: [args[0].asbytes()], record
        )
        tap(
            Packetizer, "read_message", "in", lambda _: "ssh", lambda p, args, got: [got[1].asbytes()], record
        )


def _event(record: Record, event: str, args: tuple[Any, ...]) -> None:
    if event.startswith(NOISE):
        return
    record("events", b"\0".join((event.encode(), *plain(args))) + b"\n")
    if event == "open" and isinstance(args[0], str | bytes) and args[2] & (os.O_WRONLY | os.O_RDWR):
        record("files written", os.path.abspath(os.fsencode(args[0])) + b"\n")


def main() -> None:
    """Run the module's main under the tap."""
    directory, module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    tap_process(Recorder(Path(directory) / f"{module}-{os.getpid()}.tap"))
    from fleet_client.flags import run_main

    run_main(importlib.import_module(module).main)


if __name__ == "__main__":
    main()
