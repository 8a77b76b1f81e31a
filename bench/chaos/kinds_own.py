"""Faults of ours: processes that die and stand still, links, network, disk, ledger and clock."""

import contextlib
import os
import signal
import sqlite3
import time
from collections.abc import Iterator

from bench.chaos import hook
from bench.chaos.kinds import Effect, Kind, NotNow, Scene
from bench.chaos.links import Behaviour
from bench.chaos.stack import AUTOSCALER, CLOUD, GATEWAYS, LOADBALANCERS, OURS

SLEEP_RATIO = 5.0
"""Seconds that pass in a sleep, for each that we wait."""


def kill(name: str) -> Effect:
    """`kill -9` of a process; the watcher starts it again."""

    @contextlib.contextmanager
    def effect(scene: Scene) -> Iterator[None]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(scene.stack.pid(name), signal.SIGKILL)
        yield

    return effect


def freeze(name: str) -> Effect:
    """SIGSTOP, and SIGCONT in the end."""

    @contextlib.contextmanager
    def effect(scene: Scene) -> Iterator[None]:
        pid = scene.stack.pid(name)
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:
            raise NotNow from None
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    return effect


def link(behaviour: Behaviour) -> Effect:
    """One of the links between our processes, or to the cloud, behaves so."""

    @contextlib.contextmanager
    def effect(scene: Scene) -> Iterator[None]:
        name = scene.rng.choice(sorted(scene.stack.links.by_name))
        scene.say(name)
        one = scene.stack.links.by_name[name]
        one.behave(behaviour, 0.3)
        try:
            yield
        finally:
            one.behave(Behaviour.PASS)

    return effect


def network(how: int, *, cloud: bool) -> Effect:
    """Our own network: all machines are out of reach for all of us; cloud: the cloud itself is not."""

    @contextlib.contextmanager
    def effect(scene: Scene) -> Iterator[None]:
        if not scene.stack.hooks:
            raise NotNow
        links = scene.stack.links.by_name
        known = [p for name, p in scene.stack.ports.items() if name != CLOUD]
        known += [one.port for name, one in links.items() if cloud or not name.endswith(">cloud")]
        if cloud:
            known.append(scene.stack.ports[CLOUD])
        for name in OURS:
            scene.stack.hooks[name].network(how, known)
        try:
            yield
        finally:
            for name in OURS:
                scene.stack.hooks[name].network(hook.WORKS)

    return effect


def disk(how: int) -> Effect:
    """The disk of the state directory is full, or can only be read."""

    @contextlib.contextmanager
    def effect(scene: Scene) -> Iterator[None]:
        if not scene.stack.hooks:
            raise NotNow
        scene.stack.hooks[AUTOSCALER].disk(how)
        try:
            yield
        finally:
            scene.stack.hooks[AUTOSCALER].disk(hook.WORKS)

    return effect


@contextlib.contextmanager
def lock_ledger(scene: Scene) -> Iterator[None]:
    """Somebody else holds the ledger's lock."""
    try:
        db = sqlite3.connect(scene.stack.ledger, timeout=2.0, isolation_level=None)
        db.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error:
        raise NotNow from None
    try:
        yield
    finally:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        db.close()


def spoil_ledger(how: str) -> Effect:
    """The ledger's file is damaged, cut to nothing or lost, while the autoscaler is down."""

    @contextlib.contextmanager
    def effect(scene: Scene) -> Iterator[None]:
        stack = scene.stack
        stack.hold(AUTOSCALER)
        try:
            time.sleep(0.2)
            if how == "lost":
                for end in ("", "-wal", "-shm"):
                    stack.ledger.with_name(stack.ledger.name + end).unlink(missing_ok=True)
            elif how == "cut":
                os.truncate(stack.ledger, 0)
            else:
                size = stack.ledger.stat().st_size
                page = scene.rng.randrange(max(1, size // 4096))
                scene.say(f"page {page} of {size // 4096}")
                with stack.ledger.open("r+b") as file:
                    file.seek(page * 4096)
                    file.write(scene.rng.randbytes(4096))
        except OSError:
            raise NotNow from None
        finally:
            stack.release(AUTOSCALER)
        yield

    return effect


def step(by_s: float) -> Effect:
    """The wall clock of our computer is set, and set right in the end."""

    @contextlib.contextmanager
    def effect(scene: Scene) -> Iterator[None]:
        if not scene.stack.hooks:
            raise NotNow
        for name in OURS:
            scene.stack.hooks[name].step(by_s)
        try:
            yield
        finally:
            for name in OURS:
                scene.stack.hooks[name].step(-by_s)

    return effect


@contextlib.contextmanager
def sleep(scene: Scene) -> Iterator[None]:
    """Our computer sleeps: nothing of ours runs, and time goes on by more than we wait here."""
    if not scene.stack.hooks:
        raise NotNow
    frozen = {name: scene.stack.pid(name) for name in OURS}
    for pid in frozen.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for name in (CLOUD, *OURS):  # the cloud goes on, and bills for it
            scene.stack.hooks[name].sleep(SLEEP_RATIO * scene.for_s)
        for pid in frozen.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


KINDS = (
    *(
        Kind(f"kill-{name}", kill(name), (0.5, 1.0), alone=name)
        for name in (AUTOSCALER, *LOADBALANCERS, *GATEWAYS)
    ),
    *(
        Kind(f"stop-{name}", freeze(name), (1.0, 10.0), alone=name)
        for name in (AUTOSCALER, *LOADBALANCERS, *GATEWAYS)
    ),
    Kind("packets-delayed", link(Behaviour.DELAY), (3.0, 15.0), alone="link"),
    Kind("packets-lost", link(Behaviour.LOSE), (1.0, 12.0), alone="link"),
    Kind("connections-cut", link(Behaviour.REFUSE), (0.5, 8.0), alone="link"),
    Kind("machines-unreachable", network(hook.HANGS, cloud=True), (5.0, 30.0), alone="network", dark=True),
    Kind(
        "unreachable-long",
        network(hook.HANGS, cloud=True),
        (60.0, 75.0),
        "network",
        frozenset({"trial"}),
        dark=True,
    ),
    Kind("network-gone", network(hook.UNREACHABLE, cloud=False), (3.0, 25.0), alone="network", dark=True),
    Kind("disk-full", disk(hook.FULL), (3.0, 25.0), alone="disk", tags=frozenset({"ledger"})),
    Kind("disk-read-only", disk(hook.READ_ONLY), (3.0, 25.0), alone="disk", tags=frozenset({"ledger"})),
    Kind("ledger-locked", lock_ledger, (3.0, 40.0), alone="disk", tags=frozenset({"ledger"})),
    Kind("ledger-damaged", spoil_ledger("damaged"), (0.5, 1.0), alone=AUTOSCALER, tags=frozenset({"ledger"})),
    Kind("ledger-cut", spoil_ledger("cut"), (0.5, 1.0), alone=AUTOSCALER, tags=frozenset({"ledger"})),
    Kind("ledger-lost", spoil_ledger("lost"), (0.5, 1.0), alone=AUTOSCALER, tags=frozenset({"ledger"})),
    Kind("clock-forward", step(7200.0), (5.0, 30.0), alone="clock", tags=frozenset({"clock"})),
    Kind("clock-back", step(-7200.0), (5.0, 30.0), alone="clock", tags=frozenset({"clock"})),
    Kind("sleep", sleep, (3.0, 15.0), alone="clock", tags=frozenset({"clock"})),
)
