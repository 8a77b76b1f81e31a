"""The fleet as a transport for httpx2.Client, on blocking sockets; what can wait is done in a thread."""

import contextlib
import json
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Unpack

import httpx2

from fleet_client.answer_pace import AnswerPace
from fleet_client.call import Call, forwarded, returned
from fleet_client.connection_pool import LOOK_S, BadHttp, Connection, ConnectionPool, Header
from fleet_client.forks import start_anew_in_forks
from fleet_client.lease_keeper import DONE_S, LeaseKeeper
from fleet_client.leases import ClientLease, Posted, Refusal, read_route, read_well
from fleet_client.options import LOADBALANCER, FleetOptions, OptionFields
from fleet_client.reply import HttpReply, kept_reply
from fleet_client.retry import ELSEWHERE, AcquireLease, Came, Send, Setback, Step, is_last
from fleet_client.tls_pins import context_for
from fleet_client.trace_context import TRACEPARENT
from fleet_client.transport import (
    CLOSE_S,
    KEPT_ANSWER,
    MAX_LEASES,
    MODEL_KEEP_ALIVE_S,
    MOMENT_S,
    ROUTE_KEEP_ALIVE_S,
    BodyBuffer,
    InstanceOut,
    TransportCore,
    cut_off,
    late,
    named,
    not_answered,
    not_connected,
    require_httpx2,
    response_of,
)

ASKED_S = LOOK_S / 2
"""Seconds for which what the loadbalancer said of an instance is good for all that wait for it."""


class _Loadbalancer:
    """The loadbalancer as seen by a FleetTransport's threads; one thread of its own does the jobs."""

    def __init__(self, options: FleetOptions) -> None:
        """Open nothing before the first request."""
        self._awake = threading.Condition()
        self.core = TransportCore(options, self._awake, self._start)
        self._key = (options.url, None)
        secure = options.url.startswith("https:")
        self._authorities = httpx2.create_ssl_context(trust_env=False) if secure else None
        self._headers = [(name.encode(), value.encode()) for name, value in self.core.headers.items()]
        self._connections = ConnectionPool(ROUTE_KEEP_ALIVE_S)
        self._thread: threading.Thread | None = None
        self._looked: dict[
            int, tuple[float, str | None]
        ] = {}  # instance -> (when it was asked about, why out)
        self.closed = False

    def post(
        self, path: str, body: Mapping[str, Any], limit_s: float, traceparent: str | None = None
    ) -> Posted | Refusal:
        """Ask the loadbalancer; return its answer, or a Refusal with status 0 when there is none."""
        more = [(TRACEPARENT.encode(), traceparent.encode())] if traceparent else []
        try:
            return self._post(path, [*self._headers, *more], json.dumps(body).encode(), limit_s)
        except OSError as e:
            return Refusal(0, named(e))

    def _post(self, path: str, said: Sequence[Header], body: bytes, limit_s: float) -> Posted:
        connection = self._connections.take(self._key)
        if connection is None:
            connect_s = min(limit_s, self.core.options.connect_s)
            context = self._authorities and (self.core.trusted.context() or self._authorities)
            connection = self._connections.connect(self._key, context, connect_s)
        try:
            end = time.monotonic() + limit_s
            connection.limit(limit_s)
            connection.send("POST", path, said, body)
            connection.head(max(0.0, end - time.monotonic()))
            raw = connection.whole_body(MAX_LEASES, max(0.0, end - time.monotonic()))
        except BaseException:
            self._connections.drop(connection)
            raise
        status, headers = connection.status, connection.headers
        if connection.finish(0.0):
            self._connections.put(self._key, connection)
        else:
            self._connections.drop(connection)
        after = next((v.decode("latin-1") for n, v in headers if n.lower() == b"retry-after"), None)
        return status, raw, after

    def look(self, lease: ClientLease) -> None:
        """Raise InstanceOut when the loadbalancer says that the lease's instance answers nothing any more.

        It is asked about each instance once in a while, however many requests wait for it.
        """
        one, now = lease.instance_id, time.monotonic()
        asked_at, why = self._looked.get(one, (0.0, None))
        if now >= asked_at + ASKED_S:
            with self._awake:
                self._looked[one] = now, why  # the others take what was said before, until the answer is here
            why = read_well(self.post("/well", {"instances": [one]}, DONE_S)).get(one)
            with self._awake:
                self._looked = {i: said for i, said in self._looked.items() if now < said[0] + LOOK_S}
                self._looked[one] = now, why
        if why is not None:
            raise InstanceOut(why)

    def _start(self) -> None:
        """Start or wake the thread that does the jobs; the caller holds the lock."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="fleet-jobs", daemon=True)
            self._thread.start()
        else:
            self._awake.notify_all()

    def _work(self) -> None:
        """Do the leases' jobs until none will be due before the next request."""
        leases = self.core.leases
        while True:
            with self._awake:
                now = time.monotonic()
                job = leases.next_job(now)
                if job is None:
                    look_in_s = leases.look_in_s(now)
                    if look_in_s is None:
                        self._thread = None
                        return
                    self._awake.wait(look_in_s)
                    continue
            leases.finish_job(job, self.post(job.path, job.body, job.limit_s), time.monotonic())

    def close(self) -> None:
        """Give leases back and tell how others ended, for 2 s at most; then close all connections."""
        with self._awake:
            if self.closed:
                return
            self.closed = True
            self.core.leases.give_all_back()
            thread = self._thread
            self._awake.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_S)
        self.core.leases.abandon()
        self._connections.close()

    def start_anew(self) -> None:
        """Leave leases, thread and connections to the parent of this process, which is a fork."""
        self._awake = threading.Condition()
        self._thread = None
        self.core.start_anew(self._awake)
        self._connections.start_anew()


class SyncAnswer(httpx2.SyncByteStream):
    """The answer of an instance as a stream of bytes, which come while they are read."""

    def __init__(
        self, call: Call, reply: HttpReply, leases: LeaseKeeper, connections: ConnectionPool, owner: object
    ) -> None:
        """Read that reply of a call. owner: kept alive, so not closed, while the answer is read."""
        assert reply.lease is not None  # noqa: S101 it came from an instance
        self._call = call
        self._lease = reply.lease
        self._connection: Connection = reply.source
        self._leases = leases
        self._connections = connections
        self._owner = owner
        self._last = b""
        self._pace = AnswerPace(reply.head_s)
        self._ok = reply.status == 200
        self._open = True

    def __iter__(self) -> Iterator[bytes]:
        """Yield the answer's bytes, not decoded, in the pieces they come in; raise httpx2's errors."""
        chunks, pace, clock = self._connection.body(), self._pace, time.monotonic
        while True:
            try:
                pace.ask(clock())
                chunk = next(chunks, None)
                pace.came(chunk or b"", clock())
            except (OSError, ValueError) as e:  # ValueError: it was closed in another thread
                why, error = cut_off(self._lease, e)
                break
            if chunk is None:
                self.close()
                return
            self._last = chunk
            yield chunk
        if self._connection.inherited:
            self._open = False
            raise httpx2.ReadError(
                f"{self._lease}: this process is a fork, and the answer its parent's: ask again here"
            )
        if self._open:  # it was not closed here
            self._ended()
            self._connections.drop(self._connection)
            self._call.note_setback(self._lease, why)
            self._leases.tell(self._lease, "failed", why)
        raise error

    def close(self) -> None:
        """Close the answer; a connection that was not read to its end is closed, another is kept."""
        if not self._open:
            return
        if self._connection.inherited:
            self._open = False
            return
        self._ended()
        done = self._connection.complete or is_last(self._last)
        if done and self._connection.finish(MOMENT_S):
            self._connections.put((self._lease.address, self._lease.certificate), self._connection)
        else:
            self._connections.drop(self._connection)

    def _ended(self) -> None:
        self._open = False
        if self._ok:
            now = time.monotonic()
            if self._pace.end(now):
                self._leases.note_pace(self._lease, self._pace, now)


class FleetTransport(httpx2.BaseTransport):
    """A transport for `httpx2.Client(transport=...)`, and so for `openai.OpenAI(http_client=...)`.

    Any number of threads may use it, and forks of the process: each has connections and leases of its own.
    Close it (or the client) when done: leases that were fetched ahead go back then, and answers that are
    being read go on to their end.
    """

    def __init__(self, loadbalancer: str = LOADBALANCER, **options: Unpack[OptionFields]) -> None:
        """Open nothing before the first request; `FleetOptions` explains the options.

        Raises ValueError for options that are out of range.
        """
        self._loadbalancer = _Loadbalancer(FleetOptions(loadbalancer, **options))
        self._core = self._loadbalancer.core
        self._connections = ConnectionPool(MODEL_KEEP_ALIVE_S)
        # Also when it is forgotten, and at the end of the program.
        self._finalizer = weakref.finalize(self, _close_both, self._loadbalancer, self._connections)
        start_anew_in_forks(self)

    def __repr__(self) -> str:
        """Describe the transport, without keys."""
        return self._core.described("FleetTransport", closed=self._loadbalancer.closed)

    @property
    def leases_ahead(self) -> int:
        """How many leases are at hand that were fetched before they are needed."""
        return self._core.leases.at_hand

    @property
    def untold(self) -> int:
        """How many ends of leases the loadbalancer could not be told."""
        return self._core.leases.untold

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Answer one request of an httpx2 client; raise TypeError for the request of another package."""
        require_httpx2(request, "httpx2.Client")
        try:
            body: bytes | None = request.content
        except httpx2.RequestNotRead:
            body = _buffered(request)
        call = self._core.call_of(request, body)
        if isinstance(call, HttpReply):
            return response_of(call, call)
        reply = self._serve(call)
        if reply.source is None:
            return response_of(call, reply)
        stream = SyncAnswer(call, reply, self._core.leases, self._connections, self)
        return response_of(call, reply, stream)

    def close(self) -> None:
        """Close the transport: give leases back, tell of ended ones (2 s at most), close idle connections."""
        self._finalizer()

    def start_anew(self) -> None:
        """Share nothing with the process that this one is a fork of."""
        self._loadbalancer.start_anew()
        self._connections.start_anew()

    def _serve(self, call: Call) -> HttpReply:
        if self._loadbalancer.closed:
            raise RuntimeError("this FleetTransport is closed")
        steps = self._core.attempt(call, time.monotonic())
        try:
            step = next(steps)
            while True:
                step = steps.send((self._perform(call, step), time.monotonic()))
        except StopIteration as end:
            reply: HttpReply = end.value
            return reply

    def _perform(self, call: Call, step: Step) -> Came:
        if isinstance(step, Send):
            return self._send(call, step)
        if isinstance(step, AcquireLease):
            got = self._loadbalancer.post("/route", step.body, step.hold_s + step.slack_s, call.traceparent)
            return got if isinstance(got, Refusal) else read_route(*got, time.monotonic())
        time.sleep(step.seconds)
        return None

    def _send(self, call: Call, step: Send) -> HttpReply | Setback:
        lease, timeouts = step.lease, call.timeouts
        limit_s = step.sooner_than(timeouts.read)
        key = (lease.address, lease.certificate)
        connection = None if step.again else self._connections.take(key)
        if connection is None:
            try:
                context = context_for(lease.address, lease.certificate)
                connection = self._connections.connect(key, context, self._core.connect_s(timeouts))
            except OSError as e:
                return not_connected(lease, e)
            except BaseException:
                self._core.leases.tell(lease, "unused")
                raise
        try:
            connection.limit(timeouts.write)
            # A server may answer and close before it has read everything.
            with contextlib.suppress(ConnectionError):
                connection.send(call.method, call.target, forwarded(call.headers, lease.token), call.body)
            connection.watch(partial(self._loadbalancer.look, lease))
            begun = time.monotonic()
            connection.head(timeouts.read if limit_s is None else limit_s)
            if limit_s is not None and call.streamed and connection.status == 200:
                connection.first_part(max(0.0, limit_s - (time.monotonic() - begun)))
            connection.limit(timeouts.read)
        except OSError as e:
            self._connections.drop(connection)
            if limit_s is not None and isinstance(e, TimeoutError):
                return late(lease, limit_s)
            return not_answered(
                lease, e, bad_http=isinstance(e, BadHttp), again=not (connection.fresh or connection.headed)
            )
        except BaseException:
            self._connections.drop(connection)
            raise
        if connection.status not in ELSEWHERE:
            headers = returned(connection.headers, lease.address)
            took_s = time.monotonic() - begun
            return HttpReply(connection.status, headers, connection, lease=lease, head_s=took_s)
        body = _read_some(connection)
        self._connections.drop(connection)
        return kept_reply(connection.status, connection.headers, body, lease)


def _close_both(loadbalancer: _Loadbalancer, connections: ConnectionPool) -> None:
    loadbalancer.close()
    connections.close()


def _read_some(connection: Connection) -> bytes:
    """Return the body of an answer that is not wanted, as far as it comes soon and is not long."""
    raw, end = b"", time.monotonic() + CLOSE_S
    connection.limit(CLOSE_S)
    with contextlib.suppress(OSError):
        for part in connection.body():
            raw += part
            if len(raw) > KEPT_ANSWER or time.monotonic() > end:
                break
    return raw[:KEPT_ANSWER]


def _buffered(request: httpx2.Request) -> bytes | None:
    body = BodyBuffer()
    stream = request.stream
    assert isinstance(stream, httpx2.SyncByteStream)  # noqa: S101 httpx2 sees to it
    for part in stream:
        if not body.add(part):
            break
    return body.joined()
