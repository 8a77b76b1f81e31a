"""The ssh server of one instance: its own port and host key, public keys only, commands only.

All ssh servers live in the process of the local cloud: a process for each would cost 40 MB. The commands
are processes of the instance: its home, its user, nothing of its start script's environment (vast-contract
2.14).
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import paramiko

from localcloud.ports import listen_on
from localcloud.ssh_logins import GREETING, KIND, NO_TMUX_FILE, TMUX_SAYS, SshLogin

log = logging.getLogger("localcloud")
# paramiko logs a traceback for every scanner and every client that hangs up.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)

COMMAND_TIMEOUT_S = 60.0
"""Seconds after which a command is killed."""

OUTPUT_LIMIT = 2**20
"""Most bytes of a command's output that are sent back."""

SESSION_S = 120.0
"""Seconds after which a connection is closed, whatever it is doing."""

HELD = 64
"""Most connections kept open while ssh hangs; the oldest is closed first, so that descriptors suffice."""

ACCEPT_PAUSE_S = 0.1
"""Seconds before the next accept when the process has no file descriptor left."""

OK, HANG, REFUSE = "ok", "hang", "refuse"


class SshServer:
    """The ssh server of one instance; it listens while the instance runs. Usable from any thread."""

    def __init__(
        self,
        sock: socket.socket,
        host_key: paramiko.PKey,
        authorized_keys: Callable[[], tuple[str, ...]],
        home: Path,
        environ: Mapping[str, str],
        login: SshLogin = KIND,
    ) -> None:
        """Serve ssh on sock, which listens.

        authorized_keys: returns the public keys that are accepted now. home, environ: of the commands. login:
        how the host treats one.
        """
        self._login = login
        self._host_key = host_key
        self._authorized_keys = authorized_keys
        self._home = home
        self._environ = {**environ, "HOME": str(home)}
        self._lock = threading.Lock()
        self._mode = OK
        self._held: deque[socket.socket] = deque()
        self._transports: set[paramiko.Transport] = set()
        self._closed = False
        self._sock: socket.socket | None = None
        self._port: int = sock.getsockname()[1]
        self._listen(sock)

    def behave(self, mode: str) -> None:
        """Let the ssh server behave as "ok", "hang" (accept and say nothing) or "refuse" (do not listen)."""
        with self._lock:
            was, self._mode = self._mode, mode
            if self._closed or was == mode:
                return
            held, self._held = self._held, deque()
        for sock in held:
            sock.close()
        if mode == REFUSE:
            self._stop_listening()
        elif was == REFUSE:
            try:
                self._listen(listen_on(self._port))
            except OSError as e:
                log.warning("ssh port %d cannot be opened again: %s", self._port, e)

    def close(self) -> None:
        """Close the ssh server's port and all its connections."""
        with self._lock:
            self._closed = True
            transports, held = list(self._transports), self._held
            self._held = deque()
        self._stop_listening()
        for sock in held:
            sock.close()
        for transport in transports:
            transport.close()

    def _listen(self, sock: socket.socket) -> None:
        self._sock = sock
        threading.Thread(target=self._accept, args=(sock,), name=f"ssh {self._port}", daemon=True).start()

    def _stop_listening(self) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes accept, which close alone does not
            sock.close()

    def _accept(self, sock: socket.socket) -> None:
        while True:
            try:
                connection, _ = sock.accept()
            except OSError:
                if self._sock is not sock:  # closed
                    return
                time.sleep(ACCEPT_PAUSE_S)
                continue
            with self._lock:
                if self._closed:
                    connection.close()
                    return
                if self._mode == HANG:
                    self._held.append(connection)
                    if len(self._held) > HELD:
                        self._held.popleft().close()
                    continue
            threading.Thread(target=self._talk, args=(connection,), name="ssh session", daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        transport = paramiko.Transport(connection)
        with self._lock:
            self._transports.add(transport)
        try:
            transport.add_server_key(self._host_key)
            transport.start_server(server=SshSession(self._authorized_keys(), self._run, self._login))
            transport.join(SESSION_S)
        except (paramiko.SSHException, EOFError, OSError) as e:
            log.debug("ssh session: %s", e)
        finally:
            transport.close()
            with self._lock:
                self._transports.discard(transport)

    def _run(self, channel: paramiko.Channel, line: bytes) -> None:
        """Run a command that came over ssh; send its output and its exit status through the channel."""
        if self._login.greeting:
            _say(channel, GREETING)
        if self._login.tmux and not (self._home / NO_TMUX_FILE).exists():
            _say(channel, TMUX_SAYS, status=1)
            return
        try:
            command = SshCommand(line, self._home, self._environ)
        except (OSError, ValueError) as e:
            log.debug("ssh command: %s", e)
            channel.close()
            return
        timer = threading.Timer(COMMAND_TIMEOUT_S, command.kill)
        timer.daemon = True
        timer.start()
        try:
            if self._closed:  # otherwise the end of the instance finds it by its home
                command.kill()
            left = OUTPUT_LIMIT
            while left > 0 and (chunk := command.output(min(left, 65_536))):
                channel.sendall(chunk)
                left -= len(chunk)
            if left == 0:
                command.kill()
            channel.send_exit_status(command.wait())
            # Not close: that could overtake paramiko's own "yes, it runs", and the client hangs up anyway.
            channel.shutdown_write()
        except (OSError, EOFError, paramiko.SSHException) as e:
            log.debug("ssh command: %s", e)
            command.kill()  # the client has gone
        finally:
            command.wait()
            timer.cancel()
            command.close()


def _say(channel: paramiko.Channel, text: str, status: int | None = None) -> None:
    """Send a text through the channel, and with a status end it, unless the client has gone."""
    with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
        channel.sendall(text.encode())
        if status is not None:
            channel.send_exit_status(status)
            channel.shutdown_write()


class SshSession(paramiko.ServerInterface):
    """What one ssh connection may do: authenticate by key and run commands."""

    def __init__(
        self,
        authorized_keys: tuple[str, ...],
        run: Callable[[paramiko.Channel, bytes], None],
        login: SshLogin = KIND,
    ) -> None:
        self._login = login
        self._keys = {tuple(line.split()[:2]) for line in authorized_keys}
        self._run = run

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        good = username == "root" and (key.get_name(), key.get_base64()) in self._keys
        return paramiko.common.AUTH_SUCCESSFUL if good else paramiko.common.AUTH_FAILED

    def get_banner(self) -> tuple[str | None, str | None]:
        return (GREETING, "en") if self._login.greeting else (None, None)

    def get_allowed_auths(self, username: str) -> str:  # noqa: ARG002
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:  # noqa: ARG002
        if kind == "session":
            return paramiko.common.OPEN_SUCCEEDED
        return paramiko.common.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=self._run, args=(channel, command), name="ssh command", daemon=True).start()
        return True


class SshCommand:
    """A command given over ssh, in a process session of its own, which is killed as a whole."""

    def __init__(self, command: bytes, home: Path, environ: Mapping[str, str]) -> None:
        """Start the command. Raises OSError when the home directory is gone."""
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", command],
            cwd=home,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._lock = threading.Lock()
        self._reaped = False

    def kill(self) -> None:
        """Kill the command and all that it started in its session. Usable from any thread."""
        with self._lock:
            if not self._reaped:  # until then the number of its group cannot be another's
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def output(self, most: int) -> bytes:
        """Wait for the command's next output and return it, at most `most` bytes.

        Empty when the command and all that it left in the background have closed theirs.
        """
        assert self._process.stdout is not None  # noqa: S101 it was asked for above
        return self._process.stdout.read1(most)  # type: ignore[attr-defined, no-any-return]

    def wait(self) -> int:
        """Wait for the end of the command; return its exit status as a shell gives it."""
        if not self._reaped:
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            self._reaped = True
            status = self._process.wait()
        return 128 - status if status < 0 else status

    def close(self) -> None:
        """Close our end of the command's output."""
        self._process.stdout.close()  # type: ignore[union-attr]
