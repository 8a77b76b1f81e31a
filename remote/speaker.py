"""Sends messages from the instance: the state of its model, and the events of its requests.

    model.log ─┐           ┌─► POST /ready   to the autoscaler: the model's state, and the certificate
               ├─► Watch ──┤
    events ────┘           └─► POST /report  to each loadbalancer that asked for it with POST /tokens

A message is signed with what there is of the master token here, its SHA-256. It names the boot and has a
number that grows, so that none counts twice. What gets lost is found by polling, and the state is said again
now and then: an autoscaler that was started anew knows nothing of it.
"""

import hashlib
import hmac
import http.client
import json
import os
import re
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from remote.events import Events, News, events_told
from remote.log_lines import ANSWERS, ENDED, GIVING_UP, READY_LINES

_TICK_S = 0.02
"""Between two looks, at least; each takes 50 to 100 µs."""

_QUIET_S = 1.0
"""Between two looks at the log of a model that is ready, while no event comes."""

_PROGRESS_S = 5.0
"""Between two messages that say no more than how far loading is."""

_REPEAT_S = 30.0
"""Between two messages that say the same."""

_ASK_S = 5.0
"""Between two requests to a model server that loads: it may answer although no line has said so."""

_POST_S = 2.0
"""For a message: one that takes longer is tried again, or left to polling."""

_RETRY_S = (0.25, 5.0)
"""After a message that did not get through: the first, doubling up to the second."""

TRIES = 3
"""Reports in a row that do not get through, after which a loadbalancer must ask for them anew."""

MOST_LISTENERS = 8
"""Loadbalancers that reports are sent to."""

MOST_EVENTS = 2_000
"""In a report; a loadbalancer that lags behind further asks for the rest."""

_READ_BYTES = 65_536
"""Of the log at a time."""

_LENGTH = re.compile(rb"(?i)\ncontent-length: *(\d+)|$")
"""Of the body. One sent in pieces is not understood; our servers, and proxies before them, send none such."""

_PERCENT = re.compile(rb"\b(\d{1,3})%")


def signed(key: str, path: str, body: bytes) -> str:
    """Return a message's Authorization header: the signer's name, which tells nothing, and a signature."""
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return f"Fleet {name}:{hmac.new(key.encode(), path.encode() + b' ' + body, hashlib.sha256).hexdigest()}"


class ModelState:
    """The state of the model server by its log: loading, ready or failed, and why.

    Nothing of a line but a percentage is ever repeated.
    """

    def __init__(self) -> None:
        """Begin with a model server that was just started and has logged nothing."""
        self.state, self.why = "loading", ""
        self.said_ready = False
        self._rest = b""

    def feed(self, raw: bytes) -> None:
        """Take in bytes that were written to the log."""
        *lines, self._rest = (self._rest + raw).split(b"\n")
        self._rest = self._rest[-_READ_BYTES:]
        for line in lines:
            # vLLM logs what requests say, but never at the beginning of a line.
            percent = None if self.said_ready else _PERCENT.search(line.rpartition(b"\r")[2])
            if line.startswith(GIVING_UP):
                self.state, self.why = "failed", line.decode(errors="replace")[:200]
            elif line.startswith(ENDED):
                self.state, self.why, self.said_ready = "loading", "the model server ended", False
            elif any(ready in line for ready in READY_LINES):
                self.said_ready = True
            elif percent and self.state == "loading" and not self.said_ready:
                self.why = f"{int(percent[1])} %"

    def answers(self) -> None:
        """Note that the model server answered a request after its ready line: it is ready."""
        self.state, self.why = "ready", ""


# --- outside world ---------------------------------------------------------------------------------


class Watch(threading.Thread):
    """A thread that follows log and events, and wakes the threads that wait for news of them."""

    def __init__(
        self,
        log: str,
        ring: Events,
        answers: Callable[[], bool],
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare the thread.

        log: path of model.log. answers: whether the model server answers now. ready: called when it is ready.
        """
        super().__init__(name="watch", daemon=True)
        self._ready = ready
        self._ask_at = 0.0
        self.changed = threading.Condition()
        self.model = ModelState()
        self._log = log
        self._ring = ring
        self._answers = answers
        self._inode = self._offset = 0

    @property
    def news(self) -> tuple[int, bool]:
        """The pair (number of the newest event, whether the model server is ready)."""
        return self._ring.peek(), self.model.state == "ready"

    def wait_for_other(self, read: Callable[[], object], than: object, limit_s: float | None = None) -> None:
        """Wait until read() returns something else than `than`, or for limit_s seconds.

        Nothing is missed between two calls.
        """
        with self.changed:
            self.changed.wait_for(lambda: read() != than, limit_s)

    def run(self) -> None:
        """Follow log and events for ever. An event is seen at once, those that follow it after a tick."""
        seen: tuple[object, ...] = ()
        while True:
            self._ring.forget()
            self._read_log()
            if self.model.state == "loading":
                self._ask()
            if seen != (seen := (*self.news, self.model.state, self.model.why)):
                with self.changed:
                    self.changed.notify_all()
            time.sleep(_TICK_S)
            # The end of a model server wakes us, too (events.fail_open).
            self._ring.wait(0.0 if self.model.state == "loading" else _QUIET_S)

    def _ask(self) -> None:
        """See whether the model server answers: at once after its ready line, now and then without one."""
        now, said = time.monotonic(), self.model.said_ready
        if not said and now < self._ask_at:
            return
        self._ask_at = now + _ASK_S
        if not self._answers():
            return
        self.model.answers()
        try:
            if not said:
                with open(self._log, "ab") as log:
                    log.write(b"\n%b\n" % ANSWERS)
            self._ready()
        except OSError:  # a full disk: it is ready all the same
            return

    def _read_log(self) -> None:
        try:
            now = os.stat(self._log)
            if now.st_ino != self._inode:  # each start of a model server has its own
                self._inode, self._offset, self.model = now.st_ino, 0, ModelState()
            if now.st_size > self._offset:
                with open(self._log, "rb") as f:
                    f.seek(self._offset)
                    raw = f.read(_READ_BYTES)
                self._offset += len(raw)
                self.model.feed(raw)
        except OSError:
            return


def say(url: str, key: str, boot_id: str, said: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Post one signed message on a connection of its own; return (status, answer) as `_Line.post` does."""
    line = _Line(url)
    try:
        return _say(line, key, boot_id, said)
    finally:
        line.close()


def _say(line: "_Line", key: str, boot_id: str, said: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    # The clock of this machine's kernel: it grows also when this process is started again.
    number = time.monotonic_ns() // 1000
    body = json.dumps({"boot_id": boot_id, "number": number, **said}).encode()
    return line.post(body, signed(key, line.path, body))


class Speaker:
    """Posts the model's state to the autoscaler, and requests' events to loadbalancers that asked."""

    def __init__(self, watch: Watch, ring: Events, key: str, boot_id: str, certificate: str = "") -> None:
        """Start nothing before `begin`.

        key: SHA-256 of the master token, which signs the messages. certificate: this machine's, PEM.
        """
        self._certificate = certificate
        self._watch = watch
        self._ring = ring
        self._key = key
        self._boot_id = boot_id
        self._listeners: dict[str, threading.Thread] = {}
        self._lock = threading.Lock()

    def begin(self, ready_url: str, *, again: bool) -> None:
        """Start to watch, and to post the model's state to ready_url, if there is one.

        again: an auth_server ran before in this boot.
        """
        self._watch.start()
        if ready_url:
            target = threading.Thread(target=self._say_ready, args=(_Line(ready_url), again), daemon=True)
            target.start()

    def listen(self, url: str) -> None:
        """Start to post reports to a loadbalancer's URL, unless they are posted there already."""
        with self._lock:
            self._listeners = {u: t for u, t in self._listeners.items() if t.is_alive()}
            if url in self._listeners or len(self._listeners) >= MOST_LISTENERS:
                return
            self._listeners[url] = threading.Thread(target=self._report, args=(_Line(url),), daemon=True)
            self._listeners[url].start()

    def _post(self, line: "_Line", said: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return _say(line, self._key, self._boot_id, said)

    def _say_ready(self, line: "_Line", again: bool) -> None:
        watch = self._watch
        said, said_at, pause_s = None, float("-inf"), _RETRY_S[0]
        note = "auth_server was started again" if again else ""

        def state() -> tuple[str, str]:
            return watch.model.state, watch.model.why or note

        while True:
            now = state()
            progress = said is not None and now[0] == said[0] == "loading"
            every_s = _REPEAT_S if now == said else _PROGRESS_S if progress else 0.0
            if (rest_s := said_at + every_s - time.monotonic()) > 0.0:
                watch.wait_for_other(state, now, rest_s)
                continue
            told = {"state": now[0], "why": now[1], "certificate": self._certificate}
            status, _ = self._post(line, told)
            if status == 200:
                said, said_at, pause_s, note = now, time.monotonic(), _RETRY_S[0], ""
            else:
                time.sleep(pause_s)
                pause_s = min(_RETRY_S[1], 2.0 * pause_s)

    def _report(self, line: "_Line") -> None:
        watch = self._watch
        sent: tuple[int, bool | None] = self._ring.peek(), None  # at first it is told whether the model is up
        failed = 0
        while failed < TRIES:
            watch.wait_for_other(lambda: watch.news, sent)
            now = watch.news
            news = self._ring.after(sent[0])
            too_many = len(news.events) > MOST_EVENTS
            report = events_told(News(news.seq, news.missed or too_many, () if too_many else news.events))
            status, told = self._post(line, {"after": sent[0], **report, "model_up": now[1]})
            if status == 200:
                sent, failed = (news.seq, now[1]), 0
                time.sleep(min(60.0, max(0.01, float(told.get("next_in_s", 1.0)))))
            elif 400 <= status < 500 and status != 409:
                break  # it does not know us: it asks again when it does
            else:  # 409: the answer that tells it of this boot, and made us speak, may still be under way
                failed += 1
                time.sleep(_RETRY_S[0])
        line.close()


class _Line:
    """A kept-alive HTTP connection to one URL, for one thread."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.path = parts.path
        self._host = parts.netloc
        self._connection = http.client.HTTPConnection(self._host, timeout=_POST_S)
        if parts.scheme == "https":
            # Its certificate may be one that nobody vouches for. A message is signed, and holds no secret.
            any_of_them = ssl._create_unverified_context()  # noqa: S323
            self._connection = http.client.HTTPSConnection(self._host, context=any_of_them, timeout=_POST_S)

    def post(self, body: bytes, authorization: str) -> tuple[int, dict[str, Any]]:
        """Post a body; return (status, answer), with status 0 when there was no answer."""
        # By hand, and at once: http.client takes 0.1 ms to write a head, and wakes who reads it once more.
        head = f"POST {self.path} HTTP/1.1\r\nHost: {self._host}\r\nAuthorization: {authorization}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        for _ in range(2):  # a connection that was idle may just have been closed by the other side
            try:
                self._connection.send(head.encode() + body)
                return self._answer()
            except (OSError, ValueError) as e:
                self.close()
                if isinstance(e, TimeoutError):
                    break
        return 0, {}

    def _answer(self) -> tuple[int, dict[str, Any]]:
        # By hand, too: http.client takes a head to be e-mail, and took more time than all else of a report.
        raw = head = end = body = b""
        while not end or len(body) < int(_LENGTH.findall(head)[0] or 0):
            raw += (more := self._connection.sock.recv(_READ_BYTES))
            if not more or len(raw) > _READ_BYTES:
                raise OSError  # none, or no end of it
            head, end, body = raw.partition(b"\r\n\r\n")
        said = json.loads(body or b"{}")
        return int(head[9:12]), said if isinstance(said, dict) else {}

    def close(self) -> None:
        """Close the connection; the next message opens another."""
        self._connection.close()
