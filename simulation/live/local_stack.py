"""The local stack: local cloud, autoscaler and loadbalancer as children on this machine, and their end.

    start:  localcloud ─► prepare a pool ─► autoscaler, loadbalancer ─► one instance hot
    run:    a child that dies is started again, on the same port and with the same state
    stop:   loadbalancer, autoscaler ─► destroy-fleet ─► is anything left? ─► localcloud

True whatever happens:

- no child outlives this process: each asked the kernel for SIGKILL at its parent's death before it
  became the program (prctl PR_SET_PDEATHSIG), so `kill -9` of the parent ends them too;
- the terminal's Ctrl-C reaches this process only: each child leads a session of its own;
- everything lies in one private directory (0700), with a key of its own for the local cloud, since that
  runs what its users ask it to run.

The kernel's signal comes when the *thread* that started the child ends (process/children.py). So children are
started by the main thread and, when they died, by a watcher thread that ends last.
"""

import http.client
import json
import random
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from fleet_client.private_files import make_private_dir
from simulation.live.stack_children import StackChild, child_environment, end_strays, log_tail
from simulation.live.stack_config import ENGINES, Programs, StackConfig

CLOUD, AUTOSCALER, LOADBALANCER = "localcloud", "autoscaler", "loadbalancer"

UP_TIMEOUT_S = 30.0
"""Seconds for a child process to answer: Python and its imports take 1 to 3 s on a busy core."""

PREPARE_TIMEOUT_S = 180.0
"""Seconds to prepare the pool: each instance takes its load time over the speedup, and commands a few
seconds."""

HOT_TIMEOUT_S = 60.0
"""Seconds for the first instance to be hot: a start, a check, and several listings."""

TERM_GRACE_S = 10.0
"""Seconds from SIGTERM to SIGKILL: the loadbalancer answers held requests, the autoscaler ends a command."""

DESTROY_TIMEOUT_S = 60.0
"""Seconds for destroy-fleet: one command an instance at half a second of processor each, and listings."""

_PORTS = (20_000, 30_000)
"""Range of ports: below Linux's for outgoing connections (32768 and up), because one of those may sit on the
port of a child that has died and is about to be started again."""


class ChildFailed(Exception):
    """A child process of the stack did not start or did not answer; the text has the end of its log."""


OUR_PROGRAMS = Programs()


@dataclass(frozen=True)
class Takedown:
    """How the stack ended.

    left_behind names what still existed when all should have been gone; empty is good. restarts: how often
    each child that died was started again, by name.
    """

    left_behind: tuple[str, ...]
    restarts: Mapping[str, int]


# --- outside world ---------------------------------------------------------------------------------


class LocalStack:
    """A context in which local cloud, autoscaler and loadbalancer run; after it nothing of them is left."""

    def __init__(
        self, config: StackConfig, programs: Programs = OUR_PROGRAMS, say: Callable[[str], None] = print
    ) -> None:
        """Make the stack's directory and choose its ports; nothing runs yet. Raises ConfigError.

        say: gets a line for people now and then, from the thread that called start() or stop().
        """
        self.config = config.checked()
        self._engine = ENGINES[config.engine]
        self.taken_down: Takedown | None = None  # how it ended, once it has
        self.programs = programs
        self.say = say
        self._temporary = config.state_dir is None
        self.state_dir = _private_dir(config.state_dir)
        self._logs = self.state_dir / "logs"
        self._logs.mkdir(mode=0o700, exist_ok=True)
        ports = _free_ports(3)
        self.cloud_url, self.autoscaler_url, self.loadbalancer_url = (f"http://127.0.0.1:{p}" for p in ports)
        self._common = (
            *("--local", "--cloud-url", self.cloud_url, "--state-dir", str(self.state_dir)),
            *("--label", config.label, "--model", config.model),
            *("--speedup", f"{self._engine.speedup or config.speedup:g}"),
            # Else the instances that prepare rents, which does not know the port, could not report.
            *("--public-url", self.autoscaler_url),
            *("--max-instances", str(config.limit)),
            *("--max-dollars-per-hour", f"{config.max_dollars_per_hour:g}"),
            *("--poll-interval-s", f"{config.poll_interval_s:g}"),
            *("--check-boot-every-s", f"{config.check_boot_every_s:g}"),
        )
        self.cloud_key = secrets.token_hex(16)
        self._environment = child_environment(self.cloud_key, self.state_dir)
        self._children: dict[str, StackChild] = {}
        self._lock = threading.Lock()  # held for looking at and starting children, never while waiting
        self._watching: set[str] = set()
        self._end_of_watch = threading.Event()
        self._watcher: threading.Thread | None = None
        self._may_have_rented = False

    def __enter__(self) -> Self:
        """Start the whole stack; when that fails or is interrupted, end everything before raising."""
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the whole stack and its fleet."""
        self.stop()

    @property
    def restarts(self) -> Mapping[str, int]:
        """How often each child process that died was started again, by its name."""
        return MappingProxyType({c.name: c.restarts for c in tuple(self._children.values()) if c.restarts})

    @property
    def engine(self) -> str:
        """The engine that answers the requests, as every report names it."""
        return f"local cloud, {self.config.engine} engine"

    def pid(self, name: str) -> int:
        """Return the process id of the child with that name as it runs now."""
        with self._lock:
            return self._children[name].process.pid

    def tail(self, name: str) -> str:
        """Return the end of the log of the child with that name."""
        return log_tail(self._logs / f"{name}.log")

    def start(self) -> None:
        """Start the stack; return when its pool is prepared, all three answer and instances are hot.

        config.hot says how many. Raises ChildFailed with the end of the log of the child that failed.
        """
        c = self.config
        self._launch(
            CLOUD,
            *self.programs.cloud,
            *("--port", _port(self.cloud_url), "--speedup", f"{c.speedup:g}", "--engine", c.engine),
            *("--root", str(self.state_dir / "cloud"), "--seed", str(c.seed)),
            *("--realism", c.realism, *(word for name in c.only for word in ("--only", name))),
        )
        self._wait_up(CLOUD, f"{self.cloud_url}/localcloud/status")
        self.say(f"{self.engine}, speedup {c.speedup:g}: {self.cloud_url}")
        self._prepare()
        self._launch(
            AUTOSCALER,
            *self.programs.autoscaler,
            *("--port", _port(self.autoscaler_url), "--loadbalancer", self.loadbalancer_url),
            *self._common,
            *self._engine.autoscaler_args,
            *c.autoscaler_args,
        )
        self._launch(
            LOADBALANCER,
            *self.programs.loadbalancer,
            *("--port", _port(self.loadbalancer_url), "--autoscaler", self.autoscaler_url),
            *("--state-dir", str(self.state_dir)),
        )
        self._wait_up(AUTOSCALER, f"{self.autoscaler_url}/health")
        self._wait_up(LOADBALANCER, f"{self.loadbalancer_url}/health")
        self._watcher = threading.Thread(target=self._watch, name="local stack", daemon=True)
        self._watching = {CLOUD, AUTOSCALER, LOADBALANCER}
        self._watcher.start()
        self._wait_hot()

    def stop(self) -> Takedown:
        """End the whole stack in order; Ctrl-C meanwhile skips the waiting.

        Return how it ended; a second call changes nothing.
        """
        if self.taken_down is not None:
            return self.taken_down
        left: list[str] = []
        try:
            left = self._end_in_order()
        except KeyboardInterrupt:
            left = ["not looked for: interrupted"]
        finally:
            with self._lock:
                self._watching = set()
            for name in tuple(self._children):
                self._end(name, grace_s=TERM_GRACE_S if name == CLOUD else 0.0)
            self._end_of_watch.set()
            if self._watcher is not None:
                self._watcher.join()
            left += end_strays(self.state_dir)
            self.taken_down = Takedown(tuple(left), self.restarts)
            if self._temporary and not left:
                shutil.rmtree(self.state_dir, ignore_errors=True)
        if left:
            self.say(f"left behind: {', '.join(left)}; logs: {self._logs}")
        return self.taken_down

    # -- inside: start ----------------------------------------------------------------------------

    def _launch(self, name: str, *command: str) -> None:
        with self._lock:
            self._children[name] = self._child(name, command)

    def _child(self, name: str, command: Sequence[str], *, stdout: int | None = None) -> StackChild:
        return StackChild(name, command, self._logs / f"{name}.log", self._environment, stdout=stdout)

    def _wait_up(self, name: str, url: str) -> None:
        """Wait until the URL answers 200; raise ChildFailed when the child ends or takes too long."""
        timeout_s = UP_TIMEOUT_S * self._engine.patience
        limit = time.monotonic() + timeout_s
        while get_json(url) is None:
            self._still_there(name)
            if time.monotonic() > limit:
                raise ChildFailed(f"{name} did not answer within {timeout_s:g} s:\n{self.tail(name)}")
            time.sleep(0.05)

    def _still_there(self, name: str) -> None:
        status = self._children[name].process.poll()
        if status is not None:
            raise ChildFailed(f"{name} exited with status {status}:\n{self.tail(name)}")

    def _prepare(self) -> None:
        """Rent the pool of instances, load the model on each and stop them; show what `prepare` prints."""
        self._may_have_rented = True
        command = (*self.programs.autoscaler, "prepare", "--count", str(self.config.instances), *self._common)
        child = self._child("prepare", command, stdout=subprocess.PIPE)
        process, log = child.process, child.log
        with self._lock:
            self._children["prepare"] = child
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timeout_s = PREPARE_TIMEOUT_S * self._engine.patience
        limit = threading.Timer(timeout_s, give_up)
        limit.start()
        try:
            assert process.stdout is not None  # noqa: S101 it was asked for above
            with process.stdout as lines, log.open("ab") as kept:
                for line in lines:
                    kept.write(line)
                    kept.flush()
                    self.say(line.decode(errors="replace").rstrip())
            status = process.wait()
        finally:
            limit.cancel()
        if late.is_set():
            raise ChildFailed(f"prepare was not done after {timeout_s:g} s:\n{log_tail(log)}")
        if status != 0:
            raise ChildFailed(f"prepare exited with status {status}:\n{log_tail(log)}")
        del self._children["prepare"]

    def _wait_hot(self) -> None:
        timeout_s = HOT_TIMEOUT_S * self._engine.patience
        limit = time.monotonic() + timeout_s
        while True:
            states = self._states()
            if states.count("hot") >= self.config.hot:
                self.say(f"hot: {states.count('hot')} of {len(states)} instances")
                self.say(f"loadbalancer: {self.loadbalancer_url}  autoscaler: {self.autoscaler_url}")
                self.say(f"watch the fleet in a browser: {self.autoscaler_url}/")
                return
            if time.monotonic() > limit:
                raise ChildFailed(
                    f"{states.count('hot')} of {self.config.hot} instances hot after {timeout_s:g} s, "
                    f"states {states}:\n{self.tail(AUTOSCALER)}"
                )
            time.sleep(0.1)

    def _states(self) -> list[str]:
        """Return the states of the instances; an empty list while the autoscaler does not answer."""
        try:
            return [
                str(i["state"]) for i in (get_json(f"{self.autoscaler_url}/instances") or {})["instances"]
            ]
        except (KeyError, TypeError):
            return []

    # -- inside: run ------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Start again every child that dies, until stop() has ended everything."""
        while not self._end_of_watch.wait(0.1):
            with self._lock:
                for child in self._children.values():
                    if child.name in self._watching:
                        child.revive(time.monotonic())

    # -- inside: stop -----------------------------------------------------------------------------

    def _end_in_order(self) -> list[str]:
        """End loadbalancer, autoscaler and fleet while the cloud runs; return what is left of the fleet."""
        with self._lock:
            self._watching &= {CLOUD}
        for name in (LOADBALANCER, AUTOSCALER, "prepare"):
            self._end(name, grace_s=TERM_GRACE_S)
        return self._destroy_fleet() if self._may_have_rented else []

    def _destroy_fleet(self) -> list[str]:
        if self._rented() == []:
            return []
        command = (*self.programs.autoscaler, "destroy-fleet", "--yes", *self._common)
        child = self._child("destroy-fleet", command)
        try:
            status: int | None = child.process.wait(DESTROY_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            child.end(0.0)
        rented = self._rented()
        if rented is None:
            return ["unknown: the local cloud does not answer"]
        if rented and status != 0:
            how = "hung" if status is None else f"exited with {status}"
            self.say(f"destroy-fleet {how}:\n{log_tail(child.log)}")
        return [f"instance {i}" for i in rented]

    def _rented(self) -> list[str] | None:
        """Return the ids of the instances that the local cloud still has; None when it does not answer."""
        limit = time.monotonic() + UP_TIMEOUT_S
        while time.monotonic() < limit:  # it may have died a moment ago, and is started again then
            said = get_json(f"{self.cloud_url}/localcloud/status")
            try:
                return [str(i["id"]) for i in said["instances"]]
            except (KeyError, TypeError):
                time.sleep(0.1)
        return None

    def _end(self, name: str, grace_s: float) -> None:
        child = self._children.get(name)
        if child is not None:
            child.end(grace_s)


def _private_dir(wanted: Path | None) -> Path:
    """Return the directory as an absolute path, made private (0700); for None a temporary one.

    Raises ConfigError when it cannot be made or is open to others.
    """
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="autoscaler-py-"))
    return make_private_dir(wanted).resolve()


def _free_ports(count: int) -> list[int]:
    """Return `count` ports of loopback on which nothing listens now."""
    chance = random.SystemRandom()
    socks: list[socket.socket] = []
    try:
        while len(socks) < count:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", chance.randrange(*_PORTS)))
            except OSError:
                sock.close()
                continue
            socks.append(sock)
        return [int(sock.getsockname()[1]) for sock in socks]
    finally:
        for sock in socks:
            sock.close()


def _port(url: str) -> str:
    return url.rpartition(":")[2]


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get_json(url: str, timeout_s: float = 3.0) -> Any:
    """Return the decoded JSON that a URL answers with status 200; None when no such answer came."""
    try:
        with _direct.open(url, timeout=timeout_s) as reply:
            return json.load(reply)
    except (OSError, http.client.HTTPException, ValueError):
        return None
