"""The ssh server of one instance: its own port and host key, public keys only, commands only.

All of them live in the process of the local cloud: one of their own would cost each instance 40 MB. What
they run is a process of the instance: its home, its user, nothing of the environment of its start script
(vast-contract 2.14).
"""

import contextlib
import logging
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import paramiko

log = logging.getLogger("localcloud")
# paramiko logs a traceback for every scanner and every client that hangs up.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)

COMMAND_TIMEOUT_S = 60.0
"""A command that runs longer is killed."""

OUTPUT_LIMIT = 2**20
"""Bytes of output that are sent back."""

SESSION_S = 120.0
"""A connection is closed after so long, whatever it does."""

OK, HANG, REFUSE = "ok", "hang", "refuse"


class SshServer:
    """Listens while the instance runs. Its methods may be called from any thread."""

    def __init__(
        self,
        sock: socket.socket,
        host_key: paramiko.PKey,
        authorized_keys: Callable[[], tuple[str, ...]],
        home: Path,
        environ: Mapping[str, str],
    ) -> None:
        """sock is listening. authorized_keys: the lines that open it now."""
        self._host_key = host_key
        self._authorized_keys = authorized_keys
        self._home = home
        self._environ = {**environ, "HOME": str(home)}
        self._lock = threading.Lock()
        self._mode = OK
        self._held: list[socket.socket] = []
        self._transports: set[paramiko.Transport] = set()
        self._closed = False
        self._sock: socket.socket | None = None
        self._port: int = sock.getsockname()[1]
        self._listen(sock)

    def behave(self, mode: str) -> None:
        """From now on "ok", "hang" (accept and say nothing) or "refuse" (nobody listens)."""
        with self._lock:
            was, self._mode = self._mode, mode
            if self._closed or was == mode:
                return
            held, self._held = self._held, []
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
        """Nobody listens any more, and who is connected is thrown out."""
        with self._lock:
            self._closed = True
            transports, held = list(self._transports), self._held
            self._held = []
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
                return
            with self._lock:
                if self._closed:
                    connection.close()
                    return
                if self._mode == HANG:
                    self._held.append(connection)
                    continue
            threading.Thread(target=self._talk, args=(connection,), name="ssh session", daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        transport = paramiko.Transport(connection)
        with self._lock:
            self._transports.add(transport)
        try:
            transport.add_server_key(self._host_key)
            transport.start_server(server=_Session(self._authorized_keys(), self._home, self._environ))
            transport.join(SESSION_S)
        except (paramiko.SSHException, EOFError, OSError) as e:
            log.debug("ssh session: %s", e)
        finally:
            transport.close()
            with self._lock:
                self._transports.discard(transport)


class _Session(paramiko.ServerInterface):
    """One connection."""

    def __init__(self, authorized_keys: tuple[str, ...], home: Path, environ: Mapping[str, str]) -> None:
        self._keys = {tuple(line.split()[:2]) for line in authorized_keys}
        self._home = home
        self._environ = environ

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        good = username == "root" and (key.get_name(), key.get_base64()) in self._keys
        return paramiko.common.AUTH_SUCCESSFUL if good else paramiko.common.AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:  # noqa: ARG002
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:  # noqa: ARG002
        if kind == "session":
            return paramiko.common.OPEN_SUCCEEDED
        return paramiko.common.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=self._run, args=(channel, command), name="ssh command", daemon=True).start()
        return True

    def _run(self, channel: paramiko.Channel, command: bytes) -> None:
        process = subprocess.Popen(
            ["/bin/bash", "-c", command],
            cwd=self._home,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        timer = threading.Timer(COMMAND_TIMEOUT_S, _kill, (process,))
        timer.start()
        try:
            assert process.stdout is not None  # noqa: S101 it was asked for above
            left = OUTPUT_LIMIT
            while left > 0 and (chunk := process.stdout.read1(min(left, 65_536))):  # type: ignore[attr-defined]
                channel.sendall(chunk)
                left -= len(chunk)
            if left == 0:
                _kill(process)
            channel.send_exit_status(process.wait() & 0xFF)
            # Not close: that could overtake paramiko's own "yes, it runs", and the client hangs up anyway.
            channel.shutdown_write()
        except (OSError, EOFError, paramiko.SSHException) as e:
            log.debug("ssh command: %s", e)
        finally:
            timer.cancel()
            _kill(process)
            process.stdout.close()  # type: ignore[union-attr]
            process.wait()


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)


def listen_on(port: int) -> socket.socket:
    """A listening socket on loopback; raises OSError."""
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen(32)
    except OSError:
        sock.close()
        raise
    return sock
