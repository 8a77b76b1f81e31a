"""Connections without a byte: many clients open them, and others must still be served."""

import subprocess
import sys
import urllib.request
from contextlib import ExitStack

from bench.hostile.faces import Face

IDLE = 22_500
"""Connections in all: more than a server has files where the limit is 20,000."""

CLIENTS = 6
"""Processes that open them; one has too few files."""

_OPENS = """
import resource, socket, sys
many = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (many + 100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
kept = [socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=60.0) for _ in range(many)]
print("open", flush=True)
sys.stdin.read()
"""


def open_idle(face: Face, count: int) -> float:
    """Open them, ask for the server's health meanwhile, and return its memory with all of them, MB."""
    with ExitStack() as stack:
        clients = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", _OPENS, str(face.port), str(count // CLIENTS)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )
            for _ in range(CLIENTS)
        ]
        for client in clients:
            assert client.stdout is not None
            client.stdout.readline()
            with urllib.request.urlopen(f"http://127.0.0.1:{face.port}/health", timeout=10.0):
                pass
        with_all = face.mb
        for client in clients:
            client.communicate()
    return with_all
