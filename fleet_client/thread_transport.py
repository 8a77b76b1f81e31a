"""The fleet as a transport for httpx2.Client, on blocking sockets; what can wait has a thread of its own."""

import contextlib
import json
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import httpx2

from fleet_client.call import Call, forwarded, returned
from fleet_client.connection_pool import BadHttp, Header, Wire, Wires
from fleet_client.leases import NORMAL, Lease, Refusal, done_body, read_batch, read_route, route_body
from fleet_client.retry import (
    ELSEWHERE,
    ROUTE_SLACK_S,
    Ask,
    Reply,
    Send,
    Setback,
    Take,
    Tell,
    course,
    is_last,
    kept_reply,
)
from fleet_client.tls_pins import context_for
from fleet_client.transport import (
    CLOSE_S,
    DONE_S,
    ENDS_KEPT,
    KEPT_ANSWER,
    MODEL_KEEP_ALIVE_S,
    MOMENT_S,
    ROUTE_KEEP_ALIVE_S,
    Body,
    Fleet,
    call_of,
    extensions,
    named,
    not_connected,
    wrong_request,
)


class _Errands:
    """The loadbalancer, as threads ask it; what can wait is done in a thread of its own."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._key = (fleet.url, None)
        secure = fleet.url.startswith("https:")
        self._context = httpx2.create_ssl_context(trust_env=False) if secure else None
        self._headers = [(name.encode(), value.encode()) for name, value in fleet.headers.items()]
        self._wires = Wires(ROUTE_KEEP_ALIVE_S)
        self._wake = threading.Condition()
        self._ends: deque[tuple[Lease, str, str]] = deque()
        self._thread: threading.Thread | None = None
        self.closed = False

    def ask(self, ask: Ask) -> Lease | Refusal:
        """One lease."""
        got = self._post_route(ask.body, ask.hold_s, ask.slack_s)
        return got if isinstance(got, Refusal) else read_route(*got, time.monotonic())

    def first(self, call: Call) -> tuple[Lease | None, bool]:
        """What `Fleet.first` gives."""
        with self._wake:
            lease, nearer = self._fleet.first(call, time.monotonic())
            if lease is not None:
                self._start()  # else when it has one: a batch must not take what it is waiting for
        return lease, nearer

    def again(self, call: Call, avoid: tuple[int, ...]) -> Lease | None:
        """A lease fetched ahead for another try."""
        with self._wake:
            lease = self._fleet.again(call, avoid, time.monotonic())
            self._start()
        return lease

    def refill(self) -> None:
        """Have leases fetched ahead."""
        with self._wake:
            self._start()

    def answered(self, call: Call, reply: Reply) -> None:
        """Take note of who has read a prompt."""
        with self._wake:
            self._fleet.answered(call, reply)

    def tell(self, lease: Lease, outcome: str, why: str) -> None:
        """Have it told."""
        with self._wake:
            if len(self._ends) < ENDS_KEPT:
                self._ends.append((lease, outcome, why))
            if outcome == "failed":
                self._ends.extend((o, "unused", "") for o in self._fleet.ahead.leave(lease.instance_id))
            self._start()

    def close(self) -> None:
        """Give back what is left and tell what is to be told, 2 s at most."""
        with self._wake:
            if self.closed:
                return
            self.closed = True
            self._ends.extend((lease, "unused", "") for lease in self._fleet.ahead.close())
            if self._ends:
                self._start()
            thread = self._thread
            self._wake.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_S)
        with self._wake:
            self._ends.clear()
        self._wires.close()

    def _post_route(
        self, body: Mapping[str, Any], hold_s: float, slack_s: float
    ) -> tuple[int, bytes, str | None] | Refusal:
        """(status, body, Retry-After) of the answer."""
        begun = time.monotonic()
        try:
            status, headers, raw = self._post("/route", body, hold_s + slack_s)
        except OSError as e:
            return Refusal(0, named(e))
        finally:
            if hold_s == 0.0:
                with self._wake:
                    self._fleet.ahead.answered(time.monotonic() - begun)
        after = next((v.decode("latin-1") for n, v in headers if n.lower() == b"retry-after"), None)
        return status, raw, after

    def _post(self, path: str, body: Mapping[str, Any], limit_s: float) -> tuple[int, list[Header], bytes]:
        wire = self._wires.take(self._key)
        if wire is None:
            wire = Wire(self._fleet.url, self._context, min(limit_s, self._fleet.rules.connect_s))
            self._wires.add(wire)
        try:
            wire.wait(limit_s)
            wire.send("POST", path, self._headers, json.dumps(body).encode())
            wire.head()
            raw = b"".join(wire.body())
        except BaseException:
            self._wires.drop(wire)
            raise
        status, headers = wire.status, wire.headers
        if wire.finish(0.0):
            self._wires.put(self._key, wire)
        else:
            self._wires.drop(wire)
        return status, headers, raw

    def _start(self) -> None:
        """Under the lock."""
        if self._thread is None or not self._thread.is_alive():  # not alive: this process is a fork
            self._thread = threading.Thread(target=self._work, name="fleet-errands", daemon=True)
            self._thread.start()
        else:
            self._wake.notify_all()

    def _work(self) -> None:
        """Until there is nothing to do."""
        ahead = self._fleet.ahead
        while True:
            with self._wake:
                now = time.monotonic()
                self._ends.extend((lease, "unused", "") for lease in ahead.sweep(now))
                wanted = 0 if self.closed else ahead.want(now)
                end = self._ends.popleft() if self._ends and not wanted else None
                if not wanted and end is None:
                    look_in_s = None if self.closed else ahead.look_in_s(now)
                    if look_in_s is None:
                        self._thread = None
                        return
                    self._wake.wait(look_in_s)
                    continue
            if wanted:
                self._fetch(wanted)
            if end is not None:
                with contextlib.suppress(OSError):
                    self._post("/done", done_body(*end), DONE_S)

    def _fetch(self, wanted: int) -> None:
        ahead = self._fleet.ahead
        with self._wake:
            body = route_body(ahead.typical, 0.0, count=wanted, priority=self._fleet.rules.priority)
        got = self._post_route(body, 0.0, ROUTE_SLACK_S)
        said = got if isinstance(got, Refusal) else read_batch(*got, time.monotonic())
        with self._wake:
            now = time.monotonic()
            if isinstance(said, Refusal):
                ahead.refused(wanted, said.retry_after_s, now)
            else:
                self._ends.extend((lease, "unused", "") for lease in ahead.arrived(said, wanted, now))


class _SyncAnswer(httpx2.SyncByteStream):
    """The bytes of an answer as they come."""

    def __init__(self, call: Call, reply: Reply, tell: Tell, wires: Wires, owner: object) -> None:
        """owner: is not to be forgotten, and so closed, while this is read."""
        assert reply.lease is not None  # noqa: S101 it came from an instance
        self._call = call
        self._lease = reply.lease
        self._wire: Wire = reply.source
        self._tell = tell
        self._wires = wires
        self._owner = owner
        self._last = b""
        self._open = True

    def __iter__(self) -> Iterator[bytes]:
        error: httpx2.RequestError
        chunks = self._wire.body()
        while True:
            try:
                chunk = next(chunks, None)
            except TimeoutError:
                error, why = httpx2.ReadTimeout(f"{self._lease}: nothing came in time"), "read_timeout"
                break
            except (OSError, ValueError) as e:  # ValueError: it was closed in another thread
                said = f"{self._lease}: the answer broke off: {type(e).__name__}"
                error, why = httpx2.RemoteProtocolError(said), "broke_off"
                break
            if chunk is None:
                self.close()
                return
            self._last = chunk
            yield chunk
        if self._open:  # nobody closed it
            self._open = False
            self._wires.drop(self._wire)
            self._call.setbacks.append((self._lease.instance_id, why))
            self._tell(self._lease, "failed", why)
        raise error

    def close(self) -> None:
        """Done with it; a connection that was not read to its end is closed at once."""
        if not self._open:
            return
        self._open = False
        done = self._wire.complete or is_last(self._last)
        if done and self._wire.finish(MOMENT_S):
            self._wires.put((self._lease.address, self._lease.certificate), self._wire)
        else:
            self._wires.drop(self._wire)


class FleetTransport(httpx2.BaseTransport):
    """For `httpx2.Client(transport=...)`, and so for `openai.OpenAI(http_client=...)`.

    Any number of threads may use it. Close it (or the client) when done: leases that were fetched ahead go
    back then.
    """

    def __init__(
        self,
        loadbalancer: str = "http://127.0.0.1:8200",
        *,
        api_key: str | None = None,
        max_tries: int = 4,
        wait_s: float = 30.0,
        ahead: int = 0,
        connect_s: float = 5.0,
        trust_network: bool = False,
        priority: str = NORMAL,
        affinity: bool = True,
        affinity_salt: bytes | str | None = None,
    ) -> None:
        """Nothing is opened before the first request; the arguments are those of AsyncFleetTransport."""
        self._fleet = Fleet(
            loadbalancer,
            api_key=api_key,
            max_tries=max_tries,
            wait_s=wait_s,
            ahead=ahead,
            connect_s=connect_s,
            trust_network=trust_network,
            priority=priority,
            affinity=affinity,
            affinity_salt=affinity_salt,
        )
        self._wires = Wires(MODEL_KEEP_ALIVE_S)
        self._errands = _Errands(self._fleet)
        # Also when it is forgotten, and at the end of the program.
        self._finalizer = weakref.finalize(self, _close_both, self._errands, self._wires)

    def __repr__(self) -> str:
        """Without keys."""
        return f"<FleetTransport {self._fleet.url}{' closed' if self._errands.closed else ''}>"

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """httpx2's own call."""
        try:
            body: bytes | None = request.content
        except httpx2.RequestNotRead:
            body = _buffered(request)
        call = call_of(self._fleet, request, body)
        if isinstance(call, Reply):
            return wrong_request(call)
        reply = self._serve(call)
        told, headers = extensions(call, reply), list(reply.headers)
        if reply.source is None:
            return httpx2.Response(reply.status, headers=headers, content=reply.body, extensions=told)
        stream = _SyncAnswer(call, reply, self._errands.tell, self._wires, self)
        return httpx2.Response(reply.status, headers=headers, stream=stream, extensions=told)

    def close(self) -> None:
        """Give back what is left, tell what is to be told (2 s at most), close every connection."""
        self._finalizer()

    def _serve(self, call: Call) -> Reply:
        if self._errands.closed:
            raise RuntimeError("this FleetTransport is closed")
        fleet, errands = self._fleet, self._errands
        lease, nearer = None, False
        if stock := fleet.may_take(call):
            lease, nearer = errands.first(call)
        now = time.monotonic()
        steps = course(
            call, fleet.rules, fleet.url, lease, errands.tell, now, fleet.rng, stock=stock, nearer=nearer
        )
        came: Lease | Refusal | Reply | Setback | None
        try:
            step = next(steps)
            while True:
                if isinstance(step, Send):
                    came = self._send(call, step)
                elif isinstance(step, Ask):
                    came = errands.ask(step)
                    if stock and isinstance(came, Lease):
                        errands.refill()
                elif isinstance(step, Take):
                    came = errands.again(call, step.avoid)
                else:
                    time.sleep(step.seconds)
                    came = None
                step = steps.send((came, time.monotonic()))
        except StopIteration as end:
            reply: Reply = end.value
            if stock:
                errands.answered(call, reply)
            return reply

    def _send(self, call: Call, step: Send) -> Reply | Setback:
        lease, timeouts = step.lease, call.timeouts
        wire = None if step.again else self._wires.take((lease.address, lease.certificate))
        if wire is None:
            try:
                context = context_for(lease.address, lease.certificate)
                wire = Wire(lease.address, context, self._fleet.connect_s(timeouts))
                self._wires.add(wire)
            except OSError as e:
                return not_connected(lease, e)
            except BaseException:
                self._errands.tell(lease, "unused", "")
                raise
        try:
            wire.wait(timeouts.write)
            # A server may answer and close before it has read everything.
            with contextlib.suppress(ConnectionError):
                wire.send(call.method, call.target, forwarded(call.headers, lease.token), call.body)
            wire.wait(timeouts.read)
            wire.head()
        except OSError as e:
            self._wires.drop(wire)
            return _sync_setback(lease, wire, e)
        except BaseException:
            self._wires.drop(wire)
            raise
        if wire.status not in ELSEWHERE:
            return Reply(wire.status, wire.reason, returned(wire.headers), wire, lease=lease)
        body = _read_some_sync(wire)
        self._wires.drop(wire)
        kept = kept_reply(wire.status, wire.reason, wire.headers, body)
        kept.lease = lease
        return kept


def _close_both(errands: _Errands, wires: Wires) -> None:
    errands.close()
    wires.close()


def _sync_setback(lease: Lease, wire: Wire, error: OSError) -> Setback:
    if isinstance(error, TimeoutError):
        return Setback("read_timeout", httpx2.ReadTimeout(f"{lease}: no answer in time"), elsewhere=False)
    said = f"{lease}: the connection broke before an answer came: {type(error).__name__}"
    if isinstance(error, BadHttp):
        return Setback("bad_answer", httpx2.RemoteProtocolError(said), elsewhere=False)
    return Setback("broke_off", httpx2.ReadError(said), elsewhere=False, again=not wire.fresh)


def _read_some_sync(wire: Wire) -> bytes:
    """The body of an answer that is not wanted, as far as it comes soon and is not long."""
    raw = b""
    wire.wait(CLOSE_S)
    with contextlib.suppress(OSError):
        for part in wire.body():
            raw += part
            if len(raw) > KEPT_ANSWER:
                break
    return raw[:KEPT_ANSWER]


def _buffered(request: httpx2.Request) -> bytes | None:
    body = Body()
    stream = request.stream
    assert isinstance(stream, httpx2.SyncByteStream)  # noqa: S101 httpx2 sees to it
    for part in stream:
        if not body.add(part):
            break
    return body.joined()
