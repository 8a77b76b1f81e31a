"""What an instance says by itself, to whom, and that the loadbalancer counts it once."""

import http.server
import json
import pickle
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from loadbalancer import LoadBalancer
from remote import events
from remote.events import Events
from remote.speaker import MOST_EVENTS, MOST_LISTENERS, TRIES, ModelState, Speaker, Watch, _Line, signed
from tests.dispatch_world import DispatchWorld, instance, world
from tests.messages import request_end
from tests.waiting import wait_for
from web.messages.decoding import decode
from web.messages.reports import PushedReport, ReadyBody, RequestEnd
from web.replay_guard import OLD_BOOTS, ReplayGuard
from web.signatures import instance_key, name_and_key, signer

MASTER = "master-of-a-test"
NAME, KEY = name_and_key(MASTER)
KEYS = {NAME: KEY}
READY = b"INFO:     Application startup complete.\n"
FOREVER_S = 60.0

# -- the log -----------------------------------------------------------------------------------------------


def state_after(*parts: bytes) -> tuple[str, str, bool]:
    """What the model's state is after its log had these."""
    model = ModelState()
    for part in parts:
        model.feed(part)
    return model.state, model.why, model.said_ready


def test_the_ready_line_alone_makes_nothing_ready_before_it_answers() -> None:
    model = ModelState()
    model.feed(b"(APIServer pid=7) " + READY)
    assert (model.state, model.said_ready) == ("loading", True)
    model.answers()
    assert (model.state, model.why) == ("ready", "")


def test_lines_are_found_wherever_the_log_is_cut() -> None:
    whole = b"loading 40%\n" + READY
    for cut in range(len(whole)):
        assert state_after(whole[:cut], whole[cut:]) == ("loading", "40 %", True)


def test_a_percentage_is_progress_until_the_ready_line_and_nothing_after_it() -> None:
    assert state_after(b"shards:   5% done\rshards:  35% done\n") == ("loading", "35 %", False)
    assert state_after(READY, b"GPU KV cache usage: 77%\n") == ("loading", "", True)
    model = ModelState()
    model.feed(b"12%\n" + READY)
    model.answers()
    model.feed(b"prefix cache hit rate: 50%\n")
    assert (model.state, model.why) == ("ready", "")


@pytest.mark.parametrize("line", [b"fleet: giving up: it ended 3 times", b"fleet: the model server ended"])
def test_an_end_counts_at_the_beginning_of_a_line_only(line: bytes) -> None:
    model = ModelState()
    model.feed(READY)
    model.answers()
    model.feed(b'ERROR 01-02 bad model "' + line + b'"\n')
    assert model.state == "ready"
    model.feed(line + b"\n")
    assert model.state == ("failed" if b"giving up" in line else "loading")


def test_what_a_client_wrote_into_the_log_is_never_repeated() -> None:
    model = ModelState()
    for line in (b"my secret 55% of it\n", b"ERROR secret fleet: giving up\n", READY, b"secret 9%\n"):
        model.feed(line)
        assert "secret" not in model.why
    model.feed(b"x" * 1_000_000)
    assert len(pickle.dumps(model)) <= 65_536 + 1000


# -- signatures --------------------------------------------------------------------------------------------


def test_what_an_instance_signs_is_known_to_be_its_own() -> None:
    header = signed(KEY, "/ready", b"body")
    assert instance_key(MASTER) == KEY
    assert signer(header, "/ready", b"body", KEYS) == NAME
    assert KEY not in header
    assert MASTER not in header


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        f"Bearer {MASTER}",
        f"Fleet {NAME}:",
        signed(KEY, "/report", b"body"),
        signed(KEY, "/ready", b"other"),
        signed(instance_key("another"), "/ready", b"body"),
        f"Fleet {NAME}:" + signed(instance_key("another"), "/ready", b"body").partition(":")[2],
        signed(KEY, "/ready", b"body").upper(),
        signed(KEY, "/ready", b"body") + "\n",
    ],
)
def test_another_path_body_or_key_is_nobodys_signature(header: str | None) -> None:
    assert signer(header, "/ready", b"body", KEYS) is None


def test_a_message_counts_once_and_an_old_boot_not_again() -> None:
    guard = ReplayGuard()
    said = [("a", 1), ("a", 1), ("a", 3), ("a", 2), ("b", 1), ("a", 9), ("b", 1), ("b", 2)]
    assert [guard.accept(*one) for one in said] == [True, False, True, False, True, False, False, True]
    for n in range(OLD_BOOTS + 2):
        assert guard.accept(f"boot{n}", 0)
    assert not any(guard.accept(f"boot{n}", 9) for n in range(1, OLD_BOOTS + 1))
    assert guard.accept("boot0", 0), "only so many boots are remembered to be over"


# -- threads and sockets -----------------------------------------------------------------------------------


class Listener:
    """Hears messages. answer: (status, JSON) for the number of a message; it may wait."""

    def __init__(self, answer: Callable[[int], tuple[int, dict[str, Any]]]) -> None:
        """Listens on loopback."""
        self.heard: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self.at: list[float] = []
        self.paths: list[str] = []
        self.signers: list[str | None] = []
        outer = self

        class Answer(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                outer.signers.append(signer(self.headers["Authorization"], self.path, raw, KEYS))
                outer.at.append(time.monotonic())
                outer.paths.append(self.path)
                outer.bodies.append(raw)
                outer.heard.append(json.loads(raw))
                status, said = answer(len(outer.heard))
                body = json.dumps(said).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@contextmanager
def listening(
    answer: Callable[[int], tuple[int, dict[str, Any]]] = lambda _: (200, {"next_in_s": 0.0}),
) -> Iterator[Listener]:
    """A listener, and its end."""
    made = Listener(answer)
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()
        made.thread.join()


class Instance:
    """A log and a ring, and what speaks of them."""

    def __init__(self, path: Path) -> None:
        events.make_ring(str(path))
        self.log = path / "model.log"
        self.log.write_bytes(b"starting\n")
        self.ring = Events(str(path))
        self.up = False
        self.count = 0
        self.speak()

    def speak(self) -> None:
        """The auth_server was started, in the same boot."""
        self.watch = Watch(str(self.log), self.ring, lambda: self.up)
        self.speaker = Speaker(self.watch, self.ring, KEY, "boot1")

    def write(self, text: bytes) -> None:
        """More of the log."""
        with self.log.open("ab") as f:
            f.write(text)

    def new_log(self) -> None:
        """The model server is started again."""
        self.log.rename(self.log.with_suffix(".old"))
        self.log.write_bytes(b"starting\n")

    def event(self, kind: int = events.STARTED) -> str:
        """One more, of a request of its own."""
        self.count += 1
        self.ring.write(f"{self.count:016x}", kind, 5)
        return f"{self.count:016x}"


@pytest.fixture
def one(tmp_path: Path) -> Instance:
    return Instance(tmp_path)


def states(listener: Listener) -> list[str]:
    return [m["state"] for m in listener.heard]


def started(listener: Listener) -> list[str]:
    return [r for m in listener.heard for r in m["started"]]


def test_it_says_ready_after_the_ready_line_and_once_it_answers(one: Instance) -> None:
    with listening() as autoscaler:
        one.speaker.begin(f"{autoscaler.url}/ready", again=False)
        wait_for("it says that it loads", lambda: autoscaler.heard)
        one.write(READY)
        wait_for("the line is seen", lambda: one.watch.model.said_ready)
        assert states(autoscaler) == ["loading"]
        one.up = True
        wait_for("it says ready", lambda: states(autoscaler) == ["loading", "ready"])
        one.write(b"fleet: the model server ended\n")
        wait_for("it says loading", lambda: states(autoscaler)[2:] == ["loading"])
        one.up = False
        one.new_log()
        wait_for("another log is another model server", lambda: not one.watch.model.why)
        assert not one.watch.model.said_ready
        one.write(READY)
        one.up = True
        wait_for("it says ready again", lambda: states(autoscaler)[-1] == "ready")
        one.write(b"fleet: giving up: enough\n")
        wait_for("it says failed", lambda: states(autoscaler)[-1] == "failed")
        assert autoscaler.heard[-1]["why"] == "fleet: giving up: enough"
        assert set(autoscaler.signers) == {NAME}
        numbers = [m["number"] for m in autoscaler.heard]
        assert numbers == sorted(set(numbers))


def test_what_does_not_get_through_is_said_again(one: Instance) -> None:
    with listening(lambda n: (500 if n < 3 else 200, {})) as autoscaler:
        one.speaker.begin(f"{autoscaler.url}/ready", again=False)
        wait_for("three tries", lambda: len(autoscaler.heard) == 3)
        assert states(autoscaler) == ["loading"] * 3


def test_numbers_grow_also_when_it_is_started_again_and_it_says_so(one: Instance) -> None:
    with listening() as autoscaler:
        one.speaker.begin(f"{autoscaler.url}/ready", again=False)
        wait_for("it speaks", lambda: autoscaler.heard)
        one.speak()
        one.speaker.begin(f"{autoscaler.url}/ready", again=True)
        wait_for("it speaks again", lambda: len(autoscaler.heard) == 2)
        first, second = autoscaler.heard
        assert second["number"] > first["number"]
        assert (first["why"], second["why"]) == ("", "auth_server was started again")


def test_each_event_is_reported_once(one: Instance) -> None:
    with listening() as lb:
        one.speaker.begin("", again=False)
        one.speaker.listen(f"{lb.url}/report")
        wait_for("it reports at once", lambda: lb.heard)
        ids = []
        for _ in range(5):
            ids.append(one.event())
            wait_for("it is reported", lambda: started(lb) == ids)
        assert [(m["after"], m["seq"]) for m in lb.heard] == [(0, 0)] + [(n, n + 1) for n in range(5)]
        one.write(READY)
        one.up = True
        wait_for("the model is up", lambda: lb.heard[-1]["model_up"])
        assert set(lb.signers) == {NAME}


def test_what_it_says_is_what_the_other_ends_structs_say(one: Instance) -> None:
    with listening() as autoscaler, listening() as lb:
        one.speaker.begin(f"{autoscaler.url}/ready", again=False)
        one.speaker.listen(f"{lb.url}/report")
        wait_for("it reports at once", lambda: lb.heard and autoscaler.heard)
        begun, ended = one.event(), one.event(events.FINISHED)
        wait_for("it is told", lambda: lb.heard[-1]["seq"] == 2)
    for raw in autoscaler.bodies:
        assert decode(raw, ReadyBody).state == "loading"
    reports = [decode(raw, PushedReport) for raw in lb.bodies]
    assert [i for r in reports for i in r.started] == [begun]
    assert [size for r in reports for size in r.started_bytes] == [5]
    assert [end for r in reports for end in r.ended] == [RequestEnd(ended, "finished", 5)]


def seconds_until_said(one: Instance, lb: Listener, do: Callable[[], object]) -> float:
    """What passes until the next message, to one who has heard all."""
    heard, begun = len(lb.heard), time.monotonic()
    do()
    wait_for("it is told", lambda: len(lb.heard) > heard)
    return lb.at[heard] - begun


@pytest.mark.parametrize(
    ("parts", "understood"),
    [
        (
            [b"HTTP/1.1 200 OK\r\ncontent-length: 18\r\n\r\n", b'{"next_in_s": 0.5}'],
            (200, {"next_in_s": 0.5}),
        ),
        (
            [b"HTTP/1.1 200 OK\r\nCONTENT-Length:2\r", b"\nX: content-length: 9\r\n\r", b"\n{", b"}"],
            (200, {}),
        ),
        ([b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"], (401, {})),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"], (200, {})),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"], (0, {})),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"], (0, {})),
        ([b"HTTP/1.1 200 OK\r\n" + b"x" * 70_000], (0, {})),
        ([b"nonsense\r\n\r\n"], (0, {})),
    ],
    ids=["plain", "in pieces", "no body", "no object", "chunked", "broken off", "endless", "not http"],
)
def test_an_answer_is_understood_or_there_was_none(
    parts: list[bytes], understood: tuple[int, dict[str, Any]]
) -> None:
    """What cannot be read is asked for once more on a new connection, and then there was no answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(1 if understood[0] else 2):
                sock, _ = server.accept()
                with sock:
                    sock.recv(65_536)
                    for part in parts:
                        sock.sendall(part)
                        time.sleep(0.02)

        thread = threading.Thread(target=answer)
        thread.start()
        line = _Line(f"http://127.0.0.1:{server.getsockname()[1]}/report")
        assert line.post(b"{}", "Fleet a:b") == understood
        line.close()
        thread.join(20.0)


@pytest.mark.alone
def test_where_nothing_happens_the_next_event_is_reported_at_once(one: Instance) -> None:
    """And the end of the model server, though no request was under way: long before the log is looked at."""
    one.write(READY)
    one.up = True
    with listening() as lb:
        one.speaker.begin("", again=False)
        one.speaker.listen(f"{lb.url}/report")
        wait_for("the model is up", lambda: lb.heard and lb.heard[-1]["model_up"])
        took = []
        for kind in (events.STARTED, events.FINISHED, events.STARTED, events.FAILED):
            time.sleep(0.15)  # it is quiet again
            took.append(seconds_until_said(one, lb, lambda kind=kind: one.event(kind)))  # type: ignore[misc]
        assert sorted(took)[2] < 0.3, took
        wait_for("it has all", lambda: lb.heard[-1]["seq"] == one.count)

        def die() -> None:
            one.up = False
            one.write(b"fleet: the model server ended\n")
            one.ring.fail_open()

        one.ring = Events(str(one.log.parent))  # as another process opens it
        die()
        wait_for("it says that the model is down", lambda: not lb.heard[-1]["model_up"])


def test_events_are_written_also_while_nobody_hears_of_them(one: Instance) -> None:
    """The pipe that wakes the watch is full then."""
    for _ in range(70_000):
        one.ring.wake()
    mine = one.event()
    with listening() as lb:
        one.speaker.begin("", again=False)
        one.speaker.listen(f"{lb.url}/report")
        last = one.event()
        wait_for("it is told", lambda: lb.heard and lb.heard[-1]["seq"] == 2)
        assert [e.request_id for e in one.ring.after(0).events] == [mine, last]


def test_asking_twice_makes_one_listener_and_there_are_only_so_many(one: Instance) -> None:
    with listening() as lb:
        one.speaker.begin("", again=False)
        for n in (0, 0, *range(MOST_LISTENERS + 5)):
            one.speaker.listen(f"{lb.url}/report/{n}")
        wait_for("each has been told once", lambda: len(lb.heard) == MOST_LISTENERS)
        one.event()
        wait_for("each has been told of it", lambda: len(started(lb)) == MOST_LISTENERS)
        assert Counter(lb.paths) == {f"/report/{n}": 2 for n in range(MOST_LISTENERS)}


@pytest.mark.parametrize(("status", "tries"), [(401, 1), (404, 1), (409, TRIES), (500, TRIES)])
def test_a_listener_that_refuses_is_dropped_until_it_asks_again(
    one: Instance, status: int, tries: int
) -> None:
    """409 is also said by one whose tokens are still under way, so that is tried again."""
    one.up = True
    one.write(READY)
    with listening(lambda n: (status if n <= tries else 200, {"next_in_s": 0.0})) as lb:
        one.speaker.begin("", again=False)
        wait_for("it is ready", lambda: one.watch.news[1])
        url = f"{lb.url}/report"
        one.speaker.listen(url)
        wait_for("it has refused", lambda: len(lb.heard) == tries)
        missed = one.event()

        def hears_again() -> bool:
            one.speaker.listen(url)  # nothing happens until the one that was refused has ended
            return len(lb.heard) > tries

        wait_for("it hears again", hears_again)
        mine = one.event()
        wait_for("and what is new", lambda: mine in started(lb))
        assert missed not in started(lb), "it was dropped when that happened"


def test_a_listener_whose_tokens_were_still_under_way_hears_everything(one: Instance) -> None:
    with listening(lambda n: (409 if n < TRIES else 200, {"next_in_s": 0.0})) as lb:
        one.speaker.begin("", again=False)
        one.speaker.listen(f"{lb.url}/report")
        mine = one.event()
        wait_for("it is told", lambda: mine in started(lb) and len(lb.heard) > 1)


def test_it_speaks_as_seldom_as_it_is_told_to(one: Instance) -> None:
    with listening(lambda n: (200, {"next_in_s": 0.6})) as lb:
        one.speaker.begin("", again=False)
        one.speaker.listen(f"{lb.url}/report")
        wait_for("the first", lambda: lb.heard)
        mine = [one.event() for _ in range(20)]
        wait_for("the rest", lambda: started(lb) == mine)
        assert lb.at[1] - lb.at[0] >= 0.6
        assert len(lb.heard) == 2


def test_it_never_floods_whatever_it_is_told(one: Instance) -> None:
    """Each report comes 10 ms after the answer to the last one at least, however many events there are."""
    with listening(lambda n: (200, {"next_in_s": -5.0})) as lb:
        one.speaker.begin("", again=False)
        one.speaker.listen(f"{lb.url}/report")
        while len(lb.heard) < 20:
            one.event()
        gaps = [b - a for a, b in pairwise(lb.at[:20])]
        assert min(gaps) >= 0.009


def test_who_lags_behind_too_far_is_told_to_ask(one: Instance) -> None:
    with listening(lambda n: (200, {"next_in_s": 0.3})) as lb:
        one.speaker.begin("", again=False)
        one.speaker.listen(f"{lb.url}/report")
        wait_for("the first", lambda: lb.heard)
        for _ in range(MOST_EVENTS + 1):
            one.event()
        wait_for("it has all", lambda: lb.heard[-1]["seq"] == MOST_EVENTS + 1)
        assert any(m["missed"] and not m["started"] for m in lb.heard)


def test_a_listener_that_hangs_delays_neither_another_nor_the_autoscaler(one: Instance) -> None:
    let_go = threading.Event()

    def hang(_: int) -> tuple[int, dict[str, Any]]:
        let_go.wait(FOREVER_S)
        return 200, {}

    with listening(hang) as hanging, listening() as lb, listening() as autoscaler:
        try:
            one.speaker.begin(f"{autoscaler.url}/ready", again=False)
            one.speaker.listen(f"{hanging.url}/report")
            wait_for("it hangs", lambda: hanging.heard)
            one.speaker.listen(f"{lb.url}/report")
            mine = one.event()
            one.write(READY)
            one.up = True
            wait_for("the others are told", lambda: mine in started(lb) and "ready" in states(autoscaler))
            assert len(hanging.heard) == 1, "its first message is still under way"
        finally:
            let_go.set()


# -- what the loadbalancer makes of it ---------------------------------------------------------------------


def push(number: int, after: int = 0, seq: int = 0, **what: Any) -> PushedReport:
    """A report that is pushed, of an instance in good order unless said otherwise."""
    said: dict[str, Any] = {
        "boot_id": "boot1",
        "missed": False,
        "started": (),
        "ended": (),
        "model_up": True,
    }
    return PushedReport(number=number, after=after, seq=seq, **(said | what))


def due(b: DispatchWorld) -> list[tuple[int, int]]:
    """(instance, after) of the polls that are due, looked for once around."""
    return [(p.instance_id, p.after) for _ in range(40) for p in b.balancer.polls(b.now)]


def test_a_pushed_end_frees_its_work_at_once() -> None:
    b = world(instance(1))
    lease = b.lease(1000.0)
    assert b.ask(100.0) is None
    told = push(1, 0, 2, started=(lease.request_id,), ended=(request_end(lease.request_id),))
    assert b.balancer.pushed(1, told, b.now) is not None
    assert b.balancer.usage(b.now).instances[1].unfinished == 0
    assert b.balancer.leases.ends == {"finished": 1}
    assert b.ask(1000.0) is not None


def test_a_report_that_is_not_new_or_of_another_boot_changes_nothing() -> None:
    b = world(instance(1))
    lease = b.lease()
    ended = (request_end(lease.request_id),)
    assert b.balancer.pushed(1, push(5), b.now) is not None
    for told in (
        push(5, 0, 1, ended=ended),
        push(4, 0, 1, ended=ended),
        push(6, 0, 1, ended=ended, boot_id="other", model_up=False),
    ):
        assert b.balancer.pushed(1, told, b.now) is None
    assert b.balancer.pushed(2, push(9, 0, 1, ended=ended), b.now) is None
    assert b.row(1)["unfinished"] == 1
    assert b.row(1)["in_queue"] is True
    assert b.row(1)["reports_pushed"] == 1


def test_after_another_boot_its_numbers_begin_anew() -> None:
    b = world(instance(1))
    assert b.balancer.pushed(1, push(10**9), b.now) is not None
    b.report(1, boot_id="boot2")
    assert b.balancer.pushed(1, push(3), b.now) is None
    assert b.balancer.pushed(1, push(3, boot_id="boot2"), b.now) is not None


@pytest.mark.parametrize("told", [push(1, 3, 5), push(1, 0, 5, missed=True)])
def test_what_a_report_leaves_out_is_polled_at_once(told: PushedReport) -> None:
    b = world(instance(1), instance(2))
    b.lease()
    assert due(b) == []
    b.balancer.pushed(1, told, b.now)
    assert due(b) == [(1, 0)]


def test_who_begins_to_work_is_polled_at_once_although_nothing_was_due_a_moment_ago() -> None:
    b = world(instance(1))
    b.report(1)
    b.now += 2.0
    assert due(b) == [], "an idle one is polled every five seconds"
    b.lease()
    assert due(b) == [(1, 0)]


def test_a_model_server_that_is_down_gets_nothing_until_a_report_is_good_again() -> None:
    b = world(instance(1))
    b.balancer.pushed(1, push(1, model_up=False), b.now)
    assert b.row(1)["in_queue"] is False
    assert b.ask() is None
    b.balancer.pushed(1, push(2), b.now)
    b.report(1, model_up=False)
    assert b.ask() is None
    b.now += 31.0
    b.report(1)
    assert b.row(1)["in_queue"] is True
    assert b.ask() is not None


@pytest.mark.parametrize("first", ["push", "poll", "client"])
def test_an_end_that_is_told_in_several_ways_counts_once(first: str) -> None:
    def learned(*ways: str) -> tuple[dict[str, int], float, float]:
        b = world(instance(1))
        lease = b.lease(100.0, max_tokens=50)
        told = {"started": (lease.request_id,), "ended": (request_end(lease.request_id, "finished", 40),)}
        for n, way in enumerate(ways):
            if way == "push":
                b.balancer.pushed(1, push(n + 1, 0, 2, **told), b.now)
            elif way == "poll":
                b.report(1, seq=2, **told)
            else:
                b.end(lease)
        return dict(b.balancer.leases.ends), b.balancer.work_of(0, 50), b.work(1)

    others = [way for way in ("push", "poll", "client") if way != first]
    once = learned("poll")
    assert once[0] == {"finished": 1}
    assert learned(first, *others, *others) == once
    assert learned(first, *others[::-1], first) == once


def test_a_poll_that_was_overtaken_by_a_report_costs_nothing() -> None:
    b = world(instance(1))
    lease = b.lease()
    b.balancer.pushed(
        1, push(1, 0, 2, started=(lease.request_id,), ended=(request_end(lease.request_id),)), b.now
    )
    b.report(1, seq=1, started=(lease.request_id,))
    b.balancer.pushed(1, push(2, 2, 3), b.now)
    assert b.row(1)["unfinished"] == 0
    b.report(1, seq=3, ended=(request_end(lease.request_id),))
    assert b.balancer.leases.ends == {"finished": 1}


def test_many_working_instances_are_told_to_speak_less_often() -> None:
    few, many = world(instance(1)), world(*(instance(i) for i in range(1, 101)))
    for _ in range(100):
        many.lease(500.0)
    assert few.balancer.pushed(1, push(1), few.now) == pytest.approx(0.1)
    assert many.balancer.pushed(1, push(1), many.now) == pytest.approx(0.25)
    # What others give there is known from there only.
    assert few.balancer.pushed(1, push(2, started=("other",)), few.now) == pytest.approx(0.02)
    assert many.balancer.pushed(1, push(2, started=("other",)), many.now) == pytest.approx(0.1)


def test_someone_unknown_is_not_believed() -> None:
    assert LoadBalancer(random.Random(1), str).pushed(1, push(1), 0.0) is None
