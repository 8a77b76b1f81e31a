"""One run of the vastai 1.9.1 command line: isolated, rate-limited, limited in time, judged by its output.

Its exit status says little: 0 on every HTTP error, and 1 where the service only answered oddly. So a run
is read in this order (vast-contract 1.1, measured against the real CLI):

    our own time limit passed; the process group is killed   CloudTimeout: it may have had its effect
    stderr reports an HTTP status                            ApiError or one of its kinds
    exit status not 0                                        TransportError when `requests` raised it,
                                                             else ProtocolError
    anything else                                            for the caller to read; an empty stdout or
                                                             another sentence than expected is no success
Invariants
- No secret is an argument or in a message: the key goes by environment, a start script by a file without
  a name, secret variables and logins by standard input (private_argv.py), and messages hold the command's
  words, what was expected and what came.
- Two calls of one endpoint are never closer than its interval, counted from the end of the first to the
  start of the second, so that they are not closer on the wire either.
- At most two runs at once: one that lists, one of all the others.
"""

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fleet_client.loopback import is_loopback_url
from process.children import end_child
from process.errors import CloudError, ConfigError
from vast.errors import (
    ApiError,
    CloudAuthError,
    CloudTimeout,
    NoSuchInstance,
    OfferGone,
    RateLimited,
    TransportError,
    short,
    unexpected,
)
from vast.settings import VastSettings

log = logging.getLogger("vast")


@dataclass(frozen=True)
class Endpoint:
    """One kind of call to the Vast.ai service, named by the vastai commands that make it.

    interval_s: the least time between two calls; rest_s: the same after a 429. Source: the thresholds in
    vast-contract 1.3; a route without one has the largest of those like it. lists: it runs beside other
    calls. of_instance: the command names an instance, so a 404 means that one.
    """

    name: str
    interval_s: float
    rest_s: float = 0.0
    lists: bool = False
    of_instance: bool = False


LISTING = Endpoint("show instances", 1.0, lists=True)
SEARCH = Endpoint("search offers", 6.0)  # 10 a minute
CREATE = Endpoint("create instance", 4.5, rest_s=12.0)  # the documented penalty
CHANGE = Endpoint("start, stop, label", 1.0, of_instance=True)
DESTROY = Endpoint("destroy instance", 3.0, of_instance=True)
SHOW = Endpoint("show instance", 2.0, of_instance=True)
LOGS = Endpoint("logs", 1.5, of_instance=True)
ACCOUNT = Endpoint("show user", 2.0)
SSH_KEYS = Endpoint("ssh-key", 1.0)
ATTACH = Endpoint("attach ssh", 1.0, of_instance=True)
SECRETS = Endpoint("env-var", 1.0)

ONCE = "--retry=1"
"""Attempts in all; the default is 3, also for changes (vast-contract 0.9)."""

PRIVATE_ARGV = Path(__file__).with_name("private_argv.py")


class RateLimiter:
    """Keeps for each kind of call (endpoint) the time from which it may be made again, in seconds."""

    def __init__(self, speedup: float = 1.0) -> None:
        """Make a limiter whose intervals are divided by `speedup`, for a local cloud that runs faster."""
        self._speedup = speedup
        self._free_at: dict[Endpoint, float] = {}

    def wait_s(self, endpoint: Endpoint, now: float) -> float:
        """Return the seconds until the endpoint may be called; 0 when it may be called now."""
        return max(0.0, self._free_at.get(endpoint, now) - now)

    def ended(self, endpoint: Endpoint, now: float, *, refused: bool) -> None:
        """Note that a call of the endpoint ended now. refused: the service said that it came too often."""
        interval_s = max(endpoint.interval_s, endpoint.rest_s) if refused else endpoint.interval_s
        self._free_at[endpoint] = now + interval_s / self._speedup


@dataclass(frozen=True)
class CliRun:
    """What one run of the vastai command left: exit status, stdout and stderr.

    The streams stay apart, because stderr carries warnings also when a run succeeded.
    """

    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class _Run:
    """One run to be made: its words in messages, its arguments, seconds it may take, secrets in them."""

    command: str
    argv: Sequence[str]
    limit_s: float
    secrets: Sequence[str]


# What the CLI writes when the body of an error is not JSON (cli/main.py, run_command): not the words of
# the service, so a 404 of this kind comes from something in between and proves nothing.
NO_DETAIL = "(no detail message supplied)"

# A bad key is a 401, and has been seen as a 404 (vast-contract 1.2).
_KEY_REFUSED = ("invalid user key", "auth_error", "please log in")


def judge(command: str, endpoint: Endpoint, run: CliRun) -> None:
    """Raise the error that a run of the vastai command shows, if it shows one.

    That no error is raised is not yet a success: the caller reads what was printed.
    """
    reported = _reported_error(run.stderr)
    if reported is not None:
        raise api_error(command, endpoint, *reported)
    if run.status == 0:
        return
    last = short(run.stderr.strip().rpartition("\n")[2]) or "nothing on stderr"
    if "requests.exceptions." in run.stderr:
        raise TransportError(f"{command}: expected an answer, got {last}")
    if endpoint is LOGS and last.startswith("TimeoutError"):
        raise CloudTimeout(f"{command}: expected the log to be uploaded within 9 s, got {last}")
    raise unexpected(command, "exit status 0", f"{run.status} ({last})")


def _reported_error(stderr: str) -> tuple[int, str] | None:
    """Return (HTTP status, message) of an error that the CLI printed, or None.

    With --raw it prints a JSON line, without it a sentence.
    """
    for line in reversed(stderr.splitlines()):
        if plain := re.match(r"Failed with error (\d+): (.*)", line):
            return int(plain[1]), plain[2]
        try:
            error = json.loads(line)
        except ValueError:
            continue
        if isinstance(error, dict) and error.get("error") is True:
            status, msg = error.get("status_code"), error.get("msg")
            return (status if isinstance(status, int) else 0), ("None" if msg is None else str(msg)[:10_000])
    return None


def api_error(command: str, endpoint: Endpoint, status: int, msg: str) -> CloudError:
    """Return the exception for an HTTP error status of the service and its message."""
    if status == 0:
        return unexpected(command, "JSON from the service", short(msg))
    text = f"{command}: expected success, got {status} {short(msg)!r}"
    words = msg.lower()
    if status == 401 or any(w in words for w in _KEY_REFUSED):
        return CloudAuthError(text, status, msg)
    if status == 429:
        return RateLimited(text, status, msg)
    if endpoint is CREATE and "no_such_ask" in words:
        return OfferGone(text, status, msg)
    if endpoint.of_instance and status == 404 and msg != NO_DETAIL:
        return NoSuchInstance(text, status, msg)
    return ApiError(text, status, msg)


def in_words(words: Sequence[str]) -> str:
    """Return a vastai command as messages show it: without its flags, which may hold private values."""
    return " ".join(["vastai", *words])


# --- outside world ---------------------------------------------------------------------------------


class Cli:
    """Runs the vastai command with a key and directories of its own. Safe to use from several threads."""

    def __init__(
        self,
        settings: VastSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Make the directories that the vastai command uses.

        Raises ConfigError when there is no such command or no place for the directories.
        """
        self._settings = settings
        self._clock = clock
        self._sleep = sleep
        self._limiter = RateLimiter(settings.speedup)
        # Permits to have a run under way, not locks on data: a thread that waits here waits for a process.
        self._lanes = {True: threading.BoundedSemaphore(), False: threading.BoundedSemaphore()}
        self._home = (settings.state_dir / "vastai").absolute()
        self._gpu_names = self._home / "cache" / "vastai" / "gpu_names_cache.json"
        if not Path(settings.executable[0]).is_file():
            raise ConfigError(
                f"no vastai command at {settings.executable[0]}: pip install -r requirements.txt"
            )
        try:
            self._seed()
        except OSError as e:
            raise ConfigError(f"cannot prepare {self._home} for the vastai command: {e}") from e
        self._environ = self._isolated(os.environ)

    def run(
        self,
        endpoint: Endpoint,
        words: Sequence[str],
        flags: Sequence[str] = (),
        *,
        timeout_s: float | None = None,
        script: str | None = None,
        secrets: Sequence[str] = (),
    ) -> str:
        """Run `vastai WORDS FLAGS` as soon as the endpoint's rate limit allows; return its stdout.

        Raises the CloudError that the run shows. words go into error messages, flags do not. timeout_s: of
        the run; None: the usual one. script: the text that the flag `--onstart` is to read from a file.
        secrets: texts within the flags that nobody may see: with any, the arguments go by standard input, and
        the texts are blotted out in what was printed.
        """
        command = in_words(words)
        lane = self._lanes[endpoint.lists]
        while True:
            with lane:
                wait_s = self._limiter.wait_s(endpoint, self._clock())
                if wait_s <= 0:
                    run = _Run(command, [*words, *flags], timeout_s or self._settings.timeout_s, secrets)
                    return self._in_turn(run, endpoint, script)
            self._sleep(wait_s)

    def _in_turn(self, run: "_Run", endpoint: Endpoint, script: str | None) -> str:
        refused = False
        try:
            self._seed()
            found = self._spawn(run) if script is None else self._spawn_with_script(run, script)
            judge(run.command, endpoint, found)
            return found.stdout
        except RateLimited:
            refused = True
            raise
        except OSError as e:
            raise TransportError(f"{run.command}: expected to run it, got {e}") from e
        finally:
            self._limiter.ended(endpoint, self._clock(), refused=refused)

    def _spawn_with_script(self, run: "_Run", script: str) -> CliRun:
        # The file never has a name: nothing to delete, and nothing stays behind when we are killed.
        with tempfile.TemporaryFile("w", encoding="utf-8", dir=self._home) as file:
            file.write(script)
            file.seek(0)
            fd = file.fileno()
            return self._spawn(replace(run, argv=[*run.argv, f"--onstart=/dev/fd/{fd}"]), fds=[fd])

    def _spawn(self, run: "_Run", fds: Sequence[int] = ()) -> CliRun:
        began = self._clock()
        private = bool(run.secrets)
        with subprocess.Popen(
            [sys.executable, "-I", PRIVATE_ARGV] if private else [*self._settings.executable, *run.argv],
            # A question is answered by end of file, never waited for.
            stdin=subprocess.PIPE if private else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=self._environ,
            pass_fds=fds,
            start_new_session=True,  # a group of its own: killed as a whole, not reached by Ctrl-C
        ) as process:
            try:
                given = json.dumps(run.argv) if private else None
                stdout, stderr = process.communicate(given, timeout=run.limit_s)
            except subprocess.TimeoutExpired:
                end_child(process)
                expected = f"an answer within {run.limit_s:g} s"
                raise CloudTimeout(f"{run.command}: expected {expected}, got none") from None
            except BaseException:
                end_child(process)
                raise
        log.debug("%s ended with %s after %.2f s", run.command, process.returncode, self._clock() - began)
        return CliRun(process.returncode, *(self._blotted(s, run.secrets) for s in (stdout, stderr)))

    def _blotted(self, text: str, secrets: Sequence[str]) -> str:
        """Return the text without the API key and these secrets, since a service may echo them in an error.

        A key under 16 characters is a local cloud's, a plain word that may stand in any text: it stays.
        """
        key = self._settings.api_key
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, "[secret]")
        return text.replace(key, "[key]") if len(key) >= 16 else text

    def _seed(self) -> None:
        """Write the files that the vastai command keeps for itself, or mark them as fresh.

        Without them its first run asks for its role, every run asks for GPU names at import, with no time
        limit, and parallel first runs race for the directories (vast-contract 0.5, 0.6 and 3).
        """
        try:
            os.utime(self._gpu_names)  # it counts as stale after 24 h
        except FileNotFoundError:
            for name in ("config", "cache", "state"):
                (self._home / name / "vastai").mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(self._home / "config" / "vastai" / "vast_role", "client")
            # Last, because its presence says that all is there.
            _write(self._gpu_names, json.dumps({"gpu_names": []}))

    def _isolated(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the environment for a vastai run: without the user's Vast.ai, XDG and Python settings.

        The API key and private directories are added.
        """
        kept = {k: v for k, v in environ.items() if not k.startswith(("VAST", "XDG_", "PYTHON"))}
        kept |= {
            "HOME": str(self._home),
            "XDG_CONFIG_HOME": str(self._home / "config"),
            "XDG_CACHE_HOME": str(self._home / "cache"),
            "XDG_STATE_HOME": str(self._home / "state"),
            "VAST_API_KEY": self._settings.api_key,
            "VASTAI_NO_UPDATE_CHECK": "1",
            "PYTHONUTF8": "1",
        }
        if sys.version_info < (3, 12):
            # vastai imports distutils, behind which setuptools puts its own: a quarter of the start-up
            # (1.1 s of CPU became 0.85, measured 2026-11). From 3.12 there is no other distutils.
            kept["SETUPTOOLS_USE_DISTUTILS"] = "stdlib"
        if self._settings.url is not None:
            kept["VAST_URL"] = self._settings.url
            if is_loopback_url(self._settings.url):
                # requests honours proxies, and reads the lower-case name first.
                kept["NO_PROXY"] = kept["no_proxy"] = "127.0.0.1,localhost,::1"
        return kept


def _write(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees all of it, also when two processes write at once."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
