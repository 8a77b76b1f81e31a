"""Servers that fork, tried: `forked.py gunicorn|celery BASE_URL LOADBALANCER`.

Prints one JSON object, as programs.py does. The transport is made and used before the fork (preloaded.py);
workers end after a few requests, so that others are forked, and meanwhile their parent reads a stream, which
nothing may end.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from tests.ports import free_port

WORKERS, REQUESTS_EACH = 3, 10
STORY_S = 60.0
"""Seconds within which the parent's stream of 15 s has ended."""

TOLD = "parent-says"
"""The file in which the parent says how its stream ended."""

Ask = Callable[[str], str]


@contextmanager
def process(home: Path, *command: str) -> Iterator[None]:
    """Run a server that logs into that directory."""
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=log,
            stderr=log,
            cwd=home,
            env={**os.environ, "PARENT_SAYS": str(home / TOLD)},
        )
    try:
        yield
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def gunicorn(home: Path) -> Iterator[Ask]:
    """Run gunicorn; gives a function that asks one thing of it."""
    port = free_port()

    def ask(name: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{name}", timeout=60) as answer:
            if name != "story":
                return str(answer.read().decode())
            answer.read(1)
        return ask("chat")

    flags = f"--preload --workers {WORKERS} --max-requests {REQUESTS_EACH} --bind 127.0.0.1:{port}"
    with process(home, "gunicorn", *flags.split(), "tests.clients.preloaded:application"):
        for _ in range(1200):
            try:
                ask("chat")
                break
            except OSError:
                time.sleep(0.1)
        yield ask


@contextmanager
def celery(home: Path) -> Iterator[Ask]:
    """Run a worker of Celery that forks; gives a function that has one task done."""
    made = import_module("tests.clients.preloaded").celery(str(home))

    def ask(name: str) -> str:
        return str(made.send_task("cancel" if name == "story" else name).get(timeout=60, interval=0.05))

    flags = f"worker --pool prefork --concurrency {WORKERS} --max-tasks-per-child {REQUESTS_EACH}"
    with process(home, "celery", "-A", "tests.clients.preloaded:app", *flags.split()):
        yield ask


def main(name: str, base: str, loadbalancer: str) -> None:
    """Try one server and print what works."""
    found = {}
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        told = home / TOLD
        os.environ.update(LOADBALANCER=loadbalancer, QUEUES=made)

        def wrong(said: str, wanted: bool) -> None:
            if not wanted:
                raise AssertionError(said)

        def many(ask: Ask) -> None:
            with ThreadPoolExecutor(16) as pool:
                workers = set(pool.map(ask, ["chat"] * 48))
            wrong(f"only the workers {workers}", len(workers) > WORKERS)
            limit = time.monotonic() + STORY_S
            while not told.exists() and time.monotonic() < limit:
                time.sleep(0.1)
            said = told.read_text() if told.exists() else "nothing"
            wrong(f"the parent's stream: {said}", said.endswith(" pieces") and int(said.split()[0]) > 1000)

        checks: dict[str, Callable[[Ask], None]] = {
            "chat": lambda ask: wrong("no text", bool(ask("chat"))),
            "stream": lambda ask: wrong("no pieces", int(ask("stream")) > 1),
            "tools": lambda ask: wrong("no city", bool(ask("tools"))),
            "cancel": lambda ask: wrong("no text", bool(ask("story"))),
            "timeout": lambda ask: wrong("not late", ask("late") == "late"),
            "16 at once": many,
        }
        servers = {"gunicorn": gunicorn, "celery": celery}
        with servers[name](home) as ask:
            for check, call in checks.items():
                try:
                    call(ask)
                    found[check] = ""
                except Exception as e:  # noqa: BLE001 every library has its own
                    found[check] = f"{type(e).__name__}: {e}".replace("\n", " ")[:200]
        if any(found.values()):
            print((home / "log").read_text(errors="replace")[-3000:], file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
