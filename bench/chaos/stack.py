"""The processes of a campaign: local cloud, autoscaler, two loadbalancers, two gateways, and links.

    users ─► gateway-1 ─link─► loadbalancer-1 ─link─► autoscaler ─link─► local cloud
    users ─► gateway-2 ─link─► loadbalancer-2 ─link─►      └─links─► both loadbalancers

A child that dies is started again on its port with its state (simulation/live/stack_children.py). The socket
on which a gateway listens stays open meanwhile, as under deploy/fleet-gateway.socket: programs wait, and are
not refused. Each of ours has a hook of its own (hook.py), by which clock, network and disk of that process
alone are spoilt.
"""

import contextlib
import http.client
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bench.chaos.hook import Hook, build_hook
from bench.chaos.links import Link, Links
from fleet_client.listening import FIRST_HANDED, bind_socket
from fleet_client.private_files import make_private_dir
from localcloud.ports import listen_on_some
from simulation.live.stack_children import StackChild, child_environment, end_strays, log_tail

CLOUD, AUTOSCALER = "cloud", "autoscaler"
LOADBALANCERS = ("loadbalancer-1", "loadbalancer-2")
GATEWAYS = ("gateway-1", "gateway-2")
OURS = (AUTOSCALER, *LOADBALANCERS, *GATEWAYS)
"""What we run, and what faults of ours strike; the cloud is somebody else's."""

LABEL = "chaos"

UP_S = 60.0
"""Seconds for a child to answer, on a machine that others use, too."""

END_S = 10.0
"""Seconds from SIGTERM to SIGKILL."""

DESTROY_S = 120.0
"""Seconds for destroy-fleet."""

WATCH_S = 0.05
"""Seconds between two looks for children that died."""


class StackFailed(Exception):
    """A child did not start or did not answer; the text has the end of its log."""


@dataclass(frozen=True)
class StackSettings:
    """What the stack is like. hot, total: of the fixed policy; undo: a fix that the children run without."""

    seed: int
    speedup: float = 60.0
    hot: int = 3
    total: int = 5
    max_instances: int = 6
    max_usd_h: float = 4.0
    poll_s: float = 1.0
    check_hot_s: float = 3.0
    check_boot_s: float = 1.0
    undo: str | None = None


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(
    url: str, key: str = "", body: object = None, method: str | None = None, timeout_s: float = 3.0
) -> Any:
    """Return the JSON of an answer, whatever its status; None when there is none."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, headers, method=method)  # noqa: S310 our own ports
    try:
        with _direct.open(asked, timeout=timeout_s) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as e:
        with e:
            try:
                return json.load(e)
            except (OSError, ValueError, http.client.HTTPException):
                return None
    except (OSError, http.client.HTTPException, ValueError):
        return None


class Stack:
    """A context in which everything runs; after it nothing of it is left. Enter it in the main thread."""

    def __init__(self, settings: StackSettings, root: Path | None = None) -> None:
        """Make the directories, keys, links and hooks; nothing runs yet."""
        self.settings = settings
        self.root = Path(tempfile.mkdtemp(prefix="chaos-")) if root is None else make_private_dir(root)
        self.state_dir = make_private_dir(self.root / "state")
        self.logs = make_private_dir(self.root / "logs")
        self.ledger = self.state_dir / "ledger.sqlite"
        names = (CLOUD, *OURS)
        self.ports = dict(zip(names, _free_ports(len(names)), strict=True))
        self.cloud_key = secrets.token_hex(16)
        self.client_keys = {name: secrets.token_urlsafe(24) for name in (*GATEWAYS, "direct", "wicked")}
        self.operator_key = secrets.token_urlsafe(24)
        self._keys = {
            name: self._key_file(name, key)
            for name, key in (self.client_keys | {"operator": self.operator_key}).items()
        }
        self._key_file("clients", "\n".join(self.client_keys.values()))
        library = build_hook()
        hooks = make_private_dir(self.root / "hooks")
        self.hooks: dict[str, Hook] = (
            {} if library is None else {name: Hook(library, hooks / name, self.state_dir) for name in names}
        )
        self.links = Links()
        self.left_behind: list[str] = []
        self.begun_at = 0.0  # when the autoscaler was started, on the monotonic clock
        self._children: dict[str, StackChild] = {}
        self._held: set[str] = set()
        self._listening: dict[str, socket.socket] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="chaos stack", daemon=True)

    def _key_file(self, name: str, text: str) -> Path:
        path = self.root / f"{name}.key"
        path.touch(mode=0o600)
        path.write_text(text + "\n")
        return path

    # -- where things are ------------------------------------------------------------------------------

    def url(self, name: str) -> str:
        """Return where that process listens."""
        return f"http://127.0.0.1:{self.ports[name]}"

    def status(self) -> Any:
        """Return what the cloud knows; None when it does not answer."""
        return ask(f"{self.url(CLOUD)}/localcloud/status", timeout_s=10.0)

    def ask_autoscaler(self, path: str, body: object = None, method: str | None = None) -> Any:
        """Return an answer of the autoscaler to its operator."""
        return ask(self.url(AUTOSCALER) + path, self.operator_key, body, method)

    def ask_cloud(self, path: str, body: object = None, method: str | None = None) -> Any:
        """Return an answer of the cloud to who has its key."""
        return ask(self.url(CLOUD) + path, self.cloud_key, body, method)

    def counted_s(self) -> float:
        """Return the seconds since the machine's start as the autoscaler counts them, with its sleep."""
        slept = self.hooks[AUTOSCALER].boot_s if self.hooks else 0.0
        return time.clock_gettime(time.CLOCK_BOOTTIME) + slept

    def pid(self, name: str) -> int:
        """Return the process id of the child with that name as it runs now."""
        with self._lock:
            return self._children[name].process.pid

    def alive(self, name: str) -> bool:
        """Return whether that child runs now."""
        with self._lock:
            return self._children[name].process.poll() is None

    @property
    def restarts(self) -> dict[str, int]:
        """How often each child was started again."""
        return {c.name: c.restarts for c in self._children.values()}

    def hold(self, name: str) -> None:
        """End that child with SIGKILL and do not start it again until `release`."""
        with self._lock:
            self._held.add(name)
            self._children[name].process.kill()

    def release(self, name: str) -> None:
        """Start it again."""
        with self._lock:
            self._held.discard(name)

    # -- start -----------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Start everything; when that fails, end everything before raising."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End everything."""
        self.stop()

    def _start(self) -> None:
        s = self.settings
        self._launch(
            CLOUD,
            *(sys.executable, "-m", "localcloud", "--port", str(self.ports[CLOUD])),
            *("--speedup", f"{s.speedup:g}", "--root", str(self.root / "cloud"), "--seed", str(s.seed)),
            *("--realism", "none"),  # its faults are the campaign's own
        )
        self._wait_up(CLOUD, "/localcloud/status")
        self.begun_at = time.monotonic()
        self._launch(AUTOSCALER, *self._program(AUTOSCALER, "autoscaler_server.py"), *self._serve_flags())
        for name in LOADBALANCERS:
            self._launch(
                name, *self._program(name, "loadbalancer_server.py"), *self._loadbalancer_flags(name)
            )
        self._listening |= {name: bind_socket("127.0.0.1", self.ports[name]) for name in GATEWAYS}
        for gateway, loadbalancer in zip(GATEWAYS, LOADBALANCERS, strict=True):
            self._launch(
                gateway,
                *handing_over(self._listening[gateway].fileno()),
                *self._program(gateway, "gateway.py"),
                *("--port", str(self.ports[gateway]), "--client-key-file", str(self._keys[gateway])),
                *("--loadbalancer", self._link(f"{gateway}>{loadbalancer}", loadbalancer).url),
            )
        self._watcher.start()
        for name in OURS:
            self._wait_up(name, "/health")

    def _program(self, name: str, file: str) -> tuple[str, ...]:
        undone = () if self.settings.undo is None else ("--undo", self.settings.undo)
        return (
            sys.executable,
            "-m",
            "bench.chaos.child",
            *undone,
            "--holds",
            str(self.logs / f"{name}.holds"),
            file,
        )

    def _common_flags(self) -> tuple[str, ...]:
        s = self.settings
        return (
            *(
                "--local",
                "--cloud-url",
                self._link("autoscaler>cloud", CLOUD).url,
                "--speedup",
                f"{s.speedup:g}",
            ),
            *("--label", LABEL, "--model", "vllm-13", "--state-dir", str(self.state_dir)),
            *("--public-url", self._link("instances>autoscaler", AUTOSCALER).url),
            *("--max-instances", str(s.max_instances), "--max-dollars-per-hour", f"{s.max_usd_h:g}"),
            *("--poll-interval-s", f"{s.poll_s:g}", "--check-boot-every-s", f"{s.check_boot_s:g}"),
            *("--check-hot-every-s", f"{s.check_hot_s:g}", "--check-timeout-s", "5"),
        )

    def _serve_flags(self) -> tuple[str, ...]:
        s = self.settings
        links = [self._link(f"autoscaler>{name}", name).url for name in LOADBALANCERS]
        return (
            *self._common_flags(),
            *("--port", str(self.ports[AUTOSCALER]), "--operator-key-file", str(self._keys["operator"])),
            *(part for link in links for part in ("--loadbalancer", link)),
            *("--policy", "fixed", "--policy-param", f"hot={s.hot}", "--policy-param", f"total={s.total}"),
            *("--replay-every-s", "0"),
        )

    def _loadbalancer_flags(self, name: str) -> tuple[str, ...]:
        return (
            *("--port", str(self.ports[name]), "--state-dir", str(self.state_dir)),
            *("--autoscaler", self._link(f"{name}>autoscaler", AUTOSCALER).url),
            *("--client-keys-file", str(self.root / "clients.key")),
            *("--operator-key-file", str(self._keys["operator"])),
        )

    def _link(self, name: str, to: str) -> Link:
        return self.links.make(name, self.ports[to])

    def _launch(self, name: str, *command: str) -> None:
        environ = child_environment(self.cloud_key, self.root) | {"PYTHONPATH": str(Path.cwd())}
        if name in self.hooks:
            environ |= self.hooks[name].environ
        with self._lock:
            self._children[name] = StackChild(
                name,
                command,
                self.logs / f"{name}.log",
                environ,
                pass_fds=[sock.fileno() for at, sock in self._listening.items() if at == name],
            )

    def _wait_up(self, name: str, path: str) -> None:
        limit = time.monotonic() + UP_S
        while ask(self.url(name) + path) is None:
            if time.monotonic() > limit:
                raise StackFailed(f"{name} did not answer:\n{log_tail(self.logs / f'{name}.log')}")
            time.sleep(0.1)

    def _watch(self) -> None:
        while not self._end.wait(WATCH_S):
            with self._lock:
                for name, child in self._children.items():
                    if name not in self._held and name != CLOUD:
                        child.revive(time.monotonic())

    # -- the end ---------------------------------------------------------------------------------------

    def destroy_fleet(self) -> list[str]:
        """End the autoscaler and run destroy-fleet; return what the cloud still has."""
        with self._lock:
            self._held |= set(OURS)
            ending = [self._children[name] for name in OURS if name in self._children]
        for child in ending:  # all at once: each has its time to end
            if child.process.poll() is None:
                os.kill(child.process.pid, signal.SIGTERM)
        for child in ending:
            child.end(END_S)
        command = (sys.executable, "autoscaler_server.py", "destroy-fleet", "--yes", *self._common_flags())
        environ = child_environment(self.cloud_key, self.root)
        child = StackChild("destroy-fleet", command, self.logs / "destroy-fleet.log", environ)
        limit = time.monotonic() + DESTROY_S
        while child.process.poll() is None and time.monotonic() < limit:
            time.sleep(0.1)
        child.end(0.0)
        said = self.status()
        return (
            ["unknown: the cloud does not answer"]
            if said is None
            else [f"instance {i['id']}" for i in said["instances"]]
        )

    def stop(self) -> None:
        """End every process."""
        with self._lock:
            self._held |= set(self._children)
            children = list(self._children.values())
        for child in children[::-1]:
            child.end(END_S if child.name == CLOUD else 0.0)
        self._end.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self.links.close()
        for sock in self._listening.values():
            sock.close()
        self.left_behind += end_strays(self.root)


_HAND_OVER = f"""
import os, sys
os.dup2(int(sys.argv[1]), {FIRST_HANDED})
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execvp(sys.argv[2], sys.argv[2:])
"""


def handing_over(fd: int) -> tuple[str, ...]:
    """Return the beginning of a command that hands that listening socket over, as systemd does it."""
    return sys.executable, "-I", "-S", "-c", _HAND_OVER, str(fd)


def _free_ports(count: int) -> list[int]:
    """Return ports where nothing listens, below those of outgoing connections, which links have."""
    with contextlib.ExitStack() as taken:
        socks = [taken.enter_context(sock) for sock in listen_on_some(count)]
        return [int(sock.getsockname()[1]) for sock in socks]


def handles(pid: int) -> int:
    """Return how many files and sockets that process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
