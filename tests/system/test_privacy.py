"""No byte of a prompt or answer reaches autoscaler or loadbalancer (design, invariant 1), proven by looking.

Both run under a tap (tests/tap.py), which records all that their processes read, write, run and store.
Clients send prompts with canaries: words that exist nowhere else, in every encoding that a prompt, or a
program that handles one, may give them. Then nothing recorded, no file and no answer of any route may hold
one; and the same search must find every one where they did pass, and where something leaks on purpose.
"""

import asyncio
import base64
import http.client
import json
import os
import re
import secrets
import socket
import ssl
import string
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock
from urllib.parse import quote, urlsplit

import httpx2
import pytest

from dispatch.predicted_load import warm_up
from fleet.outside import ssh_log
from fleet_client import tls_pins
from process.compiled import CACHE
from simulation.live.local_stack import LocalStack
from simulation.live.stack_config import Programs, StackConfig
from tests.paths import ROOT
from tests.tap import read_recording
from tests.waiting import wait_for
from web.keys import AccessKeys

pytestmark = pytest.mark.timeout(280)  # of the run, which is set up once

MODEL = "vllm-13"


# -- canaries ------------------------------------------------------------------------------------------


def forms(text: str) -> dict[str, tuple[bytes, ...]]:
    """What bytes a text may have become, by the name of the encoding."""
    raw = text.encode()
    units = [f"\\u{unit:04x}" for (unit,) in struct.iter_unpack(">H", text.encode("utf-16-be"))]
    escaped = "".join(units)
    percent = "".join(f"%{b:02x}" for b in raw)
    return {
        "utf-8": (raw,),
        "utf-16": (text.encode("utf-16-le"), text.encode("utf-16-be")),
        "hex": (raw.hex().encode(), raw.hex().upper().encode()),
        "base64": base64_parts(raw),
        "percent": (percent.encode(), percent.upper().encode(), quote(text).encode()),
        "JSON escapes": (
            escaped.encode(),
            escaped.upper().replace("\\U", "\\u").encode(),
            json.dumps(text)[1:-1].encode(),
            escaped.replace("\\", "\\\\").encode(),  # JSON in JSON
        ),
        "Python escapes": (ascii(text)[1:-1].encode(), repr(raw)[2:-1].encode()),
        "reversed": (text[::-1].encode(), raw[::-1]),
    }


def base64_parts(raw: bytes) -> tuple[bytes, ...]:
    """What is sure to be in the base64 of anything that holds those bytes: one for each place in a group."""
    found = []
    for before in range(3):
        sure = slice((0, 2, 3)[before], (before + len(raw)) * 8 // 6)
        one = base64.b64encode(bytes(before) + raw)[sure]
        found += [one, one.translate(bytes.maketrans(b"+/", b"-_"))]
    return tuple(dict.fromkeys(found))


def forms_of_ids(ids: list[int]) -> dict[str, tuple[bytes, ...]]:
    """The same for a prompt of token ids."""
    return {
        "ids": (", ".join(map(str, ids)).encode(), ",".join(map(str, ids)).encode()),
        "packed ids": (struct.pack(f"<{len(ids)}I", *ids), struct.pack(f"<{len(ids)}Q", *ids)),
    }


def found_in(data: Mapping[str, bytes], needles: Mapping[str, tuple[bytes, ...]]) -> list[str]:
    """Which of them are where, with what stands around them."""
    found = []
    for where, raw in data.items():
        for name, some in needles.items():
            for needle in some:
                if (at := raw.find(needle)) >= 0:
                    around = raw[max(0, at - 60) : at + len(needle) + 60]
                    found.append(f"{name} in {where}: …{around!r}…")
    return found


@dataclass(frozen=True)
class Stems:
    """What the canaries of a run begin with: in plain letters, in letters of many bytes, as token ids."""

    plain: str
    wide: str
    ids: list[int]

    @classmethod
    def draw(cls) -> "Stems":
        """Some that nobody has seen before."""
        letters = (
            string.ascii_lowercase,
            "".join(map(chr, range(0x431, 0x44F))),
            "".join(map(chr, range(0x4E00, 0x4F00))),
        )
        plain, cyrillic, chinese = (
            "".join(secrets.choice(some) for _ in range(n))
            for some, n in zip(letters, (14, 5, 4), strict=True)
        )
        animals = "".join(secrets.choice("🦎🐙🦔🦉🐝🦩🐌🦡") for _ in range(3))
        return cls(plain, cyrillic + animals + chinese, [secrets.randbelow(28_000) + 3000 for _ in range(8)])

    @property
    def needles(self) -> dict[str, tuple[bytes, ...]]:
        """All forms of all stems."""
        texts = {"plain": self.plain, "wide": self.wide}
        found = {
            f"{kind}, {name}": some for kind, text in texts.items() for name, some in forms(text).items()
        }
        return found | forms_of_ids(self.ids)


# -- what clients send ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """One request to an instance. token: "lease", or something else to be sent instead of it, or none.

    leave_after: bytes of the answer after which the client hangs up.
    """

    name: str
    body: str  # base64
    path: str = "/v1/completions"
    headers: dict[str, str] = field(default_factory=dict)
    token: str | None = "lease"
    leave_after: int | None = None
    outcome: str = "finished"


def in_base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def is_json(raw: bytes) -> bool:
    """Whether it can stand in a text of JSON."""
    try:
        json.loads(b'"' + raw + b'"')
    except ValueError:
        return False
    return True


def ask(name: str, said: object, path: str = "/v1/completions", *, code: str = "ascii", **more: Any) -> Ask:
    """A request with that JSON; code: ascii for escapes, or the encoding of the body."""
    text = json.dumps(said, ensure_ascii=code == "ascii")
    return Ask(name, in_base64(text.encode(code)), path, **more)


CHAT = "/v1/chat/completions"
LONG = {"max_tokens": 900, "ignore_eos": True}


def asks_of(stems: Stems) -> list[Ask]:
    """Requests with canaries wherever one can be, each its own."""
    made = 0

    def canary() -> str:
        nonlocal made
        made += 1
        return f"{stems.plain}-{made} {stems.wide}-{made}"

    def prompt(text: str, *, chat: bool = False, **more: Any) -> dict[str, Any]:
        asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        return {"model": MODEL, "max_tokens": 2, **asked, **more}

    asks = []
    every = [
        one
        for stem in (stems.plain, stems.wide)
        for name, some in forms(stem).items()
        for one in some
        if name != "utf-16"
    ]
    for path in ("/v1/completions", CHAT):
        chat = path == CHAT
        for stream in (False, True):
            for code in ("ascii", "utf-8", "utf-16-le", "utf-16-be"):
                body = prompt(canary(), chat=chat, stream=stream)
                asks.append(ask(f"{path} {stream} {code}", body, path, code=code))
            # All forms that a text can have inside a text.
            said = b" ".join(every).decode(errors="replace")
            asks.append(ask(f"{path} {stream} all forms", prompt(said, chat=chat, stream=stream), path))
    for stream in (False, True):
        for tokens in (0, 3):
            body = prompt(canary(), echo=True, stream=stream) | {"max_tokens": tokens}
            asks.append(ask(f"echo {stream} {tokens}", body))
        asks.append(ask(f"ids {stream}", prompt("", stream=stream) | {"prompt": stems.ids}))
    compact = json.dumps({"prompt": stems.ids, "max_tokens": 1}, separators=(",", ":"))
    asks.append(Ask("ids, compact", in_base64(compact.encode())))
    asks.append(ask("several prompts", prompt("") | {"prompt": [canary(), canary()], "n": 2, "echo": True}))
    function = {"name": canary(), "description": canary(), "parameters": {"enum": [canary()]}}
    parts = [{"type": "text", "text": canary()}, {"type": "text", "text": canary()}]
    asks += [
        ask("user and stop", prompt(canary(), user=canary(), stop=[canary()], logit_bias={})),
        ask("odd fields", prompt(canary()) | {canary(): canary(), "metadata": {"a": canary()}}),
        ask("tools", prompt(canary(), chat=True, tools=[{"type": "function", "function": function}]), CHAT),
        ask("parts", prompt("", chat=True) | {"messages": [{"role": "user", "content": parts}]}, CHAT),
        ask(
            "system and names",
            prompt("", chat=True)
            | {
                "messages": [
                    {"role": "system", "content": canary()},
                    {"role": canary(), "name": canary(), "content": canary()},
                    {"role": "assistant", "content": canary(), "tool_calls": [{"id": canary()}]},
                ]
            },
            CHAT,
        ),
        ask(
            "headers",
            prompt("x"),
            headers={
                "X-Canary": f"{stems.plain}-header",
                f"X-{stems.plain}": "name",
                "X-Request-Id": f"{stems.plain}-id",
                "User-Agent": f"{stems.plain}-agent",
                "Cookie": f"a={stems.plain}",
                "Referer": f"http://x/{stems.plain}",
                "X-Forwarded-For": f"{stems.plain}",
            },
        ),
        ask("query", prompt("x"), f"/v1/completions?q={stems.plain}&w={quote(stems.wide)}"),
        ask("path", prompt("x"), f"/v1/{stems.plain}/{quote(stems.wide)}"),
        ask("tokenize", {"model": MODEL, "prompt": canary()}, "/tokenize"),
        ask("unknown model", prompt("x", model=canary())),
        ask("unknown model of a chat", prompt("x", chat=True, model=canary()), CHAT),
        ask("no JSON", prompt(canary()), headers={"Content-Type": f"text/{stems.plain}"}),
        # As they are, so that JSON's escapes are what they stand for; and those that JSON has not.
        Ask("escapes", in_base64(b'{"prompt": "' + b" ".join(o for o in every if is_json(o)) + b'"}')),
        Ask("broken JSON", in_base64(b'{"prompt": "' + b" ".join(every))),
        ask("too long", prompt(canary() * 2000)),
        ask("too many tokens", prompt(canary()) | {"max_tokens": 10**6}),
        ask("wrong type", prompt("") | {"prompt": {canary(): canary()}}),
        ask("no token", prompt(canary()), token=None),
        ask("wrong token", prompt(canary()), token=f"{stems.plain}-token"),
        ask("left", prompt(canary(), stream=True, echo=True) | LONG, leave_after=2000),
        ask("left before it began", prompt(canary()) | LONG, leave_after=0),
        ask("failed", prompt(canary()), outcome="failed"),
    ]
    return asks


def send(one: Ask, lease: Mapping[str, Any]) -> dict[str, Any]:
    """The request of a client, as any client would send it; what came back."""
    where = urlsplit(lease["address"])
    if where.scheme == "https":
        context = tls_pins.pinned_context(lease["certificate"])
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            where.hostname or "", where.port, timeout=30, context=context
        )
    else:
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=30)
    token = lease["token"] if one.token == "lease" else one.token
    headers = {"Content-Type": "application/json", **one.headers}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    status, answer = 0, b""
    try:
        connection.request("POST", one.path, base64.b64decode(one.body), headers)
        if one.leave_after != 0:
            reply = connection.getresponse()
            status = reply.status
            answer = reply.read(one.leave_after)
    except (OSError, http.client.HTTPException) as e:
        answer = f"broken off: {type(e).__name__}".encode()
    finally:
        connection.close()
    return {"name": one.name, "status": status, "answer": in_base64(answer)}


def post(url: str, said: object) -> Any:
    """The answer of a POST of ours."""
    asked = urllib.request.Request(url, json.dumps(said).encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(asked, timeout=60) as reply:  # noqa: S310 our own port
        return json.load(reply)


def be_a_client(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each request a lease, the request, and how it ended."""
    found = []
    for one in (Ask(**a) for a in told["asks"]):
        lease = post(f"{told['loadbalancer']}/route", {"prompt_tokens": 50, "max_tokens": 5, "wait_s": 30})
        got = send(one, lease)
        if one.leave_after is None:
            post(f"{told['loadbalancer']}/done", {"request_id": lease["request_id"], "outcome": one.outcome})
        found.append(got | {"request_id": lease["request_id"], "address": lease["address"]})
    return found


def main() -> None:
    """What the tap runs: a client, or a program that leaks wherever a program can."""
    told = json.load(sys.stdin)
    json.dump(be_a_client(told) if "asks" in told else leak(told), sys.stdout)


def tapped(directory: Path, module: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "tests.tap", str(directory), module)


def run_tapped(directory: Path, told: object) -> Any:
    """What our main says to that, under the tap."""
    ran = subprocess.run(
        tapped(directory, __name__),
        input=json.dumps(told).encode(),
        stdout=subprocess.PIPE,
        cwd=ROOT,
        timeout=90,
        check=True,
    )
    return json.loads(ran.stdout)


# -- the run -------------------------------------------------------------------------------------------


def recordings(directory: Path) -> dict[str, bytes]:
    """All streams of all processes that were tapped there."""
    return {
        f"{path.name}, {stream}": data
        for path in sorted(directory.glob("*.tap"))
        for stream, data in read_recording(path).items()
    }


def files_below(directory: Path) -> dict[str, bytes]:
    """What lies there, but for the disks of instances, which are not ours but the machine's."""
    found = {}
    for path in sorted(directory.rglob("*")):
        inside = path.relative_to(directory).parts
        if inside[:2] == ("cloud", "instances") and "home" in inside:
            continue
        with suppress(FileNotFoundError):
            if path.is_file():
                found[str(path.relative_to(directory))] = str(path).encode() + b"\n" + path.read_bytes()
    return found


def get_routes() -> list[tuple[str, str]]:
    """Every route that can be read: (autoscaler or loadbalancer, path), from the programs themselves."""
    import autoscaler_server
    import loadbalancer_server

    clock: Any = SimpleNamespace(clock=time.time)
    apps = {
        "autoscaler": autoscaler_server.create_app(clock, AccessKeys("x"), 1.0, lambda _: ""),
        "loadbalancer": loadbalancer_server.create_app(MagicMock(), AccessKeys("x")),
    }
    return [
        (name, rule.rule)
        for name, app in apps.items()
        for rule in app.url_map.iter_rules()
        if "GET" in (rule.methods or ()) and not rule.arguments
    ]


@dataclass
class Run:
    """What there is to look at after a run."""

    stems: Stems
    leaked: Stems
    asks: list[Ask]
    said: list[dict[str, Any]] = field(default_factory=list)
    routes: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    files_after: dict[str, bytes] = field(default_factory=dict)
    servers: dict[str, bytes] = field(default_factory=dict)
    client: dict[str, bytes] = field(default_factory=dict)
    boot_id: str = ""
    label: str = ""
    state_dir: Path = Path()


def get(url: str, key: str = "") -> bytes:
    asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})  # noqa: S310
    try:
        reply = urllib.request.urlopen(asked, timeout=30)  # noqa: S310 our own port
    except urllib.error.HTTPError as e:
        reply = e  # that there is no curve yet is an answer too
    with reply:
        said: bytes = reply.read()
        return said


def unfinished(stack: LocalStack) -> int:
    status = json.loads(get(f"{stack.loadbalancer_url}/status"))
    return sum(i["unfinished"] for i in status["instances"])


def log_checks(servers: Path) -> int:
    """How often the autoscaler has read a log over ssh."""
    return sum(raw.count(b"END\n") for name, raw in recordings(servers).items() if name.endswith("ssh in"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run of the whole system, with all kinds of requests."""
    warm_up()  # numba writes what it compiles once; the servers are to write nothing there
    folder = tmp_path_factory.mktemp("privacy")
    servers, clients = folder / "servers", folder / "clients"
    servers.mkdir()
    clients.mkdir()
    config = StackConfig(
        instances=1,
        max_instances=1,
        speedup=1000.0,
        hot=1,
        poll_interval_s=0.5,
        check_boot_every_s=0.5,
        state_dir=folder / "state",
        autoscaler_args=("--check-hot-every-s", "0.5"),
    )
    programs = Programs(
        autoscaler=tapped(servers, "autoscaler_server"),
        loadbalancer=tapped(servers, "loadbalancer_server"),
    )
    stems, leaked = Stems.draw(), Stems.draw()
    found = Run(stems, leaked, asks_of(stems), state_dir=folder / "state")
    with LocalStack(config, programs, say=lambda _: None) as stack:
        homes = [*(folder / "state" / "cloud" / "instances").glob("*/home")]
        found.boot_id = (homes[0] / "fleet" / "boot" / "boot_id").read_text()
        with (homes[0] / "fleet" / "model.log").open("a") as log:
            log.write(logged(f"{stems.plain} {stems.wide} 37%"))
        told = {"loadbalancer": stack.loadbalancer_url, "asks": [vars(a) for a in found.asks]}
        found.said = run_tapped(clients, told)
        wait_for("the loadbalancer knows of all ends", lambda: unfinished(stack) == 0)
        checked = log_checks(servers)
        wait_for("logs were read again", lambda: log_checks(servers) >= checked + 2)

        broken = ask("broken off", {"prompt": f"{stems.plain} {stems.wide}", "stream": True} | LONG)
        found.said += kill_in_the_middle(stack, clients, broken)
        found.asks.append(broken)
        wait_for("the loadbalancer knows of its end", lambda: unfinished(stack) == 0)

        found.routes = read_routes(stack)
        rows = json.loads(found.routes["autoscaler /instances"])["instances"]
        found.label = rows[0]["label"]
        found.files = files_below(found.state_dir)
        leak_on_purpose(stack, leaked)
    found.files_after = files_below(found.state_dir)
    found.servers, found.client = recordings(servers), recordings(clients)
    return found


def kill_in_the_middle(stack: LocalStack, clients: Path, one: Ask) -> list[dict[str, Any]]:
    """What a client sees whose model server is killed while it answers."""
    told = {"loadbalancer": stack.loadbalancer_url, "asks": [vars(one)]}
    client = subprocess.Popen(
        tapped(clients, __name__), stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert client.stdin is not None
        client.stdin.write(json.dumps(told).encode())
        client.stdin.close()
        client.stdin = None
        recording = clients / f"{__name__}-{client.pid}.tap"
        wait_for(
            "its answer comes",
            lambda: recording.exists() and any(b"data: {" in d for d in read_recording(recording).values()),
        )
        (row,) = json.loads(get(f"{stack.cloud_url}/localcloud/status"))["instances"]
        for pid in row["pids"]:
            with suppress(OSError):
                if b"vllm.entrypoints.cli.main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, 9)
        said, _ = client.communicate(timeout=60)
    finally:
        client.kill()
        client.wait()
    answer: list[dict[str, Any]] = json.loads(said)
    return answer


def read_routes(stack: LocalStack) -> dict[str, bytes]:
    """What every route says that can be read."""
    control = (stack.state_dir / "control.key").read_text().strip()
    urls = {"autoscaler": stack.autoscaler_url, "loadbalancer": stack.loadbalancer_url}
    return {f"{name} {path}": get(urls[name] + path, control) for name, path in get_routes()}


def leak_on_purpose(stack: LocalStack, leaked: Stems) -> None:
    """A careless client tells loadbalancer and autoscaler what it must not, in every form."""
    for some in leaked.needles.values():
        for one in some:
            raw = b'{"request_id": "x", "outcome": "failed", "why": "' + one + b'"}'
            asked = urllib.request.Request(f"{stack.loadbalancer_url}/done", raw)  # noqa: S310
            with suppress(OSError):  # some are no JSON, but sent they are
                urllib.request.urlopen(asked, timeout=30).close()  # noqa: S310
    policy = urllib.request.Request(  # noqa: S310
        f"{stack.autoscaler_url}/policy", json.dumps({"name": leaked.plain}).encode(), method="PUT"
    )
    with suppress(OSError):
        urllib.request.urlopen(policy, timeout=30).close()  # noqa: S310


# -- nothing is there ----------------------------------------------------------------------------------


def test_nothing_that_autoscaler_and_loadbalancer_read_write_or_run_holds_a_canary(run: Run) -> None:
    assert found_in(run.servers, run.stems.needles) == []


def test_no_file_of_theirs_holds_one_nor_a_log(run: Run) -> None:
    assert found_in(run.files, run.stems.needles) == []
    assert found_in(run.files_after, run.stems.needles) == []


def test_no_route_tells_one(run: Run) -> None:
    assert found_in(run.routes, run.stems.needles) == []


def test_they_write_no_file_elsewhere(run: Run) -> None:
    """Else those that were looked at would not be all."""
    written = {
        line.decode()
        for name, data in run.servers.items()
        if name.endswith("files written")
        for line in data.splitlines()
    }
    strange = {path for path in written if not Path(path).is_relative_to(run.state_dir)}
    # numba 0.68 sees whether it could write its cache by a nameless file there, and writes nothing into it.
    probed = {
        str(folder) for package in ("dispatch", "engine") for folder in Path(CACHE).glob(f"{package}_*")
    }
    assert len(probed) >= 2  # more where the sources have changed since the cache was made
    assert strange <= {"/dev/null"} | probed
    assert len(written) > 3


# -- and it would have been found ----------------------------------------------------------------------


def test_every_request_went_as_it_was_meant_to(run: Run) -> None:
    got = {one["name"]: one["status"] for one in run.said}
    wanted = dict.fromkeys((a.name for a in run.asks), 200) | {
        "path": 404,
        "unknown model": 404,
        "unknown model of a chat": 404,
        "no JSON": 400,
        "broken JSON": 400,
        "too long": 400,
        "too many tokens": 400,
        "wrong type": 400,
        "no token": 401,
        "wrong token": 401,
        "left before it began": 0,
    }
    assert got == wanted


def test_answers_held_canaries(run: Run) -> None:
    answers = {one["name"]: base64.b64decode(one["answer"]) for one in run.said}
    for name in ("echo False 0", "echo False 3", "echo True 0", "echo True 3", "several prompts", "left"):
        assert run.stems.plain.encode() in answers[name]
        assert run.stems.wide.encode() in answers[name]
    assert run.stems.plain.encode() in answers["unknown model"], "as vLLM's error does"
    assert b"[DONE]" not in answers["left"]
    assert b"broken off" in answers["broken off"]


def test_the_same_search_finds_every_form_where_prompts_did_pass(run: Run) -> None:
    sent = {n: d for n, d in run.client.items() if n.endswith(" out") and ", fd " not in n}
    for name, some in (run.stems.needles | forms_of_ids(run.stems.ids)).items():
        if name == "packed ids":
            continue  # nobody sends those
        for needle in some:
            assert found_in(sent, {name: (needle,)}), f"{name}: {needle!r}"
    for one in run.asks:
        assert found_in(sent, {one.name: (base64.b64decode(one.body),)}), one.name
    received = {n: d for n, d in run.client.items() if n.endswith(" in") and ", fd " not in n}
    assert found_in(received, forms(run.stems.plain))
    assert found_in(received, forms(run.stems.wide))


def test_the_same_search_finds_a_leak_in_what_the_servers_do(run: Run) -> None:
    """The deliberate ones: a client told the loadbalancer why a request failed, with the prompt."""
    received = {n: d for n, d in run.servers.items() if n.startswith("loadbalancer") and n.endswith(" in")}
    for name, some in run.leaked.needles.items():
        for needle in some:
            assert found_in(received, {name: (needle,)}), f"{name}: {needle!r}"
    autoscaler = {name: data for name, data in run.servers.items() if name.startswith("autoscaler")}
    assert found_in(autoscaler, forms(run.leaked.plain))


def streams(run: Run, program: str, kind: str) -> bytes:
    """All that one program did in one way."""
    return b"".join(
        data
        for name, data in run.servers.items()
        if name.startswith(program) and name.split(", ", 1)[1].startswith(kind)
    )


def test_what_did_pass_through_the_servers_was_recorded(run: Run) -> None:
    """Of each kind of stream something that must have been there."""
    instances = "tls" if run.said[0]["address"].startswith("https") else "socket"
    for one in run.said:
        name = one["request_id"].encode()
        assert name in streams(run, "loadbalancer", "socket"), "it was part of a lease"
    told = streams(run, "loadbalancer", "tls") + streams(run, "loadbalancer", "socket")
    ids = {one["request_id"].encode() for one in run.said}
    assert any(re.search(rb'"id": ?"%s"' % name, told) for name in ids), "and of a load report"
    for program in ("loadbalancer", "autoscaler"):
        assert run.boot_id.encode() in streams(run, program, instances), "of a batch of tokens"
    probes = streams(run, "autoscaler", instances)
    assert re.search(rb'"max_tokens": \d+, "(messages|prompt)": ', probes), "its own test prompt"
    assert b"grep" in streams(run, "autoscaler", "ssh out")
    assert b"READY" in streams(run, "autoscaler", "ssh in")
    assert run.label.encode() in streams(run, "autoscaler", "sqlite")
    assert b"show\0instances" in streams(run, "autoscaler", "events"), "the command line of vastai"
    assert run.label.encode() in streams(run, "autoscaler", "fd"), "what vastai said"
    assert b"-> hot" in streams(run, "autoscaler", "fd 2 out"), "its log"
    assert b"hot set" in streams(run, "loadbalancer", "fd 2 out")
    assert b"--state-dir" in streams(run, "loadbalancer", "start")
    assert run.label.encode() in run.files["ledger.sqlite"] + run.files.get("ledger.sqlite-wal", b"")
    assert b"-> hot" in run.files["logs/autoscaler.log"]
    assert b"hot" in run.routes["loadbalancer /health"]
    assert run.label.encode() in run.routes["autoscaler /instances"]


# -- other ways, by themselves ---------------------------------------------------------------------------


def logged(what: str) -> str:
    """What vLLM 0.11 logs of a chat whose model it has not, and of one whose own template raises.

    serving_chat.py: `logger.error("Error with model %s", …)` and `logger.exception("Error in …")`.
    """
    at = "(APIServer pid=1) ERROR 11-26 01:02:03"
    return (
        f"{at} [serving_chat.py:176] Error with model object='error' message='The model `{what}` does not "
        f"exist.' type='NotFoundError' param=None code=404\n"
        f"{at} [serving_chat.py:233] Error in preprocessing prompt inputs\n"
        f"{at} [serving_chat.py:233] jinja2.exceptions.TemplateError: {what}\n"
    )


@pytest.mark.parametrize("hot", [True, False])
@pytest.mark.parametrize(
    "word", ["EngineDeadError", "CUDA out of memory", "No space left on device", "fleet: giving up"]
)
def test_what_a_client_made_vllm_log_is_not_told_and_ends_no_machine(
    tmp_path: Path, word: str, hot: bool
) -> None:
    canary = secrets.token_hex(12)
    (tmp_path / "fleet").mkdir()
    log = f"INFO: {ssh_log.READY_LINE}\n{logged(f'{word} {canary}')}"
    (tmp_path / "fleet" / "model.log").write_text(log)
    environ = {"HOME": str(tmp_path), "PATH": os.environ.get("PATH", "")}
    ran = subprocess.run(
        ["/bin/bash", "-c", ssh_log.grep_command(hot=hot)], env=environ, stdout=subprocess.PIPE, check=True
    )
    assert canary not in ran.stdout.decode()
    assert ssh_log.parse(ran.stdout.decode()).fatal is None


def test_nor_does_the_instance_tell_it() -> None:
    from remote.speaker import ModelState

    canary = secrets.token_hex(12)
    model = ModelState()
    model.feed(f"INFO: {ssh_log.READY_LINE}\n".encode())
    model.answers()
    for word in ("fleet: giving up", "fleet: the model server ended", "\rfleet: giving up", "37%"):
        model.feed(logged(f"{word} {canary}").encode())
    assert model.state == "ready"
    assert canary not in model.why


@pytest.mark.parametrize("how", ["an error", "an error in a stream", "a broken answer", "a refusal"])
def test_our_own_driver_tells_the_loadbalancer_nothing_that_a_model_server_said(how: str) -> None:
    """An error may quote what it is about, as pydantic's do (input_value='…'), a parser's the answer."""
    from fleet_client import AsyncAnswer, ClientLease, HttpReply
    from simulation.live.users import Driver
    from simulation.live.workload import Arrival, Workload

    canary = secrets.token_hex(12)
    told: list[Any] = []
    lease = ClientLease("http://127.0.0.1:1", "r" * 16, 7, 0.0, 60.0, "t" * 38, None)

    async def exchange(call: Any) -> AsyncAnswer:
        if how == "a refusal":
            call.setbacks.append((7, "no_connection"))
            raise httpx2.ConnectError(canary)
        status = 500 if how == "an error" else 200
        event = f'data: {{"error": {{"message": "{canary}"}}}}\n\ndata: [DONE]\n\n'.encode()
        body = b"}" + canary.encode() if how == "a broken answer" else event
        reply = HttpReply(status, (), body=body, lease=lease)
        return AsyncAnswer(call, reply, lambda *args: told.append(args), lambda _: None)

    driver = Driver(Workload(request_timeout_s=0.5), cast(Any, SimpleNamespace(exchange=exchange)))
    asyncio.run(driver.run([Arrival(0, 0.0, 5, 5)]))
    (record,) = driver.records
    assert record.outcome in ("not_started", "broken_off", "bad_answer")
    assert {end[1] for end in told} == (set() if how == "a refusal" else {"failed"})
    assert canary not in repr(told)


# -- the tap itself ------------------------------------------------------------------------------------


def test_the_tap_misses_no_way_out(tmp_path: Path) -> None:
    """A program that leaks a canary of its own in every way it knows; each must be found."""
    ways: dict[str, str] = run_tapped(tmp_path, {"leak": str(tmp_path / "leaks")})
    assert len(ways) > 15
    data = {name: raw for name, raw in recordings(tmp_path).items() if not name.endswith(", fd 1 out")}
    missed = [way for way, canary in ways.items() if not found_in(data, {way: (canary.encode(),)})]
    assert missed == []
    for kind, twice in (("socket ", BOTH_ENDS), ("tls ", UNDER_TLS)):
        for direction in (" in", " out"):
            one = {n: d for n, d in data.items() if f", {kind}" in n and n.endswith(direction)}
            assert not [way for way in twice if not found_in(one, {way: (ways[way].encode(),)})], direction


BOTH_ENDS = ("send", "sendall", "sendmsg", "makefile", "asyncio")
UNDER_TLS = ("asyncio's TLS", "a TLS socket")


def leak(told: Mapping[str, Any]) -> dict[str, str]:
    """Leak in every way; what, by the way. The canaries are put together here, so that no code has them."""
    folder = Path(told["leak"])
    folder.mkdir()
    ways: dict[str, str] = {}

    def canary(way: str) -> str:
        ways[way] = secrets.token_hex(12)
        return ways[way]

    leak_to_sockets(canary)
    leak_to_files(canary, folder)
    leak_to_programs(canary)
    leak_under_tls(canary, folder)
    return ways


def leak_to_sockets(canary: Callable[[str], str]) -> None:
    here, there = socket.socketpair()
    with here, there:
        here.send(canary("send").encode())
        here.sendall(canary("sendall").encode())
        here.sendmsg([b"", canary("sendmsg").encode()])
        here.makefile("wb", buffering=0).write(canary("makefile").encode())
        there.recv(24)
        there.recv_into(bytearray(24))
        there.recvmsg(24)
        there.makefile("rb", buffering=0).read(24)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.sendto(canary("sendto").encode(), ("127.0.0.1", 9))

    async def through_asyncio() -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.read(24))
            writer.close()

        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(canary("asyncio").encode())
        await reader.read()
        writer.close()
        server.close()

    asyncio.run(through_asyncio())
    with suppress(OSError):
        socket.getaddrinfo(canary("a name that is looked up") + ".invalid", 80, flags=socket.AI_NUMERICHOST)


def leak_to_files(canary: Callable[[str], str], folder: Path) -> None:
    import logging
    import sqlite3
    import tempfile

    (folder / "text").write_text(canary("a text file"))
    (folder / "bytes").write_bytes(canary("a binary file").encode())
    (folder / canary("the name of a file")).touch()
    with tempfile.TemporaryFile(dir=folder) as unnamed:
        unnamed.write(canary("a file without a name").encode())
    print(canary("stderr"), file=sys.stderr)
    logging.basicConfig(stream=sys.stderr)
    logging.getLogger("leak").warning("%s", canary("a log line"))
    database = sqlite3.connect(":memory:")
    database.execute("create table t (a text)")
    database.execute("insert into t values (?)", (canary("a value in sqlite"),))
    database.close()


def leak_to_programs(canary: Callable[[str], str]) -> None:
    said = canary("what a child says")
    swapped = said.translate(str.maketrans("0123456789abcdef", "fedcba9876543210"))
    child = "import sys; print(sys.argv[1].translate(str.maketrans('0123456789abcdef', 'fedcba9876543210')))"
    subprocess.run([sys.executable, "-c", child, swapped], stdout=subprocess.PIPE, check=True)
    subprocess.run(["/bin/true", canary("an argument")], check=True)
    subprocess.run(["/bin/true"], env={"A": canary("an environment")}, check=True)
    subprocess.run(["/bin/cat"], input=canary("stdin").encode(), stdout=subprocess.DEVNULL, check=True)
    os.spawnv(os.P_WAIT, "/bin/true", ["true", canary("spawn")])  # noqa: S606


def leak_under_tls(canary: Callable[[str], str], folder: Path) -> None:
    certificate, key = make_certificate(folder)
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(certificate, key)
    context = tls_pins.pinned_context(certificate.read_text())

    async def through_tls() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(24)
            writer.write(canary("asyncio's TLS").encode())
            await writer.drain()
            writer.close()

        def blocking() -> None:
            plain = socket.create_connection(address)
            with context.wrap_socket(plain) as sock:
                sock.sendall(canary("a TLS socket").encode())
                while sock.recv(65_536):
                    pass

        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=server_context)
        address = server.sockets[0].getsockname()
        await asyncio.to_thread(blocking)
        server.close()

    asyncio.run(through_tls())


def make_certificate(folder: Path) -> tuple[Path, Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    paths = folder / "tls.crt", folder / "tls.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return paths
