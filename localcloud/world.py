"""What the cloud's decisions mean in the world: disks, processes, ports and ssh servers of the instances.

One thread does it all, in the order of the effects: it lets the cloud's time pass, takes what is to be done
(`Cloud.take_effects`), does it, tells the cloud how a boot went, and sleeps until the next event, a death, or
a `kick` from the face. An instance is a directory and a session of processes:

    ROOT/instances/<id>/home/         its disk, $HOME of its start script; stays until it is destroyed
    ROOT/instances/<id>/tmp/          its /tmp, $TMPDIR
    ROOT/instances/<id>/host_key      of its ssh server
    ROOT/instances/<id>/console.log   what its start script prints
    ROOT/instances/<id>/machine.json  what the stand-in for vLLM must know of the machine

No process outlives the local cloud: the kernel kills a start script with the thread that started it, and that
is this one, which ends last; what the script started is ended by the warden (processes.py).
"""

import contextlib
import json
import logging
import os
import random
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleet_client.private_files import make_private_dir
from localcloud import processes
from localcloud.account import (
    Authorize,
    Boot,
    Cloud,
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
from localcloud.ssh_server import HANG, SshServer, listen_on
from process.children import dying_with_parent
from process.ssh_keys import load_or_make_ssh_key

log = logging.getLogger("localcloud")

PORTS = (20_000, 30_000)
"""Below Linux's range for outgoing connections, so that none of those sits on a port that will be needed."""

LOG_LIMIT = 256 * 1024
"""Bytes at the end of a log that may be asked for."""

UPLOADS = 64
"""Logs that were asked for and are kept for fetching."""

LONGEST_SLEEP_S = 3600.0
"""A poll takes no longer times than some weeks."""

MODEL_SERVER = b"vllm.entrypoints.openai.api_server"
"""In the command line of a model server."""


@dataclass
class Host:
    """What there is of one instance in the world."""

    id: int
    path: Path
    process: "subprocess.Popen[bytes] | None" = None
    boot: int = 0
    ssh: SshServer | None = None
    ssh_mode: str = "ok"
    frozen: bool = False
    authorized_keys: tuple[str, ...] = ()
    decoys: list[socket.socket] = field(default_factory=list)
    ports: Mapping[str, int] = field(default_factory=dict)
    processor: int | None = None
    shared_memory: set[int] = field(default_factory=set)  # of processes that were told to end

    @property
    def home(self) -> Path:
        """Its disk."""
        return self.path / "home"

    @property
    def tmp(self) -> Path:
        """Its /tmp."""
        return self.path / "tmp"

    @property
    def session(self) -> int | None:
        """The session of its start script, while that runs."""
        return None if self.process is None else self.process.pid

    @property
    def console(self) -> Path:
        """What its start script prints."""
        return self.path / "console.log"


class World:
    """The instances of one cloud. `lock` guards the cloud; everything else belongs to the world's thread."""

    def __init__(self, cloud: Cloud, root: Path, engine: str, clock: Callable[[], float] = time.time) -> None:
        """Nothing runs yet. root: an own directory, 0700."""
        self.cloud = cloud
        self.root = make_private_dir(root)
        # A new process is a new cloud, whose ids begin anew: what an old one left here is nobody's.
        shutil.rmtree(self.root / "instances", ignore_errors=True)
        self.engine = engine
        self._image = ENGINES[engine]
        self.clock = clock
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.failed = False
        self._hosts: dict[int, Host] = {}
        self._uploads: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._ports = random.SystemRandom()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="world")

    def start(self) -> None:
        """Let time pass."""
        self._thread.start()

    def stop(self) -> None:
        """Every process of every instance is gone; the disks stay."""
        self.stopping.set()
        self.kick()
        if self._thread.is_alive():
            self._thread.join()
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def kick(self) -> None:
        """Something was asked of the cloud: look now. Any thread."""
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"!")

    # -- what the face may ask; any thread ----------------------------------------------------------

    def console(self, instance_id: int) -> str:
        """The end of what its start script printed; empty when there is nothing."""
        path = self.root / "instances" / str(instance_id) / "console.log"
        try:
            with path.open("rb") as f:
                f.seek(max(0, path.stat().st_size - LOG_LIMIT))
                return f.read().decode(errors="replace")
        except OSError:
            return ""

    def upload(self, name: str, text: str, ready_at: float) -> None:
        """The text can be fetched under that name from then on."""
        with self.lock:
            self._uploads[name] = (ready_at, text)
            while len(self._uploads) > UPLOADS:
                self._uploads.popitem(last=False)

    def uploaded(self, name: str) -> str | None:
        """The text, or None while it is not there."""
        with self.lock:
            ready_at, text = self._uploads.get(name, (float("inf"), ""))
        return text if self.clock() >= ready_at else None

    def command(self, instance_id: int, command: str) -> str:
        """What `ls`, `rm` or `du` say inside its disk (vast-contract 2.8), and nowhere else."""
        home = (self.root / "instances" / str(instance_id) / "home").resolve()
        try:
            words = shlex.split(command)
            for word in words[1:]:
                if not word.startswith("-") and not (home / word).resolve().is_relative_to(home):
                    return f"{words[0]}: {word}: not on this instance's disk"
            ran = subprocess.run(
                words,
                cwd=home,
                env={"PATH": self._image.path, "HOME": str(home)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=5.0,
                check=False,
            )
            return ran.stdout[:LOG_LIMIT].decode(errors="replace")
        # RuntimeError: links that lead in a circle.
        except (OSError, ValueError, RuntimeError, subprocess.TimeoutExpired) as e:
            return f"{type(e).__name__}: {e}"

    def processes(self) -> dict[int, list[int]]:
        """Process ids by instance, of those that run now."""
        hosts = list(self._hosts.values())
        sessions = {h.session: h.id for h in hosts if h.session is not None}
        homes = {str(h.home): h.id for h in hosts}
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
            for host in self._hosts.values():
                self._end(host)

    def _sleep(self, seconds: float) -> None:
        for key, _ in self._selector.select(min(LONGEST_SLEEP_S, max(0.001, seconds))):
            if key.fd == self._wake_read:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
            else:
                self._died(key.data)

    def _died(self, host: Host) -> None:
        """The start script of that instance has ended. A container goes on, unless it was killed."""
        if host.process is None:
            return
        session, status = host.session, self._forget_process(host)
        log.info("instance %d: its start script ended with status %s", host.id, status)
        if status < 0:
            processes.end_all(host.path, session)
            self._crash(host)

    def _crash(self, host: Host) -> None:
        self._end(host)
        with self.lock:
            self.cloud.crashed(host.id, host.boot, self.clock())

    def _forget_process(self, host: Host) -> int:
        assert host.process is not None  # noqa: S101 asked by the callers
        for key in list(self._selector.get_map().values()):
            if key.data is host:
                self._selector.unregister(key.fileobj)
                os.close(key.fd)
        status = host.process.wait()
        host.process = None
        return status

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
            return
        host = self._hosts.get(effect.id)
        if isinstance(effect, Boot):
            self._boot(effect)
        elif host is None:
            if isinstance(effect, End) and effect.wipe:
                shutil.rmtree(self.root / "instances" / str(effect.id), ignore_errors=True)
        elif isinstance(effect, Terminate):
            if host.process is not None:
                self._note_shared_memory(host)
                host.process.terminate()
        elif isinstance(effect, End):
            self._end(host)
            if effect.wipe:
                shutil.rmtree(host.path, ignore_errors=True)
                del self._hosts[host.id]
        elif isinstance(effect, Kill):
            self._kill(host, effect.part)
        elif isinstance(effect, Freeze):
            host.frozen = effect.frozen
            self._signal(host, signal.SIGSTOP if effect.frozen else signal.SIGCONT)
            self._set_ssh(host)
        elif isinstance(effect, Ssh):
            host.ssh_mode = effect.mode
            self._set_ssh(host)
        elif isinstance(effect, Authorize):
            host.authorized_keys = effect.keys
        elif isinstance(effect, MarkLoaded):
            (host.path / "loaded").touch()

    # -- one instance -----------------------------------------------------------------------------

    def _boot(self, b: Boot) -> None:
        host = self._hosts.get(b.id)
        if host is None:
            path = make_private_dir(make_private_dir(self.root / "instances") / str(b.id))
            host = self._hosts[b.id] = Host(b.id, path)
        self._end(host)
        host.boot, host.authorized_keys, host.ssh_mode = b.boot, b.authorized_keys, b.ssh
        try:
            for directory in (host.home, host.tmp):
                directory.mkdir(mode=0o700, exist_ok=True)
            if b.new_host_key:
                (host.path / "host_key").unlink(missing_ok=True)
            ssh_sock, ports = self._choose_ports(b)
            shown = ports if not b.drop_ports else self._decoys(host, ports)
            self._start_ssh(host, ssh_sock)
            self._start_script(host, b, ports)
        except Exception as e:  # noqa: BLE001 whatever it is, the host could not do it, and says so
            self._end(host)
            log.warning("instance %d cannot boot: %s", b.id, e)
            with self.lock:
                self.cloud.boot_failed(b.id, b.boot, f"{type(e).__name__}: {e}", self.clock())
            return
        host.ports = shown
        with self.lock:
            self.cloud.booted(b.id, b.boot, shown, self.clock())

    def _choose_ports(self, b: Boot) -> tuple[socket.socket, dict[str, int]]:
        """A listening socket for ssh, and a port outside for each inside: what it had, if that is free."""
        taken = {port for h in self._hosts.values() if h.id != b.id for port in h.ports.values()}
        ports: dict[str, int] = {}
        ssh_sock: socket.socket | None = None
        for inside in b.order.ports:
            for port in self._candidates(b.keep_ports.get(inside)):
                if port in taken or port in ports.values():
                    continue
                try:
                    sock = listen_on(port)
                except OSError:
                    continue
                if inside == "22/tcp":
                    ssh_sock = sock
                else:
                    sock.close()
                ports[inside] = port
                break
        assert ssh_sock is not None  # noqa: S101 port 22 is in every order
        return ssh_sock, ports

    def _candidates(self, first: int | None) -> Iterator[int]:
        if first is not None:
            yield first
        while True:
            yield self._ports.randrange(*PORTS)

    def _decoys(self, host: Host, ports: Mapping[str, int]) -> dict[str, int]:
        """Ports that are bound, and nobody answers there: what a firewalled host shows."""
        shown = {}
        for inside in ports:
            while inside not in shown:
                with contextlib.suppress(OSError):
                    sock = listen_on(self._ports.randrange(*PORTS))
                    host.decoys.append(sock)
                    shown[inside] = sock.getsockname()[1]
        return shown

    def _start_ssh(self, host: Host, sock: socket.socket) -> None:
        try:
            key = load_or_make_ssh_key(host.path / "host_key")
        except BaseException:
            sock.close()
            raise
        environ = {"PATH": self._image.path, "USER": "root", "SHELL": "/bin/bash"}
        host.ssh = SshServer(sock, key, lambda: host.authorized_keys, host.home, environ)
        self._set_ssh(host)

    def _set_ssh(self, host: Host) -> None:
        if host.ssh is not None:
            host.ssh.behave(HANG if host.frozen else host.ssh_mode)

    def _start_script(self, host: Host, b: Boot, ports: Mapping[str, int]) -> None:
        script = host.path / "onstart.sh"
        script.write_text(b.order.onstart or "exec sleep infinity\n")
        script.chmod(0o600)
        machine = host.path / "machine.json"
        told = {
            "gpu_name": b.machine.gpu_name,
            "num_gpus": b.machine.num_gpus,
            "load_s": b.load_s,
            "start_s": b.start_s,
            "fatal_line": b.fatal_line,
            "loaded": str(host.path / "loaded"),
        }
        machine.write_text(json.dumps(told))
        with host.console.open("wb") as console:
            host.process = subprocess.Popen(
                dying_with_parent(("/bin/bash", str(script))),
                cwd=host.home,
                env=self._environment(host, b, ports, machine),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if self._image.own_processor:
            host.processor = self._least_used_processor(host)
            os.sched_setaffinity(host.process.pid, {host.processor})  # and what it starts
        self._selector.register(os.pidfd_open(host.process.pid), selectors.EVENT_READ, host)

    def _least_used_processor(self, host: Host) -> int:
        """Of those that this process may use, by the other instances that run."""
        others = [h.processor for h in self._hosts.values() if h is not host and h.process is not None]
        return min(sorted(os.sched_getaffinity(0)), key=others.count)

    def _environment(self, host: Host, b: Boot, ports: Mapping[str, int], machine: Path) -> dict[str, str]:
        """What a container sees (vast-contract 2.14), and where to listen: here is but one network."""
        inside = {name.partition("/")[0]: port for name, port in ports.items() if name.endswith("/tcp")}
        return {
            "PATH": self._image.path,
            "LANG": "C.UTF-8",
            **self._image.variables,
            **b.order.variables,
            "HOME": str(host.home),
            "TMPDIR": str(host.tmp),
            "CONTAINER_ID": str(b.id),
            "CONTAINER_API_KEY": b.order.instance_key,
            "VAST_CONTAINERLABEL": f"C.{b.id}",
            "PUBLIC_IPADDR": "127.0.0.1",
            "GPU_COUNT": str(b.machine.num_gpus),
            "DATA_DIRECTORY": str(host.home),
            **{f"VAST_TCP_PORT_{name}": str(port) for name, port in inside.items()},
            **{f"FLEET_PORT_{name}": str(port) for name, port in inside.items()},
            "FLEET_BIND": "127.0.0.1",
            "LOCALCLOUD_MACHINE": str(machine),
        }

    def _signal(self, host: Host, number: int) -> None:
        processes.signal_all(host.path, number, host.session)

    def _note_shared_memory(self, host: Host) -> None:
        """Before it ends: then nobody says any more what it had, and what it left is nobody's."""
        host.shared_memory |= _shared_memory(processes.living_in(host.path, host.session))

    def _kill(self, host: Host, part: str) -> None:
        self._note_shared_memory(host)
        if part == "model":
            for pid in processes.living_in(host.path, host.session):
                if MODEL_SERVER in processes.command_line(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        elif host.process is None:  # its start script ended by itself: nobody will see it die
            self._crash(host)
        else:
            self._signal(host, signal.SIGKILL)  # its end is seen as any other

    def _end(self, host: Host) -> None:
        """No process of it, no socket and no shared memory is left."""
        if host.ssh is not None:
            host.ssh.close()
            host.ssh = None
        for sock in host.decoys:
            sock.close()
        host.decoys.clear()
        self._note_shared_memory(host)
        processes.end_all(host.path, host.session)
        if host.process is not None:
            self._forget_process(host)
        _remove_shared_memory(host.shared_memory)
        host.shared_memory.clear()
        host.frozen = False

    def status(self) -> dict[str, Any]:
        """Everything for a person."""
        with self.lock:
            status = self.cloud.status(self.clock())
        running = self.processes()
        for one in status["instances"]:
            one["pids"] = sorted(running.get(one["id"], []))
        return {"engine": self.engine, "speedup": self.cloud.speedup, **status}


def _shared_memory(pids: Iterable[int]) -> set[int]:
    """What these have open of /dev/shm, by inode: a semaphore is opened under another name than it has."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as f:
            found |= {int(line.split(maxsplit=5)[4]) for line in f if "/dev/shm/" in line}  # noqa: S108
    return found


def _remove_shared_memory(inodes: set[int]) -> None:
    """A container's shared memory vanishes with it; that of killed processes here would stay."""
    for entry in os.scandir("/dev/shm") if inodes else ():  # noqa: S108
        if entry.inode() in inodes:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry.path)
