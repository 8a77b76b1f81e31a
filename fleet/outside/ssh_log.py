"""Reads the model server's log and the machine's certificate over ssh.

Source of the lines: docs/reference/lineage.md 1.3 and 5. Lines are matched as substrings, because real ones
begin with "INFO:" or "(APIServer pid=..)".

The start script begins a new log at each boot and each restart of the model server, so an old ready line
cannot make a new boot look ready. The machine's certificate is read in the same way: the host key that was
seen first vouches for it, and it vouches for every connection that clients make.
"""

import logging
import shlex
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import paramiko

from process.errors import InstanceError
from process.safe_text import safe_text

MAX_OUTPUT = 65_536
"""Bytes of an answer: a certificate, a line of 300 characters and two words are expected."""

MAX_RECEIVED = 2 * MAX_OUTPUT
"""Bytes that one check takes in, with the handshake (about 3,000): each packet costs processor time, and a
banner or an answer without an end would cost it until the deadline."""

READY_LINE = "Application startup complete."

ANSWERS_LINE = "fleet: the model server answers"
"""Added by the machine itself where a version words its ready line differently."""

READY_LINES = (READY_LINE, ANSWERS_LINE)
UNTIL_READY = f"/{READY_LINE}/q;/^{ANSWERS_LINE}/q"
"""What sed does to show a log up to its ready line: afterwards it may hold what requests say."""

FATAL_LINES = (
    # Seen while loading, and not to pass by itself (remote/log_lines.py: LASTING). What may pass is none of
    # these: the supervisor tries three times, and then says in a line of its own that it gives up.
    "forward compatibility was attempted on non supported HW",
    "NVIDIA driver on your system is too old",
    "CUDA driver version is insufficient",
    "No CUDA GPUs are available",
    "no CUDA-capable device is detected",
    "Found no NVIDIA driver on your system",
    "Failed to infer device type",
    "No space left on device",
    "You are trying to access a gated repo",
    "must have access to it and be authenticated",
    "not in the authorized list",
    "Invalid credentials in Authorization header",
    "is not a valid model identifier",
    "RepositoryNotFoundError",
    "does not recognize this architecture",
    "error: unrecognized arguments",
    "error: argument ",
)

_BEGIN, _CERTIFICATE, _END = "FLEET-BEGIN", "FLEET-CERTIFICATE", "FLEET-END"
"""Lines around what the command prints: a login may greet before it, and a shell say farewell."""

GIVEN_UP = "fleet: giving up"
"""Words at the beginning of a line with which the supervisor gives up; vLLM ends when its engine has died."""

# paramiko logs a traceback for each peer that hangs up; our checks report that in their own words.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)


class HostKeyChanged(InstanceError):
    """The instance shows another ssh host key than at first: another machine may be answering."""


class LoginRanNothing(InstanceError):
    """An ssh server let us in, or asked for another key, and the command was not run: that may pass."""


@dataclass(frozen=True)
class LogView:
    """What one look over ssh into an instance's log found.

    reached: ssh worked. ready: the ready line is there. fatal: the fatal line, shortened. certificate: the
    machine's, PEM. spoke: an ssh server answered, although ssh did not work: the key is not there yet, or the
    login ran nothing.
    """

    reached: bool = True
    spoke: bool = False
    ready: bool = False
    fatal: str | None = None
    changed_host_key: bool = False
    certificate: str | None = None
    why: str = ""


def grep_command(*, hot: bool) -> str:
    """Return the shell command that looks into the log; `parse` reads its output. hot: of a hot instance.

    All words in the command are constants of this file.
    """
    log = '"$HOME/fleet/model.log"'
    # vLLM logs what requests say (the names of models, what a chat's template raises): nothing counts that it
    # wrote after it was ready, and of what it wrote before only our own words for it come over here.
    fatal = " ".join(f"-e {shlex.quote(line)}" for line in FATAL_LINES)
    loading = f"sed {shlex.quote(UNTIL_READY)} {log} 2>/dev/null | grep -a -F -o -m 1 {fatal}"
    given_up = f"grep -a -m 1 {shlex.quote('^' + GIVEN_UP)} {log} 2>/dev/null | cut -c 1-300"
    ready_lines = f"-e {shlex.quote(READY_LINE)} -e {shlex.quote('^' + ANSWERS_LINE)}"
    ready = f"grep -a -m 1 {ready_lines} {log} >/dev/null 2>&1 && echo READY"
    # The first certificate of the file is the machine's, those after it are its authority's.
    certificate = 'sed -n "1,/END CERTIFICATE/p" "$HOME/fleet/tls.crt" 2>/dev/null'
    found = given_up if hot else f"{{ {given_up}; {loading}; }} | head -n 1"
    return marked(f"{ready}; {found}; echo {_CERTIFICATE}; {certificate}")


def marked(command: str) -> str:
    """Return a shell command whose output `between_marks` finds among what the login prints."""
    return f"echo; echo {_BEGIN}; {command}; echo {_END}"


def between_marks(output: str) -> list[str]:
    """Return the lines that a command of `marked` printed; raise LoginRanNothing unless it ran to its end.

    What stands before and after is of the login, and not looked at.
    """
    lines = output.splitlines()
    if _BEGIN not in lines or _END not in lines:
        raise LoginRanNothing(f"ssh: expected lines {_BEGIN} and {_END}, got {output[-80:]!r}")
    return lines[lines.index(_BEGIN) + 1 : lines.index(_END)]


def parse(output: str) -> LogView:
    """Return what the output of `grep_command` says; raise InstanceError when it was cut short.

    LoginRanNothing: it did not run.
    """
    lines = between_marks(output)
    ready = "READY" in lines[:1]
    rest = lines[1:] if ready else lines
    if _CERTIFICATE not in rest:
        raise InstanceError(f"ssh log check: expected a line {_CERTIFICATE}, got {output[-80:]!r}")
    at = rest.index(_CERTIFICATE)
    pem = "".join(line.rstrip() + "\n" for line in rest[at + 1 :])
    return LogView(ready=ready, fatal=rest[0].strip() if at else None, certificate=pem or None)


def safe_lines(output: bytes | bytearray) -> str:
    """Return the output as text, with characters that cannot be written down replaced in its lines."""
    text = bytes(output).decode(errors="replace")
    return "\n".join(safe_text(line, MAX_OUTPUT) for line in text.split("\n"))


# --- outside world ---------------------------------------------------------------------------------


class _Metered:
    """A socket that ends after MAX_RECEIVED bytes; it has the methods that paramiko uses."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._left = MAX_RECEIVED

    def recv(self, most: int) -> bytes:
        """Receive as a socket does; return b"", the end, when too much has been received."""
        if self._left <= 0:
            return b""
        received = self._sock.recv(min(most, self._left))
        self._left -= len(received)
        return received

    def __getattr__(self, name: str) -> object:
        """Return all other attributes of the socket."""
        return getattr(self._sock, name)


class SshLog:
    """Reads instances' logs over ssh with the fleet's key; checks host keys. Safe in several threads."""

    def __init__(self, key: paramiko.PKey, remember_host_key: Callable[[str, str], str]) -> None:
        """Connect nowhere yet. key: the fleet's private ssh key.

        remember_host_key(label, key): returns the key that is believed of that label, maybe this one.
        """
        self._key = key
        self._remember = remember_host_key

    def read(self, label: str, host: str, port: int, hot: bool, timeout_s: float) -> LogView:
        """Look into the log of an instance; raise InstanceError or HostKeyChanged.

        hot: whether the instance is hot. Takes at most timeout_s, and MAX_RECEIVED bytes.
        """
        return parse(self.run(label, host, port, grep_command(hot=hot), timeout_s))

    def run(self, label: str, host: str, port: int, command: str, timeout_s: float) -> str:
        """Return what a command prints on an instance; raise InstanceError or HostKeyChanged.

        Takes at most timeout_s, and MAX_RECEIVED bytes.
        """
        until = time.monotonic() + timeout_s

        def left() -> float:
            return max(0.05, until - time.monotonic())

        where = f"ssh {host}:{port}"
        transport: paramiko.Transport | None = None
        try:
            sock = socket.create_connection((host, port), timeout=left())
            transport = paramiko.Transport(_Metered(sock))  # type: ignore[arg-type]
            transport.banner_timeout = transport.handshake_timeout = left()
            transport.auth_timeout = transport.channel_timeout = left()
            transport.start_client(timeout=left())
            shown = transport.get_remote_server_key()
            # Host keys live on the instance's disk, so they stay the same through stop and start.
            if self._remember(label, f"{shown.get_name()} {shown.get_base64()}") != (
                f"{shown.get_name()} {shown.get_base64()}"
            ):
                raise HostKeyChanged(f"{where}: host key is not the one first seen")
            transport.auth_publickey("root", self._key)
            channel = transport.open_session(timeout=left())
            channel.settimeout(left())
            channel.exec_command(command)
            output = bytearray()
            while chunk := channel.recv(MAX_OUTPUT):
                output += chunk
                if len(output) > MAX_OUTPUT or time.monotonic() >= until:
                    raise InstanceError(
                        f"{where}: expected a line or two, got {len(output)} bytes and no end"
                    )
                channel.settimeout(left())
            return safe_lines(output)
        except paramiko.AuthenticationException as e:
            raise LoginRanNothing(f"{where}: the fleet's key is not accepted (yet)") from e
        except (OSError, EOFError, paramiko.SSHException) as e:
            raise InstanceError(f"{where}: {type(e).__name__}: {e}") from e
        finally:
            if transport is not None:
                transport.close()
