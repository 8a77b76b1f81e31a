"""One instance as real processes: its disk, its session, its ports and its ssh server.

    PATH/home/         its disk, $HOME of its start script; stays until it is destroyed
    PATH/tmp/          its /tmp, $TMPDIR
    PATH/host_key      of its ssh server
    PATH/console.log   what its start script prints
    PATH/machine.json  what the stand-in for vLLM must know of the machine

The kernel kills a start script with the thread that started it; what the script started is ended by the
warden (processes.py).
"""

import os
import selectors
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fleet_client.private_files import make_private_dir
from localcloud import ports, processes
from localcloud.effects import Boot
from localcloud.engines import EngineImage
from localcloud.paced.machine import SimulatedMachine
from localcloud.ssh_logins import KIND
from localcloud.ssh_server import HANG, SshServer
from process.children import start_child
from process.own_profiles import VARIABLE
from process.ssh_keys import load_or_make_ssh_key

MODEL_SERVERS = frozenset({b"vllm.entrypoints.cli.main", b"vllm.entrypoints.openai.api_server"})
"""Words of which one is in the command line of a model server."""


class Container:
    """The disk, processes, ports and ssh server of one instance. All methods belong to world.py's thread."""

    def __init__(
        self, instance_id: int, path: Path, image: EngineImage, selector: selectors.BaseSelector
    ) -> None:
        """Make the instance's directory at that path; nothing runs yet.

        image: programs and environment of its engine. selector: gets this object when the start script ends.
        """
        self.id = instance_id
        self.path = make_private_dir(path)
        self.boot = 0
        self.ports: Mapping[str, int] = {}
        self.processor: int | None = None
        self._image = image
        self._selector = selector
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._ssh: SshServer | None = None
        self._ssh_mode = "ok"
        self._frozen = False
        self._login = KIND
        self._accepted_from: dict[str, float] = {}  # by public key, monotonic seconds
        self._decoys: list[socket.socket] = []
        self._shared_memory: set[int] = set()  # of processes that were told to end

    @property
    def session(self) -> int | None:
        """The session id of the instance's start script while that runs."""
        return None if self._process is None else self._process.pid

    # -- what the cloud wants of it -------------------------------------------------------------------

    def start(self, b: Boot, taken_ports: Collection[int], used_processors: Sequence[int | None]) -> None:
        """Start the instance's ssh server and its start script; raise when that fails.

        taken_ports: ports of other instances. used_processors: processors that other running instances use.
        """
        self.boot, self._ssh_mode, self._login = b.boot, b.ssh, b.login
        self.authorize(b.authorized_keys)
        for name in ("home", "tmp"):
            (self.path / name).mkdir(mode=0o700, exist_ok=True)
        if b.new_host_key:
            (self.path / "host_key").unlink(missing_ok=True)
        ssh_sock, given = ports.choose(b.order.ports, b.keep_ports, taken_ports)
        shown = given
        if b.drop_ports:
            self._decoys = ports.listen_on_some(len(given))
            shown = {inside: sock.getsockname()[1] for inside, sock in zip(given, self._decoys, strict=True)}
        self._start_ssh(ssh_sock)
        self._start_script(b, given, used_processors)
        self.ports = shown

    def _start_ssh(self, sock: socket.socket) -> None:
        try:
            key = load_or_make_ssh_key(self.path / "host_key")
        except BaseException:
            sock.close()
            raise
        environ = {"PATH": self._image.path, "USER": "root", "SHELL": "/bin/bash"}
        self._ssh = SshServer(sock, key, self._keys, self.path / "home", environ, self._login)
        self._set_ssh()

    def _start_script(self, b: Boot, given: Mapping[str, int], used_processors: Sequence[int | None]) -> None:
        script = self.path / "onstart.sh"
        script.write_text(b.order.onstart or "exec sleep infinity\n")
        script.chmod(0o600)
        m, gpu = b.machine, b.machine.gpu
        machine = SimulatedMachine(
            *(m.gpu_name, m.num_gpus, b.load_s, b.start_s, b.fatal_line, str(self.path / "loaded")),
            *(gpu.ram_mb / 1024.0, gpu.mem_bw_gb_s, gpu.tflops),
            hub=b.hub.shown(),
        )
        machine.write(self.path / "machine.json")
        with (self.path / "console.log").open("wb") as console:
            self._process = start_child(
                ("/bin/bash", str(script)),
                cwd=self.path / "home",
                env=environment(self.path, b, given, self._image),
                stdout=console,
                stderr=subprocess.STDOUT,
            )
        if self._image.own_processor:
            self.processor = processes.least_used_processor(used_processors)
            os.sched_setaffinity(self._process.pid, {self.processor})  # and what it starts
        self._pidfd = os.pidfd_open(self._process.pid)
        self._selector.register(self._pidfd, selectors.EVENT_READ, self)

    def terminate(self) -> None:
        """Send SIGTERM to the instance's start script."""
        if self._process is not None:
            self._note_shared_memory()
            self._process.terminate()

    def kill(self, part: str) -> bool:
        """Kill all processes of the instance, or only those of its model server (part "model").

        Return True when the selector will not notice the end, because the start script had ended before.
        """
        self._note_shared_memory()
        if part == "model":
            for pid in processes.living_in(self.path, self.session):
                if MODEL_SERVERS.intersection(processes.command_line(pid)):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            return False
        unnoticed = self._process is None  # its start script ended by itself
        processes.signal_all(self.path, signal.SIGKILL, self.session)
        return unnoticed

    def freeze(self, frozen: bool) -> None:
        """Stop all processes of the instance and let its ssh server hang, or let both continue."""
        self._frozen = frozen
        processes.signal_all(self.path, signal.SIGSTOP if frozen else signal.SIGCONT, self.session)
        self._set_ssh()

    def set_ssh(self, mode: str) -> None:
        """Let the instance's ssh server behave as "ok", "hang" or "refuse" from now on."""
        self._ssh_mode = mode
        self._set_ssh()

    def _set_ssh(self) -> None:
        if self._ssh is not None:
            self._ssh.behave(HANG if self._frozen else self._ssh_mode)

    def authorize(self, keys: tuple[str, ...]) -> None:
        """Accept these ssh keys at the instance and no others, new ones after the host's lag."""
        at = time.monotonic() + self._login.key_lag_s
        self._accepted_from = {key: self._accepted_from.get(key, at) for key in keys}

    def _keys(self) -> tuple[str, ...]:
        """Return the keys that are accepted now, with those that the instance itself authorizes."""
        now = time.monotonic()
        given = (key for key, at in self._accepted_from.items() if at <= now)
        try:
            own = (self.path / "home" / ".ssh" / "authorized_keys").read_text(errors="replace").splitlines()
        except OSError:
            own = []
        return (*given, *own)

    def mark_loaded(self) -> None:
        """Note on the instance's disk that it holds the model."""
        (self.path / "loaded").touch()

    def end(self) -> None:
        """End all processes of the instance, and remove its sockets and shared memory."""
        if self._ssh is not None:
            self._ssh.close()
            self._ssh = None
        for sock in self._decoys:
            sock.close()
        self._decoys = []
        self._note_shared_memory()
        processes.end_all(self.path, self.session)
        if self._process is not None:
            self.reap()
        processes.remove_shared_memory(self._shared_memory)
        self._shared_memory.clear()
        self._frozen = False

    def wipe(self) -> None:
        """Delete the instance's disk and all else in its directory."""
        shutil.rmtree(self.path, ignore_errors=True)

    # -- its start script -----------------------------------------------------------------------------

    def reap(self) -> int:
        """Forget the instance's start script, which has ended; return its exit status."""
        assert self._process is not None  # noqa: S101 the selector said that it has ended
        self._selector.unregister(self._pidfd)
        os.close(self._pidfd)
        status = self._process.wait()
        self._process = None
        return status

    def _note_shared_memory(self) -> None:
        """Remember which shared memory the instance's processes have; after their end it cannot be told."""
        self._shared_memory |= processes.shared_memory_of(processes.living_in(self.path, self.session))


def environment(path: Path, b: Boot, given: Mapping[str, int], image: EngineImage) -> dict[str, str]:
    """Return a container's environment (vast-contract 2.14), with the ports that it must listen on here."""
    tcp = {name.partition("/")[0]: port for name, port in given.items() if name.endswith("/tcp")}
    return {
        "PATH": image.path,
        "LANG": "C.UTF-8",
        **image.variables,
        **b.secrets,
        **b.order.variables,
        "HOME": str(path / "home"),
        "TMPDIR": str(path / "tmp"),
        "CONTAINER_ID": str(b.id),
        "CONTAINER_API_KEY": b.order.instance_key,
        "VAST_CONTAINERLABEL": f"C.{b.id}",
        "PUBLIC_IPADDR": "127.0.0.1",
        "GPU_COUNT": str(b.machine.num_gpus),
        "DATA_DIRECTORY": str(path / "home"),
        **{f"VAST_TCP_PORT_{name}": str(port) for name, port in tcp.items()},
        **{f"FLEET_PORT_{name}": str(port) for name, port in tcp.items()},
        "FLEET_BIND": "127.0.0.1",
        "LOCALCLOUD_MACHINE": str(path / "machine.json"),
        **{name: os.environ[name] for name in (VARIABLE,) if name in os.environ},
    }
