"""What a service manager (systemd) is told of a server that it starts: ready, alive, about to end.

One datagram to the socket in NOTIFY_SOCKET each (sd_notify(3)). Without that variable nothing is told.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, MutableMapping

LOOK_S = 0.2
"""Seconds between two looks whether the server is ready."""

FED_IN_TIME = 3.0
"""How often a watchdog is fed within the time after which it bites: one message may be late."""


class ServiceManager:
    """The service manager of this process, as far as it wants to be told anything."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Take what concerns this process out of the environment: its children are none of the manager's."""
        address = environ.pop("NOTIFY_SOCKET", "")
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        mine = usec.isdecimal() and pid in ("", str(os.getpid()))
        self._feed_s = int(usec) / 1e6 / FED_IN_TIME if mine and int(usec) else None

    def tell(self, what: str) -> None:
        """Send one message, such as READY=1; a manager that cannot be reached changes nothing."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto(what.encode(), self._address)
        except OSError as e:
            logging.getLogger("http").debug("the service manager is not told %s: %s", what, e)

    async def keep_informed(
        self, ready: Callable[[], bool] = lambda: True, well: Callable[[], bool] = lambda: True
    ) -> None:
        """Tell when the server is ready, and feed the watchdog while it is well; runs on the server's loop.

        So a loop that hangs feeds no watchdog, whatever `well` would say.
        """
        if not self._address:
            return
        while not ready():
            await asyncio.sleep(LOOK_S)
        self.tell("READY=1")
        try:
            while True:
                if self._feed_s is not None and well():
                    self.tell("WATCHDOG=1")
                await asyncio.sleep(self._feed_s or 3600.0)
        finally:
            self.tell("STOPPING=1")


def set_up_logging() -> None:
    """Log to standard error, with the time where it is not the journal, which has its own."""
    try:
        error = os.fstat(2)
        to_journal = os.environ.get("JOURNAL_STREAM") == f"{error.st_dev}:{error.st_ino}"
    except OSError:
        to_journal = False
    at = "" if to_journal else "%(asctime)s "
    logging.basicConfig(level=logging.INFO, format=f"{at}%(name)s %(levelname)s %(message)s")
