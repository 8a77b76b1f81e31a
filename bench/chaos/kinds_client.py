"""Clients that hoard, lie, ask for the impossible and flood: one key of its own, beside the steady users."""

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench.chaos.kinds import Effect, Kind, Scene
from bench.chaos.stack import AUTOSCALER, GATEWAYS, LOADBALANCERS, Stack, ask

TICK_S = 0.5

IDLE_CONNECTIONS = 400
"""Of a flood: enough to be noticed, and few enough for the machine of the campaign."""

WRONG = ("wrong_certificate", "no_connection", "timeout", "status_500")

Act = Callable[[Stack, random.Random], None]


def again_and_again(act: Act, every_s: float = TICK_S) -> Effect:
    """A client does that until the fault is over."""

    @contextlib.contextmanager
    def effect(scene: Scene) -> Iterator[None]:
        end = threading.Event()

        def run() -> None:
            while not end.wait(every_s):
                with contextlib.suppress(OSError, http.client.HTTPException):
                    act(scene.stack, scene.rng)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    return effect


def _route(stack: Stack, rng: random.Random, **body: Any) -> Any:
    name = rng.choice(LOADBALANCERS)
    return ask(f"{stack.url(name)}/route", stack.client_keys["wicked"], body, timeout_s=2.0)


def hoard(stack: Stack, rng: random.Random) -> None:
    """Take 64 leases and use none."""
    _route(stack, rng, prompt_tokens=5, max_tokens=5, count=64)


def hoard_first(stack: Stack, rng: random.Random) -> None:
    """The same, before everybody else."""
    _route(stack, rng, prompt_tokens=5, max_tokens=5, count=64, priority="high")


def impossible(stack: Stack, rng: random.Random) -> None:
    """Ask for what no machine can do."""
    _route(stack, rng, prompt_tokens=1_666_000, max_tokens=50, wait_s=1.0)
    _route(stack, rng, work=1e7)


def accuse(stack: Stack, rng: random.Random) -> None:
    """Take a lease and say that its machine failed."""
    said = _route(stack, rng, prompt_tokens=5, max_tokens=5) or {}
    if "request_id" in said:
        body = {"request_id": said["request_id"], "outcome": "failed", "why": rng.choice(WRONG)}
        for name in LOADBALANCERS:
            ask(f"{stack.url(name)}/done", stack.client_keys["wicked"], body)


def end_others(stack: Stack, rng: random.Random) -> None:
    """End leases that were given to others, by guessing their names."""
    for _ in range(10):
        body = {"request_id": f"{rng.getrandbits(64):016x}", "outcome": "failed", "why": "timeout"}
        ask(f"{stack.url(rng.choice(LOADBALANCERS))}/done", stack.client_keys["wicked"], body)


def huge_prompt(stack: Stack, rng: random.Random) -> None:
    """Send the gateway a prompt of 5 MB."""
    body = {"model": "vllm-13", "max_tokens": 5, "messages": [{"role": "user", "content": 5_000_000 * "a"}]}
    ask(f"{stack.url(rng.choice(GATEWAYS))}/v1/chat/completions", "x", body, timeout_s=5.0)


def hang_up(stack: Stack, rng: random.Random) -> None:
    """Ask for an answer and reset the connection."""
    body = {
        "model": "vllm-13",
        "max_tokens": 200,
        "stream": True,
        "messages": [{"role": "user", "content": "a"}],
    }
    raw = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", stack.ports[rng.choice(GATEWAYS)]), timeout=2.0) as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(raw), raw)
        )
        time.sleep(rng.uniform(0.0, 0.5))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


def garbage(stack: Stack, rng: random.Random) -> None:
    """Send bytes that are no HTTP, or nearly."""
    name = rng.choice((AUTOSCALER, *LOADBALANCERS, *GATEWAYS))
    begin = rng.choice((b"", b"POST /route HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n", b"\x16\x03\x01"))
    with socket.create_connection(("127.0.0.1", stack.ports[name]), timeout=2.0) as sock:
        sock.sendall(begin + rng.randbytes(rng.randrange(2000)))
        sock.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            sock.recv(4096)


def odd_bodies(stack: Stack, rng: random.Random) -> None:
    """Send JSON that is none of our messages to every face."""
    odd: tuple[Any, ...] = (
        [],
        {},
        {"prompt_tokens": -1},
        {"prompt_tokens": 10**400},
        {"work": "\ud800"},
        1e308,
        None,
    )
    for name, path, key in (
        *(
            (name, path, stack.client_keys["wicked"])
            for name in LOADBALANCERS
            for path in ("/route", "/done")
        ),
        (AUTOSCALER, "/busy", "wrong"),
        (AUTOSCALER, "/policy", stack.operator_key),
        (AUTOSCALER, "/ready", "wrong"),
    ):
        method = "PUT" if path == "/policy" else "POST"
        ask(
            stack.url(name) + path,
            key,
            {"name": rng.choice(odd)} if path == "/policy" else rng.choice(odd),
            method,
        )


def keyless_body(stack: Stack, rng: random.Random) -> None:
    """Send 8 MB to a route that wants a key, without one."""
    name, path = rng.choice([(name, "/hot") for name in LOADBALANCERS] + [(AUTOSCALER, "/busy")])
    with socket.create_connection(("127.0.0.1", stack.ports[name]), timeout=2.0) as sock:
        size = 8 * 2**20
        method = "PUT" if path == "/hot" else "POST"
        sock.sendall(
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {size}\r\n\r\n".encode()
        )
        for _ in range(size // 65_536):
            sock.sendall(65_536 * b" ")


@contextlib.contextmanager
def flood(scene: Scene) -> Iterator[None]:
    """Hundreds of connections that say nothing, or the beginning of a head."""
    with contextlib.ExitStack() as open_ones:
        for _ in range(IDLE_CONNECTIONS):
            name = scene.rng.choice((AUTOSCALER, *LOADBALANCERS, *GATEWAYS))
            sock = open_ones.enter_context(socket.socket())
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(("127.0.0.1", scene.stack.ports[name]))
        time.sleep(0.1)
        yield


@contextlib.contextmanager
def long_heads(scene: Scene) -> Iterator[None]:
    """Connections that send a head for ever."""
    end = threading.Event()

    def send() -> None:
        name = scene.rng.choice((AUTOSCALER, *LOADBALANCERS, *GATEWAYS))
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", scene.stack.ports[name]), 2.0) as s,
        ):
            s.sendall(b"GET /health HTTP/1.1\r\n")
            while not end.wait(0.1):
                s.sendall(b"X-More: " + 8000 * b"x" + b"\r\n")

    threads = [threading.Thread(target=send, daemon=True) for _ in range(20)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()


KINDS = (
    Kind("client:hoards", again_and_again(hoard), (5.0, 20.0)),
    Kind("client:hoards-first", again_and_again(hoard_first), (5.0, 20.0)),
    Kind("client:asks-impossible", again_and_again(impossible), (5.0, 20.0)),
    Kind("client:accuses", again_and_again(accuse, 0.3), (5.0, 20.0)),
    Kind("client:ends-others", again_and_again(end_others), (3.0, 10.0)),
    Kind("client:huge-prompt", again_and_again(huge_prompt, 1.0), (3.0, 10.0)),
    Kind("client:hangs-up", again_and_again(hang_up), (3.0, 15.0)),
    Kind("client:garbage", again_and_again(garbage, 0.1), (3.0, 15.0)),
    Kind("client:odd-bodies", again_and_again(odd_bodies, 0.2), (3.0, 15.0)),
    Kind("client:keyless-bodies", again_and_again(keyless_body, 0.3), (3.0, 10.0)),
    Kind("client:floods", flood, (3.0, 15.0)),
    Kind("client:long-heads", long_heads, (3.0, 12.0)),
)
