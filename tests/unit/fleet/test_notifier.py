"""Messages to people: over the real library, to services that answer, hang, refuse and lie."""

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from autoscaler_server import main
from fleet.alarms import Notice
from fleet.outside.alarm_watch import AlarmWatch
from fleet.outside.config import AutoscalerConfig, holds_secret
from fleet.outside.ledger import Ledger
from fleet.outside.notifier import MOST_WAITING, Postbox, senders
from fleet.outside.reasons import OwnReasons
from policies import Fixed
from process.errors import CloudError, ConfigError
from tests.fleet_world import World
from tests.unit.fleet.test_turns import Loop
from tests.waiting import wait_for

SECRET = "hook-secret-4711"
TAKEN = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Hook:
    """A webhook on loopback that keeps what it gets; `answer` is sent back, nothing where it is empty."""

    def __init__(self, answer: bytes = TAKEN) -> None:
        self.got: list[dict[str, str]] = []
        self.connections = 0
        self._answer = answer
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._kept: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def url(self) -> str:
        return f"json://127.0.0.1:{self._listening.getsockname()[1]}/{SECRET}"

    def close(self) -> None:
        self._listening.close()
        for one in self._kept:
            one.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            self._kept.append(connection)
            if self._answer:
                self._take(connection)

    def _take(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as said:
            length = 0
            while (line := said.readline()).strip():
                if line.lower().startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            if length:  # no redirect that was followed
                self.got.append(json.loads(said.read(length)))
            connection.sendall(self._answer)


@contextmanager
def hook(**more: bytes) -> Iterator[Hook]:
    made = Hook(**more)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def postboxes(*urls: str, try_again_s: tuple[float, ...] = ()) -> Iterator[list[Postbox]]:
    made = [Postbox(name, send, try_again_s) for name, send in senders(urls, "fleet")]
    for one in made:
        one.start()
    try:
        yield made
    finally:
        for one in made:
            one.end(0.0)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    made = Loop(ledger, World().with_pool(hot=2, total=3), Fixed(2, 3))
    made.scaler.turn()
    yield made
    ledger.close()


def watch_of(loop: Loop, boxes: list[Postbox]) -> AlarmWatch:
    return AlarmWatch(loop.scaler, OwnReasons(loop.scaler, 5.0), boxes, 600.0, 0)


def pass_seconds(loop: Loop, watch: AlarmWatch, seconds: int) -> None:
    """Time goes on, with a turn and a look every five seconds."""
    for _ in range(seconds // 5):
        loop.world.now += 5.0
        loop.scaler.turn()
        watch.look()


def notice(number: int = 0) -> Notice:
    return Notice("create_loop", begins=True, text=f"machine {number}", at=float(number))


def test_a_webhook_hears_once_that_no_turn_goes_well_and_once_that_it_is_over(loop: Loop) -> None:
    with hook() as service, postboxes(service.url) as boxes:
        watch = watch_of(loop, boxes)
        pass_seconds(loop, watch, 60)
        loop.cloud.listing_error = CloudError("vastai show instances: 500")
        pass_seconds(loop, watch, 900)
        wait_for("the message", lambda: service.got)
        loop.cloud.listing_error = None
        pass_seconds(loop, watch, 900)
        wait_for("its end", lambda: len(service.got) > 1)
    began, over = service.got
    assert (began["title"], began["type"]) == ("fleet fleet: not well: no good turn", "warning")
    assert "vastai show instances: 500" in began["message"]
    assert (over["title"], over["type"]) == ("fleet fleet: not well: no good turn is over", "success")


def note_credit(loop: Loop, usd: float) -> None:
    """The account was asked for its credit, and a turn taken."""
    loop.scaler.instances.note_credit(usd, loop.scaler.clock())
    loop.scaler.turn()


def test_after_a_restart_nothing_is_told_twice(loop: Loop) -> None:
    with hook() as service, postboxes(service.url) as boxes:
        note_credit(loop, -1.0)
        pass_seconds(loop, watch_of(loop, boxes), 200)
        wait_for("the message", lambda: service.got)
        note_credit(loop, 10.0)
        pass_seconds(loop, watch_of(loop, boxes), 600)
        wait_for("its end", lambda: len(service.got) == 2)
        boxes[0].put(notice())
        wait_for("the last one", lambda: len(service.got) == 3)
    assert [("is over" in one["title"]) for one in service.got] == [False, True, False]


def test_a_service_that_hangs_delays_neither_a_look_nor_another_service_nor_the_end(loop: Loop) -> None:
    with hook(answer=b"") as hangs, hook() as service:
        with postboxes(hangs.url, service.url) as boxes:
            watch = watch_of(loop, boxes)
            note_credit(loop, -1.0)
            begun = time.monotonic()
            pass_seconds(loop, watch, 200)
            for n in range(3 * MOST_WAITING):
                boxes[0].put(notice(n))
            assert time.monotonic() - begun < 5.0
            wait_for("the message", lambda: service.got, 5.0)
            assert hangs.connections == 1
            begun = time.monotonic()
        assert time.monotonic() - begun < 2.0


def test_what_is_not_taken_is_tried_again_and_then_given_up(caplog: pytest.LogCaptureFixture) -> None:
    refused = b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with hook(answer=refused) as service, postboxes(service.url, try_again_s=(0.01, 0.01)) as boxes:
        boxes[0].put(notice())
        wait_for("the end of it", lambda: "did not take a message: create_loop" in caplog.text)
        assert len(service.got) == 3


MOVED = b"HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n"
BROKEN = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nno colon here\r\n\x00: \xff\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("answer", [BROKEN, b"nonsense\r\n\r\n", MOVED])
def test_no_log_shows_the_secret_of_a_url(answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with hook(answer=answer) as service, hook() as other:
        url = service.url
        gone = "json://user:hook-secret-4711@127.0.0.1:9/hook-secret-4711"
        with postboxes(url, gone, other.url) as boxes:
            for one in boxes:
                one.put(notice())
            wait_for("all tried", lambda: other.got and service.got)
            wait_for("the gone one", lambda: "notifier 2 (JSON) did not take" in caplog.text)
    assert SECRET not in caplog.text


def test_a_url_that_means_nothing_is_refused_by_its_number(caplog: pytest.LogCaptureFixture) -> None:
    for wrong in (f"bogus://{SECRET}", SECRET, f"slack://{SECRET}"):
        with pytest.raises(ConfigError, match="URL 2 of --notify") as e:
            senders(["json://127.0.0.1:9", wrong], "fleet")
        assert SECRET not in str(e.value) + caplog.text


def test_turns_go_well_from_the_first_listing_until_a_minute_without_one(tmp_path: Path) -> None:
    """By this systemd is told READY=1 and its watchdog is fed."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    loop = Loop(ledger, World().with_pool(hot=2, total=3), Fixed(2, 3))
    own = OwnReasons(loop.scaler, 5.0)
    assert not own.turns_go_well
    loop.scaler.turn()
    assert own.turns_go_well
    loop.cloud.listing_error = CloudError("vastai show instances: 500")
    loop.world.now += 61.0
    loop.scaler.turn()
    assert not own.turns_go_well
    ledger.close()


# -- where the URLs may stand -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("json://127.0.0.1:9000", False),
        ("jsons://alerts.local/", False),
        ("json://127.0.0.1:9000/path", True),
        ("json://me:word@127.0.0.1:9000", True),
        ("json://127.0.0.1?-key=word", True),
        ("slack://token", True),
        ("https://hooks.slack.com", True),
    ],
)
def test_only_a_plain_webhook_holds_no_secret(url: str, secret: bool) -> None:
    assert holds_secret(url) is secret


def test_a_secret_is_refused_on_the_command_line_and_in_a_file_that_others_read(tmp_path: Path) -> None:
    url = f"json://127.0.0.1:9/{SECRET}"
    with pytest.raises(ConfigError, match=r"^--notify: others can read a command line") as on_line:
        main(["--notify", url])
    config = tmp_path / "fleet.toml"
    config.write_text(f'notify = ["{url}"]\n')
    config.chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by others: chmod 600") as in_file:
        main(["--config", str(config)])
    listed = tmp_path / "urls"
    listed.write_text(url)
    listed.chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by others: chmod 600") as in_list:
        _ = AutoscalerConfig(notify_file=listed).notify_urls
    assert not any(SECRET in str(e.value) for e in (on_line, in_file, in_list))


def test_the_urls_of_all_places_count_and_no_text_of_the_settings_shows_them(tmp_path: Path) -> None:
    listed = tmp_path / "urls"
    listed.write_text(f"# chat\nslack://{SECRET}/b/c\n\nmailto://x\n")
    listed.chmod(0o600)
    config = AutoscalerConfig(notify=(f"json://127.0.0.1/{SECRET}",), notify_file=listed)
    assert config.notify_urls == (f"json://127.0.0.1/{SECRET}", f"slack://{SECRET}/b/c", "mailto://x")
    assert SECRET not in repr(config)
