"""What systemd is told, over a real datagram socket; and that a hung or unwell server feeds no watchdog."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet_client.private_files import load_keys
from fleet_client.service_manager import ServiceManager, set_up_logging
from process.errors import ConfigError
from tests.paths import ROOT
from tests.ports import free_port
from tests.waiting import wait_for


class Manager:
    """A service manager's end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind("\0" + address[1:] if address.startswith("@") else address)
        self.sock.setblocking(False)
        self.environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "90000", "HOME": "/"}
        self.told: list[str] = []

    def hear(self) -> list[str]:
        """All that was told so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.told.append(self.sock.recv(4096).decode())
        return self.told


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    made = Manager(f"@fleet-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify"))
    yield made
    made.sock.close()


def for_a_while(running: Coroutine[Any, Any, None], until: Callable[[], object]) -> None:
    """Run until that is true, then cancel, as a server's end does."""

    async def run() -> None:
        task = asyncio.create_task(running)
        limit = time.monotonic() + 20.0
        while not until():
            assert time.monotonic() < limit
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


def test_it_is_told_ready_once_then_fed_and_told_the_end(manager: Manager) -> None:
    one = ServiceManager(manager.environ)
    assert manager.environ == {"HOME": "/"}  # children of this process are not the manager's
    for_a_while(one.keep_informed(), lambda: manager.hear().count("WATCHDOG=1") >= 3)
    told = manager.hear()
    assert (told[0], told[-1], set(told[1:-1])) == ("READY=1", "STOPPING=1", {"WATCHDOG=1"})


def test_ready_waits_for_what_must_be_known(manager: Manager) -> None:
    looks: list[bool] = []

    def ready() -> bool:
        looks.append(not manager.hear())
        return len(looks) > 2

    for_a_while(ServiceManager(manager.environ).keep_informed(ready), lambda: "READY=1" in manager.hear())
    assert looks == [True] * 3


def test_what_is_not_well_feeds_no_watchdog(manager: Manager) -> None:
    asked: list[None] = []

    def well() -> bool:
        asked.append(None)
        return len(asked) <= 2

    running = ServiceManager(manager.environ).keep_informed(well=well)
    for_a_while(running, lambda: len(asked) > 6)
    assert manager.hear().count("WATCHDOG=1") == 2


def test_a_watchdog_of_another_process_is_not_fed(manager: Manager) -> None:
    one = ServiceManager(manager.environ | {"WATCHDOG_PID": "1"})
    for_a_while(one.keep_informed(), manager.hear)
    assert "WATCHDOG=1" not in manager.hear()


@pytest.mark.parametrize("environ", [{}, {"WATCHDOG_USEC": "many"}, {"WATCHDOG_USEC": "9"}], ids=str)
def test_without_a_manager_nothing_happens(environ: dict[str, str]) -> None:
    asyncio.run(ServiceManager(environ).keep_informed())


def test_a_manager_that_cannot_be_reached_changes_nothing() -> None:
    ServiceManager({"NOTIFY_SOCKET": "/nowhere/notify"}).tell("READY=1")


def test_a_gateway_tells_when_it_listens_and_when_it_ends(tmp_path: Path) -> None:
    manager, port = Manager(str(tmp_path / "notify")), free_port()
    program = [sys.executable, str(ROOT / "gateway.py"), "--port", str(port)]
    running = subprocess.Popen(
        program, env=os.environ | manager.environ | {"WATCHDOG_USEC": "300000"}, stderr=subprocess.DEVNULL
    )
    try:
        wait_for("ready and fed", lambda: manager.hear().count("WATCHDOG=1") >= 2)
        assert manager.told[0] == "READY=1"
        socket.create_connection(("127.0.0.1", port), 5.0).close()
        running.send_signal(signal.SIGSTOP)  # it hangs
        before = len(manager.hear())
        time.sleep(0.5)
        assert len(manager.hear()) <= before + 1
        running.send_signal(signal.SIGCONT)
        running.terminate()
        assert running.wait(30) == 0
        assert manager.hear()[-1] == "STOPPING=1"
    finally:
        running.kill()
        running.wait()
        manager.sock.close()


def test_a_credential_of_systemd_may_show_the_mask_of_its_access_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd 252: root's, 0440 with an access list for the service's user."""
    key = tmp_path / "operator.keys"
    key.write_text("k" * 32)
    key.chmod(0o440)
    with pytest.raises(ConfigError, match="can be read by others"):
        load_keys(key)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert load_keys(key) == {"k" * 32}
    key.chmod(0o444)
    with pytest.raises(ConfigError, match="can be read by others"):
        load_keys(key)


@pytest.mark.parametrize("journal", [True, False])
def test_lines_have_the_time_except_in_the_journal(
    journal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats: list[str] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **said: formats.append(said["format"]))
    error = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{error.st_dev}:{error.st_ino + (not journal)}")
    set_up_logging()
    assert [("asctime" in one) for one in formats] == [not journal]
