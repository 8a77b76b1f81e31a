"""Runs auth_server and model server for one boot of an instance, and starts again the one that dies.

    VLLM_MODEL=MODEL VLLM_ARGS='arguments of vLLM' python3 -m remote.supervise PROFILE

Each boot begins with a new fleet/boot (keys, tokens, events) and a new fleet/model.log; each new start of the
model server with a new log, so that an old ready line makes nobody believe in a new process. A model server
that dies again and again, or of what lasts, is given up with a line that the autoscaler's log check knows.
A model that was ready once is on the disk: its next start asks nothing of the hub (HF_HUB_OFFLINE), until one
such start fails.

It sleeps until a child dies or a signal comes. Of its children none outlives it: each asked the kernel for
SIGKILL at its parent's death, and a model server's own children are in its process group.

It is on every machine all the time and does next to nothing, so it imports little: 10 MB instead of 19. What
needs more is done by a process that ends (remote/boot.py).
"""

import ctypes
import fcntl
import importlib.util
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from remote.disk import Disk, model_key
from remote.log_lines import ENDED, GIVING_UP, NO_INTERNET, cause_of_death, has_ready_line, read_end

EARLY_DEATHS = 3
"""Deaths of a model server that never was ready, in a row, after which it is given up."""

DEATHS, DEATHS_IN_S = 5, 600.0
"""Deaths of any kind within so many seconds after which it is given up."""

NO_INTERNET_S = 300.0
"""For so long a machine that cannot reach the hub may try."""

PAUSE_S = (1.0, 30.0)
"""Before a dead process is started again: the first, doubling up to the second."""

SETTLED_S = 120.0
"""A process that lived so long had started well: the pause begins anew."""

TERM_GRACE_S = 8.0
"""From SIGTERM to SIGKILL of the children; docker stop leaves 10 s in all."""


class Deaths:
    """Counts deaths of the model server and decides when to give it up. Pure: takes `now`, seconds."""

    def __init__(self, now: float) -> None:
        """Start without deaths."""
        self._early = 0
        self._began = now  # to try, without having been ready since
        self._at: list[float] = []

    def died(self, was_ready: bool, why: str, lasts: bool, now: float) -> str | None:
        """Count a death; return why the model server should be given up, or None.

        was_ready: it had been ready before it died. why, of one that was not: by its log, "" if that is not
        known. lasts: whether another start would end in the same way.
        """
        if was_ready:
            self._early, self._began = 0, now
        else:
            self._early += 1
        self._at = [at for at in self._at if now - at < DEATHS_IN_S] + [now]
        if lasts:
            return why
        if why == NO_INTERNET:
            tried_s = now - self._began
            return f"{why}: the hub was not reached in {tried_s:.0f} s" if tried_s >= NO_INTERNET_S else None
        because = f": {why}" if why else ""
        if self._early >= EARLY_DEATHS:
            return f"the model server ended {self._early} times before it was ready{because}"
        if len(self._at) >= DEATHS:
            return f"the model server ended {len(self._at)} times in {DEATHS_IN_S:g} s{because}"
        return None


class Pause:
    """How long to wait before a dead process is started again; it doubles for short lives. Pure."""

    def __init__(self) -> None:
        """Start with the shortest pause."""
        self._next_s = PAUSE_S[0]

    def after(self, lived_s: float) -> float:
        """Return the pause, in seconds, after a process that lived lived_s seconds."""
        if lived_s >= SETTLED_S:
            self._next_s = PAUSE_S[0]
        pause_s, self._next_s = self._next_s, min(PAUSE_S[1], 2.0 * self._next_s)
        return pause_s


def has_serve() -> bool:
    """Return whether this Python's vLLM has the command `vllm serve`; nothing of it is imported.

    That asks for the metadata of a package of that name, which a build of one's own may lack.
    """
    spec = importlib.util.find_spec("vllm")
    where = spec.submodule_search_locations if spec else None
    has = any(os.path.exists(os.path.join(path, "entrypoints", "cli", "main.py")) for path in where or ())
    return has and any(_METADATA.match(name) for path in sys.path for name in _names(path))


_METADATA = re.compile(r"vllm-[^-]*\.(dist|egg)-info")


def _names(path: str) -> list[str]:
    try:
        return os.listdir(path or ".")
    except OSError:
        return []


def model_command(
    fleet: str, name: str, model: str, args: list[str], environ: Mapping[str, str], *, serve: bool
) -> list[str]:
    """Return the model server's command line. The model is served under the profile's name and its own.

    serve: by `vllm serve`, which versions from 0.8 have; its forerunner is deprecated since 0.32.
    """
    if serve:
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    else:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", *dict.fromkeys((name, model))]
    command += ["--host", environ.get("FLEET_BIND", "0.0.0.0")]  # noqa: S104 the host maps the port
    command += ["--port", environ.get("FLEET_PORT_8000", "8000")]
    command += ["--ssl-keyfile", os.path.join(fleet, "tls.key")]
    command += ["--ssl-certfile", os.path.join(fleet, "tls.crt")]
    # An access log has what stands in a URL, so also a token that somebody put there, and a line a second
    # of load reports.
    command += ["--disable-uvicorn-access-log"]
    gpus = environ.get("GPU_COUNT", "1")
    chosen = any(a.split("=")[0] in ("--tensor-parallel-size", "-tp", "--data-parallel-size") for a in args)
    if gpus.isdigit() and int(gpus) > 1 and not chosen:
        command += ["--tensor-parallel-size", gpus]
    return [*command, "--middleware", "remote.token_check.TokenCheck", *args]


# --- outside world ---------------------------------------------------------------------------------

_SIGNALS = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def boot_step(step: str, python_path: Iterable[str]) -> bool:
    """Run a step of remote/boot.py in a process of its own; return whether it went well."""
    command = [sys.executable, "-m", "remote.boot", step]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in python_path if p)}
    try:
        return os.spawnve(os.P_WAIT, command[0], command, environ) == 0  # noqa: S606 ours, and never a shell
    except OSError:  # no memory for another process
        return False


class Child:
    """A process that is kept running, with its log."""

    def __init__(self, command: list[str], log: str, python_path: Iterable[str]) -> None:
        """Start nothing yet. python_path: directories that the child's Python looks into first."""
        self.command = command
        self.log = log
        self.pid = 0  # 0: does not run
        self.start_at: float | None = 0.0
        self.more: dict[str, str] = {}  # variables of its environment
        self._environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in python_path if p)}
        self._pause = Pause()
        self._started_at = 0.0

    def start(self, now: float) -> None:
        """Start the process, in a process group of its own, with a new log; keep the last log as .old.

        Raises OSError when there is no memory or no space for it.
        """
        if os.path.exists(self.log):
            os.replace(self.log, self.log + ".old")
        # To its end: what we write into it while the process runs must not be written over.
        how = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        out = os.open(self.log, how, 0o600)
        try:
            parent = os.getpid()
            self.pid = os.fork()
            if self.pid == 0:
                self._become(out, parent)
        finally:
            os.close(out)
        with suppress(OSError):  # it has done so itself and is another program already
            os.setpgid(self.pid, self.pid)
        self.start_at, self._started_at = None, now

    def _become(self, out: int, parent: int) -> None:
        """Turn the forked process into the command's program, or end it."""
        try:
            os.setpgid(0, 0)
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out, 1)
                os.dup2(out, 2)
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and exec keeps that
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
                environ = {**self._environ, **self.more}
                os.execve(self.command[0], self.command, environ)  # noqa: S606 ours, and never a shell
        finally:
            os._exit(127)

    def start_later(self, now: float) -> None:
        """Set the time of a new start, because the process could not be started."""
        self.start_at = now + self._pause.after(0.0)

    def has_ended(self) -> bool:
        """Return whether the process does not run. Until `kill` the kernel keeps its number for it."""
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return not self.pid or os.waitid(os.P_PID, self.pid, look) is not None

    def died(self, now: float) -> bool:
        """Return whether the process has ended since the last call; then end its group, set a new start."""
        if not self.pid or not self.has_ended():
            return False
        self.kill()
        self.start_at = now + self._pause.after(now - self._started_at)
        return True

    def terminate(self) -> None:
        """Ask the process to end, by SIGTERM."""
        if self.pid:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the process and all of its group, and wait for its end."""
        if self.pid:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


class Supervisor:
    """Runs the two children of one boot: auth_server and model server."""

    def __init__(
        self, fleet: str, name: str, model: str, args: list[str], clock: Callable[[], float]
    ) -> None:
        """Begin a boot; start no child yet. name: the profile's; model, args: for vLLM."""
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        self._path = (fleet, *inherited)
        model_log = os.path.join(fleet, "model.log")
        if not boot_step("begin", self._path):
            with suppress(OSError), open(model_log, "wb") as log:
                log.write(GIVING_UP + b": fleet/boot cannot be made\n")
            sys.exit("fleet: giving up: fleet/boot cannot be made")
        self._clock = clock
        self._deaths = Deaths(clock())
        self._disk = Disk(fleet, model_key(model, args))
        self._offline = False
        self._auth = Child(
            [sys.executable, "-m", "remote.auth_server"],
            os.path.join(fleet, "auth.log"),
            self._path,
        )
        self._model = Child(
            model_command(fleet, name, model, args, os.environ, serve=has_serve()),
            model_log,
            self._path,
        )
        self._auth.more = {"FLEET_MODEL_KEY": self._disk.key}

    def run(self) -> None:
        """Keep both children running until SIGTERM or SIGINT."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        while True:
            now = self._clock()
            wake_at = self._start_due(now)
            timeout_s = None if wake_at is None else max(0.0, wake_at - now)
            got = (
                signal.sigwaitinfo(_SIGNALS)
                if timeout_s is None
                else signal.sigtimedwait(_SIGNALS, timeout_s)
            )
            if got is not None and got.si_signo != signal.SIGCHLD:
                self._end()
                return
            self._see_deaths(self._clock())

    def _start_due(self, now: float) -> float | None:
        """Start the children that are due; return when the next one will be, or None."""
        waiting = []
        for child in (self._auth, self._model):
            if child.start_at is not None and child.start_at <= now:
                if child is self._model:
                    self._offline = "HF_HUB_OFFLINE" not in os.environ and self._disk.complete
                    child.more = {"HF_HUB_OFFLINE": "1"} if self._offline else {}
                try:
                    child.start(now)
                except OSError as e:  # no memory or no space at the moment
                    with suppress(OSError):
                        print(f"supervise: {child.log}: cannot start: {e}", flush=True)
                    child.start_later(now)
            if child.start_at is not None:
                waiting.append(child.start_at)
        return min(waiting, default=None)

    def _see_deaths(self, now: float) -> None:
        self._auth.died(now)
        if self._model.died(now):
            was_ready, cause = has_ready_line(self._model.log), ("", False)
            if not was_ready and self._offline:
                self._disk.doubt()  # perhaps a file is missing: the next start may ask the hub
            elif not was_ready:
                cause = cause_of_death(read_end(self._model.log))
            why = self._deaths.died(was_ready, *cause, now)
            line = ENDED if why is None else GIVING_UP + b": " + why.encode()
            if why is not None:
                self._model.start_at = None
            with suppress(OSError), open(self._model.log, "ab") as log:
                log.write(b"\n%b\n" % line)
            with suppress(OSError):  # for `vastai logs`
                print(line.decode(), flush=True)
            boot_step("fail_open", self._path)

    def _end(self) -> None:
        """End both children: SIGTERM, and SIGKILL to what is left after TERM_GRACE_S."""
        children = (self._auth, self._model)
        for child in children:
            child.terminate()
        limit = self._clock() + TERM_GRACE_S
        while not all(child.has_ended() for child in children):
            left_s = limit - self._clock()
            if left_s <= 0:
                break
            signal.sigtimedwait({signal.SIGCHLD}, left_s)
        for child in children:
            child.kill()


def main() -> None:
    """Supervise this instance until told to end; exit at once if another supervisor runs in this home."""
    if len(sys.argv) != 2 or "VLLM_MODEL" not in os.environ:
        sys.exit("usage: VLLM_MODEL=MODEL VLLM_ARGS='arguments' python3 -m remote.supervise PROFILE")
    # Not left for vLLM, which wonders about variables with its name.
    name, model = sys.argv[1], os.environ.pop("VLLM_MODEL")
    args = shlex.split(os.environ.pop("VLLM_ARGS", ""))
    fleet = os.path.expanduser("~/fleet")
    os.umask(0o077)
    lock = os.open(os.path.join(fleet, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit("supervise: another one runs here already")
    print("supervise:", name, model, *args, flush=True)
    Supervisor(fleet, name, model, args, time.monotonic).run()


if __name__ == "__main__":
    main()
