"""Sends messages to people over the services that `--notify` names; each has a thread and a queue.

The URLs are secrets: no log line, error or answer has one. Messages to a service that hangs wait in its
queue, the oldest make place, and nobody else waits for it.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from fleet.alarms import Notice
from process.errors import ConfigError

log = logging.getLogger("autoscaler")

MOST_WAITING = 100
"""Messages that wait for one service: with some minutes between two of a kind, those of hours."""

TRY_AGAIN_S = (5.0, 30.0, 120.0, 600.0)
"""Seconds from a message that was not taken to its next try; then it is given up."""

TALKATIVE = ("apprise", "urllib3", "requests_oauthlib")
"""Loggers of libraries that write parts of a URL, which is a secret, into their lines."""

NOT_KNOWN = "apprise does not know it; https://appriseit.com/services lists what it knows"

Send = Callable[[Notice], bool]


def senders(urls: Sequence[str], fleet: str) -> list[tuple[str, Send]]:
    """Return (a name without secrets, the function that sends) for each URL; raise ConfigError for a bad one.

    fleet: its name, for the titles. The library is loaded here: it takes 45 MB.
    """
    import apprise

    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)

    def sender(service: apprise.NotifyBase) -> Send:
        def send(notice: Notice) -> bool:
            kind = apprise.NotifyType.WARNING if notice.begins else apprise.NotifyType.SUCCESS
            title = f"fleet {fleet}: {notice.kind.replace('_', ' ')}{'' if notice.begins else ' is over'}"
            at = datetime.fromtimestamp(notice.at, UTC)
            body = f"{'' if notice.begins else 'It was: '}{notice.text} ({at:%Y-%m-%d %H:%M:%S} UTC)"
            return bool(service.notify(body=body, title=title, notify_type=kind))

        return send

    found = []
    for number, url in enumerate(urls, 1):
        service = apprise.Apprise.instantiate(url, suppress_exceptions=True)
        if not isinstance(service, apprise.NotifyBase):
            raise ConfigError(f"URL {number} of --notify and --notify-file: {NOT_KNOWN}")
        found.append((f"notifier {number} ({service.service_name})", sender(service)))
    return found


class Postbox:
    """Sends messages to one service, in a thread of its own, in order."""

    def __init__(self, name: str, send: Send, try_again_s: Sequence[float] = TRY_AGAIN_S) -> None:
        """Start nothing yet. name: for the log. send: sends a message, returns whether it was taken."""
        self._name = name
        self._send = send
        self._try_again_s = try_again_s
        self._waiting: queue.Queue[Notice | None] = queue.Queue(MOST_WAITING)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread, which does not keep the process from ending."""
        self._thread.start()

    def put(self, notice: Notice | None) -> None:
        """Queue a message; never wait. After None the thread ends."""
        while True:
            try:
                return self._waiting.put_nowait(notice)
            except queue.Full:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        try:
            lost = self._waiting.get_nowait()
        except queue.Empty:
            return
        if lost is not None:
            log.warning("%s takes nothing: a message is lost: %s", self._name, lost.kind)

    def end(self, wait_s: float) -> None:
        """Send what is queued without second tries, for at most so many seconds; the rest is lost."""
        self._ended.set()
        self.put(None)
        if self._thread.is_alive():
            self._thread.join(wait_s)
        while not self._waiting.empty():
            self._drop_oldest()
        self.put(None)

    def _run(self) -> None:
        while (notice := self._waiting.get()) is not None:
            for pause_s in (*self._try_again_s, None):
                if self._taken(notice):
                    break
                if pause_s is None or self._ended.wait(pause_s):
                    log.warning("%s did not take a message: %s", self._name, notice.kind)
                    break

    def _taken(self, notice: Notice) -> bool:
        try:
            return self._send(notice)
        except Exception as e:  # noqa: BLE001 whatever a plugin raises; its text may have the URL
            log.warning("%s fails: %s", self._name, type(e).__name__)
            return False
