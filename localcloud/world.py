"""Carries out what the cloud model decides: one thread that starts, signals and ends containers.

The thread lets the cloud's time pass, takes what is to be done (`Cloud.take_effects`), does it in that order,
tells the cloud how a boot went, and sleeps until the next event, a death, or a `kick` from the face.

No process outlives the local cloud: the kernel kills a start script with the thread that started it, and that
is this one, which ends last; what the script started is ended by the warden (processes.py).
"""

import contextlib
import logging
import os
import selectors
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fleet_client.private_files import make_private_dir
from localcloud import processes, rows
from localcloud.cloud import Cloud
from localcloud.container import Container
from localcloud.effects import (
    Authorize,
    Boot,
    Effect,
    End,
    Freeze,
    Kill,
    MarkLoaded,
    Moved,
    Ssh,
    Terminate,
)
from localcloud.engines import ENGINES
from localcloud.instance_logs import InstanceLogs

log = logging.getLogger("localcloud")

LONGEST_SLEEP_S = 3600.0
"""Seconds of the longest sleep: a poll takes no longer times than some weeks."""


class World:
    """The containers of one cloud model. `lock` guards the cloud; all else belongs to the world's thread."""

    def __init__(self, cloud: Cloud, root: Path, engine: str, clock: Callable[[], float] = time.time) -> None:
        """Make the world of a cloud model; nothing runs yet. root: a directory for it alone, 0700."""
        self.cloud = cloud
        self.root = make_private_dir(root)
        self._instances = self.root / "instances"
        # A new process is a new cloud, whose ids begin anew: what an old one left here belongs to none.
        shutil.rmtree(self._instances, ignore_errors=True)
        self.engine = engine
        self._image = ENGINES[engine]
        self.clock = clock
        self.logs = InstanceLogs(self._instances, self._image.path, clock)
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.failed = False
        self._containers: dict[int, Container] = {}
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="world")

    def start(self) -> None:
        """Start the thread in which the cloud's time passes."""
        self._thread.start()

    def stop(self) -> None:
        """End every process of every instance; the disks stay."""
        self.stopping.set()
        self.kick()
        if self._thread.is_alive():
            self._thread.join()
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def kick(self) -> None:
        """Wake the world's thread, because something was asked of the cloud. Usable from any thread."""
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"!")

    def status(self) -> dict[str, Any]:
        """Return the local cloud's status for people, with the process ids of each instance.

        Usable from any thread.
        """
        with self.lock:
            status = rows.status(self.cloud, self.clock())
        running = self._processes()
        for one in status["instances"]:
            one["pids"] = sorted(running.get(one["id"], []))
        return {"engine": self.engine, "speedup": self.cloud.speedup, **status}

    def _processes(self) -> dict[int, list[int]]:
        """Return the ids of the processes that run now, by instance."""
        containers = list(self._containers.values())
        sessions = {c.session: c.id for c in containers if c.session is not None}
        homes = {str(c.path / "home"): c.id for c in containers}
        found: dict[int, list[int]] = {}
        for pid, session in processes.living():
            instance_id = sessions.get(session) or homes.get(processes.home_of(pid))
            if instance_id is not None:
                found.setdefault(instance_id, []).append(pid)
        return found

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self.stopping.is_set():
                with self.lock:
                    self.cloud.advance(self.clock())
                    effects = self.cloud.take_effects()
                for effect in effects:
                    try:
                        self._do(effect)
                    except Exception:  # one instance's trouble must not stop the others'
                        log.exception("%r failed", type(effect).__name__)
                if effects:
                    continue
                with self.lock:
                    at = self.cloud.next_event(self.clock())
                self._sleep(LONGEST_SLEEP_S if at is None else at - self.clock())
        except Exception:
            log.exception("the local cloud cannot go on")
            self.failed = True
            os.kill(os.getpid(), signal.SIGTERM)  # a face without a world would tell lies
        finally:
            for container in self._containers.values():
                container.end()

    def _sleep(self, seconds: float) -> None:
        for key, _ in self._selector.select(min(LONGEST_SLEEP_S, max(0.001, seconds))):
            if key.fd == self._wake_read:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
            else:
                self._died(key.data)

    def _died(self, container: Container) -> None:
        """Note that a container's start script ended; the container goes on unless the script was killed."""
        session, status = container.session, container.reap()
        log.info("instance %d: its start script ended with status %s", container.id, status)
        if status < 0:
            processes.end_all(container.path, session)
            self._crash(container)

    def _crash(self, container: Container) -> None:
        container.end()
        with self.lock:
            self.cloud.crashed(container.id, container.boot, self.clock())

    def _do(self, effect: Effect) -> None:
        if isinstance(effect, Moved):
            log.info(
                "instance %d %s -> %s: %s (after %.1f s)",
                effect.id,
                effect.was,
                effect.now,
                effect.why,
                effect.after_s,
            )
        elif isinstance(effect, Boot):
            self._boot(effect)
        elif effect.id in self._containers:
            self._do_to(self._containers[effect.id], effect)
        elif isinstance(effect, End) and effect.wipe:
            shutil.rmtree(self._instances / str(effect.id), ignore_errors=True)

    def _do_to(self, container: Container, effect: Effect) -> None:
        match effect:
            case Terminate():
                container.terminate()
            case End():
                container.end()
                if effect.wipe:
                    container.wipe()
                    del self._containers[container.id]
            case Kill():
                if container.kill(effect.part):
                    self._crash(container)
            case Freeze():
                container.freeze(effect.frozen)
            case Ssh():
                container.set_ssh(effect.mode)
            case Authorize():
                container.authorize(effect.keys)
            case MarkLoaded():
                container.mark_loaded()

    def _boot(self, b: Boot) -> None:
        container = self._containers.get(b.id)
        if container is None:
            make_private_dir(self._instances)
            container = Container(b.id, self._instances / str(b.id), self._image, self._selector)
            self._containers[b.id] = container
        container.end()
        others = [c for c in self._containers.values() if c is not container]
        taken_ports = {port for c in others for port in c.ports.values()}
        used_processors = [c.processor for c in others if c.session is not None]
        try:
            container.start(b, taken_ports, used_processors)
        except Exception as e:  # noqa: BLE001 whatever it is, the host could not do it, and says so
            container.end()
            log.warning("instance %d cannot boot: %s", b.id, e)
            with self.lock:
                self.cloud.boot_failed(b.id, b.boot, f"{type(e).__name__}: {e}", self.clock())
            return
        with self.lock:
            self.cloud.booted(b.id, b.boot, container.ports, self.clock())
