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

FATAL_LINES = (
    # Seen while loading: none of these has been seen to pass by itself.
    "Engine core initialization failed",
    "CUDA out of memory",
    "OutOfMemoryError",
    "No space left on device",
    "is not a valid model identifier",
    "You are trying to access a gated repo",
)
_CERTIFICATE = "CERTIFICATE"

GIVEN_UP = "fleet: giving up"
"""Words at the beginning of a line with which the supervisor gives up; vLLM ends when its engine has died."""

# paramiko logs a traceback for each peer that hangs up; our checks report that in their own words.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)


class HostKeyChanged(InstanceError):
    """The instance shows another ssh host key than at first: another machine may be answering."""


@dataclass(frozen=True)
class LogView:
    """What one look over ssh into an instance's log found.

    reached: ssh worked. ready: the ready line is there. fatal: the fatal line, shortened. certificate: the
    machine's, PEM.
    """

    reached: bool = True
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
    loading = f"sed {shlex.quote(f'/{READY_LINE}/q')} {log} 2>/dev/null | grep -a -F -o -m 1 {fatal}"
    given_up = f"grep -a -m 1 {shlex.quote('^' + GIVEN_UP)} {log} 2>/dev/null | cut -c 1-300"
    ready = f"grep -a -F -m 1 -e {shlex.quote(READY_LINE)} {log} >/dev/null 2>&1 && echo READY"
    # The first certificate of the file is the machine's, those after it are its authority's.
    certificate = 'sed -n "1,/END CERTIFICATE/p" "$HOME/fleet/tls.crt" 2>/dev/null'
    found = given_up if hot else f"{{ {given_up}; {loading}; }} | head -n 1"
    return f"{ready}; {found}; echo {_CERTIFICATE}; {certificate}; echo END"


def parse(output: str) -> LogView:
    """Return what the output of `grep_command` says; raise InstanceError when it was cut short."""
    lines = output.splitlines()
    if not lines or lines[-1] != "END":
        raise InstanceError(f"ssh log check: expected a last line END, got {output[-80:]!r}")
    ready = "READY" in lines[:1]
    rest = lines[1:-1] if ready else lines[:-1]
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

        remember_host_key(label, key): returns the key first seen for that label, maybe this one.
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
        except (OSError, EOFError, paramiko.SSHException) as e:
            raise InstanceError(f"{where}: {type(e).__name__}: {e}") from e
        finally:
            if transport is not None:
                transport.close()
