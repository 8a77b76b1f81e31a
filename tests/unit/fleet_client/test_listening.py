"""Who may listen where, and on whose socket."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench.chaos.stack import handing_over
from fleet_client.listening import bind_socket, check_bind
from process.errors import ConfigError


@pytest.mark.parametrize("host", ["127.0.0.1", "127.5.5.5", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_bind(host, 8200, keys_present=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.org"])
def test_listening_elsewhere_needs_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="needs keys"):
        check_bind(host, 8200, keys_present=False)
    check_bind(host, 8200, keys_present=True)


def test_a_port_in_use_is_a_config_error() -> None:
    with (
        bind_socket("127.0.0.1", 0) as sock,
        pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:"),
    ):
        bind_socket("127.0.0.1", sock.getsockname()[1])
    for host, port in (("127.0.0.1", 70_000), ("no-such-host.invalid", 80)):
        with pytest.raises(ConfigError, match="cannot listen"):
            bind_socket(host, port)


ROOT = Path(__file__).resolve().parents[3]

CHILD = """
import os, sys
os.environ["LISTEN_PID"] = sys.argv[2] or os.environ["LISTEN_PID"]
from bench.chaos.stack import handing_over
from fleet_client.listening import bind_socket
sock = bind_socket("127.0.0.1", int(sys.argv[1]))
print(sock.fileno(), os.get_inheritable(sock.fileno()), "LISTEN_FDS" in os.environ)
sock.accept()[0].sendall(b"served")
"""


def child_on(listening: socket.socket, port: int, pid: str = "") -> "subprocess.Popen[str]":
    """Start a program to which that socket is handed over as its third file, as systemd does it."""
    command = (*handing_over(listening.fileno()), sys.executable, "-c", CHILD, str(port), pid)
    return subprocess.Popen(
        command,
        cwd=ROOT,
        pass_fds=[listening.fileno()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_socket_that_a_service_manager_hands_over_takes_clients_while_the_server_is_started_again() -> None:
    with bind_socket("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=20.0) as client:  # nobody serves yet
            server = child_on(listening, port)
            assert client.recv(10) == b"served"
        said, _ = server.communicate(timeout=20.0)
        assert said.split() == ["3", "False", "False"]


def test_a_socket_of_another_address_is_refused_and_one_for_another_process_is_not_taken() -> None:
    with bind_socket("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        _, why = child_on(listening, port + 1).communicate(timeout=20.0)
        assert "the service manager listens on" in why
        _, why = child_on(listening, port, pid="1").communicate(timeout=20.0)
        assert "cannot listen on" in why
