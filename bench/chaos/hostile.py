"""Hostile inputs over all faces of our servers: made from the message structs, and raw bytes.

    python -m bench.chaos.hostile [--count 200000] [--seed N] [--json FILE]

Each input is a body of a route with fields left out, made up, of another type or out of range, or a few bytes
changed, or no HTTP at all; half of them with the right key or signature, so that they get far. Wanted: no
answer of 500, no traceback in any log, memory as it was.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from bench.chaos.logs import look_through
from bench.chaos.stack import AUTOSCALER, GATEWAYS, LOADBALANCERS, Stack, StackSettings, handles
from bench.chaos.truth import Truth
from bench.children import memory_mb
from bench.command import add_counts, bench_parser, write_json
from fleet.outside.keys import FleetKeys
from fleet_client.flags import run_main
from web.messages.busy import BusyReport
from web.messages.hot_set import HotSet
from web.messages.leases import DoneBody, RouteBody
from web.messages.operator import ManageBody, PolicyBody
from web.messages.reports import PushedReport, ReadyBody
from web.signatures import name_and_key

log = logging.getLogger("chaos")

WORKERS = 8
"""Connections that send at once."""

ANSWER_S = 10.0
"""Seconds for an answer; what is not answered then is counted as silent."""

FULL_S = 120.0

ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        1,
        2**31,
        2**53,
        2**63,
        10**30,
        10**308,
        10**400,
        -(10**400),
        0.5,
        -0.0,
        1e308,
        5e-324,
    ),
    *(
        "",
        "x",
        "\ud800",
        "\x00",
        "\x1b[2J",
        "../../etc/passwd",
        "high",
        "finished",
        "0" * 16,
        5000 * "a",
        "NaN",
    ),
    *([], {}, [[]], {"": {}}, [None], list(range(100)), {"a": 1}, {"1": {"working_s": -1}}),
)
"""Values of all kinds."""

TEXTS = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b'"\\ud800"',
    b"[" * 2000,
    b'{"a":' * 2000,
    b"\xff\xfe",
    b"",
)
"""Pieces that are no JSON, or none that Python writes."""


@dataclass(frozen=True)
class Face:
    """One route of one server. key: its bearer key, or "signed"; struct: its body."""

    server: str
    method: str
    path: str
    key: str
    struct: type | None


def faces(stack: Stack, control_key: str) -> list[Face]:
    """Return all routes that take something."""
    found = []
    for name in LOADBALANCERS:
        client = stack.client_keys["wicked"]
        found += [
            Face(name, "POST", "/route", client, RouteBody),
            Face(name, "POST", "/done", client, DoneBody),
            Face(name, "POST", "/report", "signed", PushedReport),
            Face(name, "PUT", "/hot", control_key, HotSet),
            Face(name, "GET", "/status", stack.operator_key, None),
        ]
    found += [
        Face(AUTOSCALER, "POST", "/busy", control_key, BusyReport),
        Face(AUTOSCALER, "POST", "/ready", "signed", ReadyBody),
        Face(AUTOSCALER, "PUT", "/policy", stack.operator_key, PolicyBody),
        Face(AUTOSCALER, "PUT", "/manage", stack.operator_key, ManageBody),
        Face(AUTOSCALER, "GET", "/costs", stack.operator_key, None),
        Face(AUTOSCALER, "GET", "/hot", control_key, None),
    ]
    found += [Face(name, "POST", "/v1/chat/completions", "x", None) for name in GATEWAYS]
    return found


class Inputs:
    """Makes inputs from a seed. sign: the Authorization header of an instance for a path and a body."""

    def __init__(self, seed: int, sign: Callable[[str, bytes], str]) -> None:
        """Begin with that seed."""
        self._rng = random.Random(seed)
        self._sign = sign

    def value(self, kind: Any, depth: int = 0) -> Any:
        """Return something for a field of that type: mostly right, else odd."""
        if self._rng.random() < 0.3:
            return self._rng.choice(ODD)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and depth < 4:
            return self.fields(kind, depth + 1)
        text = str(kind)
        if "tuple" in text or "list" in text or "Sequence" in text:
            return [self._rng.choice(ODD) for _ in range(self._rng.randrange(4))]
        if "dict" in text or "Mapping" in text:
            return {str(self._rng.randrange(9)): self._rng.choice(ODD) for _ in range(self._rng.randrange(4))}
        if "bool" in text:
            return self._rng.random() < 0.5
        if "int" in text or "float" in text:
            return self._rng.choice((0, 1, 5, 100, 0.5))
        return self._rng.choice(
            ("finished", "failed", "x", "abc123", "normal", "fixed", f"{self._rng.random()}")
        )

    def fields(self, struct: type[msgspec.Struct], depth: int = 0) -> dict[str, Any]:
        """Return an object with the fields of a message, some left out, some made up."""
        found = {
            field.encode_name: self.value(field.type, depth)
            for field in msgspec.structs.fields(struct)
            if self._rng.random() < 0.85
        }
        if self._rng.random() < 0.1:
            found[self._rng.choice(("extra", "", "\ud800", "__class__"))] = self._rng.choice(ODD)
        return found

    def body(self, face: Face) -> bytes:
        """Return a body for that route."""
        if face.struct is None and face.path.startswith("/v1/"):
            said: Any = {
                "model": self.value(str),
                "messages": self._rng.choice(
                    ([{"role": "user", "content": self.value(str)}], self.value(list))
                ),
                "max_tokens": self._rng.choice((1, 2, 3, self.value(int))),
                self._rng.choice(("n", "stream", "stop", "tools", "response_format")): self._rng.choice(ODD),
            }
            said["model"] = self._rng.choice(("vllm-13", said["model"]))
        else:
            said = self.fields(face.struct) if face.struct is not None else None
        raw = b"" if said is None else json.dumps(said).encode(errors="replace")
        chance = self._rng.random()
        if chance < 0.1 and raw:
            at = self._rng.randrange(len(raw))
            raw = raw[:at] + self._rng.choice((self._rng.randbytes(3), *TEXTS)) + raw[at + 1 :]
        elif chance < 0.15:
            raw = self._rng.choice(TEXTS)
        elif chance < 0.2:
            raw = self._rng.randbytes(self._rng.randrange(300))
        return raw

    def request(self, face: Face) -> bytes:
        """Return a whole request, or bytes that are nearly one."""
        raw, path = self.body(face), face.path
        if face.path == "/costs":
            path += "?" + self._rng.choice(
                ("from=-1", "from=1e400", "to=NaN", "from=%ff&to=x", "from=5&to=1", "")
            )
        key = face.key if self._rng.random() < 0.6 else self._rng.choice(("", "wrong", "\xff"))
        head = [f"{face.method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(raw)}"]
        if key == "signed":
            head.append(f"Authorization: {self._sign(path, raw)}")
        elif key:
            head.append(f"Authorization: Bearer {key}")
        if self._rng.random() < 0.1:
            head.append(
                self._rng.choice(
                    ("Content-Length: 5", "Transfer-Encoding: chunked", "Expect: x", "A" * 70_000)
                )
            )
        whole = "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + raw
        if self._rng.random() < 0.05:
            at = self._rng.randrange(len(whole))
            whole = whole[:at] + self._rng.randbytes(2) + whole[at + 2 :]
        return whole


async def _answer(reader: asyncio.StreamReader) -> int:
    """Return the status of the next answer, whose body is read, too."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    if headers.get("transfer-encoding") == "chunked":
        while size := int((await reader.readline()).strip() or b"0", 16):
            await reader.readexactly(size + 2)
        await reader.readline()
    else:
        await reader.readexactly(int(headers.get("content-length", "0")))
    if headers.get("connection") == "close":
        raise ConnectionResetError(int(lines[0].split()[1]))
    return int(lines[0].split()[1])


async def _send_all(stack: Stack, routes: Sequence[Face], inputs: Inputs, count: int) -> Counter[str]:
    """Send so many inputs; return how often each answer came, by server."""
    seen: Counter[str] = Counter()
    left = count

    async def worker(rng: random.Random) -> None:
        nonlocal left
        open_ones: dict[str, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}
        while left > 0:
            left -= 1
            face = rng.choice(routes)
            if (
                face.server in GATEWAYS and rng.random() < 0.8
            ):  # each costs a lease and an answer of the engine
                face = rng.choice(routes)
            try:
                async with asyncio.timeout(ANSWER_S):
                    if face.server not in open_ones:
                        port = stack.ports[face.server]
                        open_ones[face.server] = await asyncio.open_connection("127.0.0.1", port, limit=2**26)
                    reader, writer = open_ones[face.server]
                    writer.write(inputs.request(face))
                    status: object = await _answer(reader)
            except (OSError, EOFError, ValueError, TimeoutError, asyncio.LimitOverrunError) as e:
                told = isinstance(e, ConnectionResetError) and e.args and isinstance(e.args[0], int)
                status = e.args[0] if told else "silent" if isinstance(e, TimeoutError) else "closed"
                if face.server in open_ones:
                    open_ones.pop(face.server)[1].transport.abort()
            seen[f"{face.server.split('-')[0]} {face.path} {status}"] += 1
            if sum(seen.values()) % 20_000 == 0:
                log.info("%d sent", sum(seen.values()))
        for _, writer in open_ones.values():
            writer.transport.abort()

    await asyncio.gather(*(worker(random.Random(number)) for number in range(WORKERS)))
    return seen


def run(count: int, seed: int) -> dict[str, Any]:
    """Send them to a stack of its own, and return what was found."""
    settings = StackSettings(seed, hot=1, total=1, max_instances=1)
    with Stack(settings) as stack:
        truth = Truth(stack)
        truth.start()
        with contextlib.suppress(TimeoutError):
            asyncio.run(_until_running(truth))
        master = FleetKeys(stack.state_dir).master_token(next(iter(truth.machines.values())).label)
        name, key = name_and_key(master)

        def sign(path: str, raw: bytes) -> str:
            signature = hmac.new(key.encode(), path.encode() + b" " + raw, hashlib.sha256)
            return f"Fleet {name}:{signature.hexdigest()}"

        control = (stack.state_dir / "control.key").read_text().strip()
        inputs, routes = Inputs(seed, sign), faces(stack, control)
        asyncio.run(_send_all(stack, routes, inputs, count // 10))  # warms up what is kept
        begin = _sizes(stack)
        seen = asyncio.run(_send_all(stack, routes, inputs, count))
        end = _sizes(stack)
        truth.stop()
        found = look_through(stack, "no prompt", [m.label for m in truth.machines.values()])
        left = stack.destroy_fleet()
    return {
        "sent": count,
        "answers": dict(sorted(seen.items())),
        "status_500": sum(n for what, n in seen.items() if what.endswith(" 500")),
        "tracebacks": found.tracebacks,
        "secrets": found.secrets,
        "mb": {name: [round(begin[name][0], 1), round(end[name][0], 1)] for name in begin},
        "handles": {name: [begin[name][1], end[name][1]] for name in begin},
        "left": left,
    }


async def _until_running(truth: Truth) -> None:
    async with asyncio.timeout(FULL_S):
        while not any(row["state"] == "running" and row["model_on_disk"] for row in truth.rows):
            await asyncio.sleep(0.5)


def _sizes(stack: Stack) -> dict[str, tuple[float, int]]:
    names = (AUTOSCALER, *LOADBALANCERS, *GATEWAYS)
    return {name: (memory_mb(stack.pid(name)), handles(stack.pid(name))) for name in names}


def main(argv: Sequence[str] | None = None) -> None:
    """Send the inputs; exit with 1 where an answer was 500 or a log has a traceback."""
    parser = bench_parser("chaos.hostile", __doc__)
    add_counts(parser, ("--count", 200_000, "inputs"), ("--seed", 1, "what they are made from"))
    said = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    found = run(said.count, said.seed)
    write_json(said.json, found)
    for what, n in found["answers"].items():
        print(f"{n:8} {what}")
    for what in ("sent", "status_500", "secrets", "mb", "handles", "left"):
        print(what, found[what])
    print(*found["tracebacks"][:20], sep="\n", flush=True)
    if found["status_500"] or found["tracebacks"] or found["secrets"] or found["left"]:
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
