"""Runs of a made-up CLI and, below the line, of the real one.

`FakeCli` is an executable that prints what it is told and writes down what it was given; it costs 20 ms.
`FakeApi` is a service on loopback for the real vastai command, which costs 0.5 s of CPU per run.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from process.errors import ConfigError
from tests.vast_answers import KEY, MANY, PUBLIC_KEY, ROW, answered, create, instance, listing, refused, said
from tests.waiting import wait_for
from vast.cli import Cli
from vast.client import Vast
from vast.errors import ApiError, CloudAuthError, CloudTimeout, ProtocolError, RateLimited, TransportError
from vast.settings import VastSettings

NOWHERE = "http://127.0.0.1:9"  # the made-up CLI asks nobody

# Prints the next of the runs in plan.json (the last for ever) and appends what it was given to seen.
FAKE_SCRIPT = """
import json, os, sys
here = os.path.dirname(os.path.abspath(__file__))
seen = os.path.join(here, "seen")
done = len(open(seen).readlines()) if os.path.exists(seen) else 0
plan = json.load(open(os.path.join(here, "plan.json")))
script = [open(a.partition("=")[2]).read() for a in sys.argv if a.startswith("--onstart=")]
run = {"argv": sys.argv[1:], "environ": dict(os.environ), "stdin": sys.stdin.read(), "script": script}
with open(seen, "a") as f:
    f.write(json.dumps(run) + "\\n")
stdout, stderr, status = plan[min(done, len(plan) - 1)]
sys.stdout.write(stdout)
sys.stderr.write(stderr)
sys.exit(status)
"""


@dataclass
class FakeCli:
    """An executable in place of vastai. Each run is (stdout, stderr, exit status)."""

    home: Path
    slept: list[float] = field(default_factory=list)

    def plays(self, *runs: tuple[str, str, int], **settings: Any) -> Vast:
        """A Vast on an executable that goes through these runs; time is made up, and sleeping is instant."""
        (self.home / "vastai.py").write_text(FAKE_SCRIPT)
        (self.home / "plan.json").write_text(json.dumps(runs))
        now = 1000.0

        def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds
            self.slept.append(seconds)

        return Vast(Cli(self.settings(**settings), clock=lambda: now, sleep=sleep))

    def settings(self, **changed: Any) -> VastSettings:
        return replace(
            VastSettings(
                state_dir=self.home / "state",
                api_key=KEY,
                url=NOWHERE,
                local=True,
                executable=[sys.executable, "-I", "-S", str(self.home / "vastai.py")],
            ),
            **changed,
        )

    @property
    def seen(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.home / "seen").read_text().splitlines()]

    @property
    def argvs(self) -> list[list[str]]:
        return [run["argv"] for run in self.seen]


@pytest.fixture
def fake(tmp_path: Path) -> FakeCli:
    return FakeCli(tmp_path)


def test_create_sends_everything_once_and_the_script_by_a_file_without_a_name(fake: FakeCli) -> None:
    vast = fake.plays(answered({"success": True, "new_contract": 1001, "instance_api_key": "x"}))
    script = "#!/bin/bash\nTOKEN=geheim€\n" * 20
    assert create(vast, onstart=script, price_usd_h=0.25) == 1001
    (run,) = fake.seen
    argv = run["argv"]
    assert argv[:-1] == [
        "create",
        "instance",
        "11",
        "--image=vllm/vllm-openai:v0.11.0",
        "--disk=40",
        "--label=fleet/a",
        "--env=-p 3000:3000 -p 8000:8000",
        "--ssh",
        "--direct",
        "--cancel-unavail",
        "--raw",
        "--retry=1",
        "--bid_price=0.25",
    ]
    assert argv[-1].startswith("--onstart=/dev/fd/")
    assert run["script"] == [script]
    assert "TOKEN" not in json.dumps([argv, run["environ"]])
    left = [p for p in (fake.home / "state").rglob("*") if p.is_file() and "TOKEN" in p.read_text()]
    assert left == []


# --- isolation (vast-contract 3) -------------------------------------------------------------------


def test_a_run_sees_nothing_of_the_users_own_set_up_and_has_nobody_to_ask(
    fake: FakeCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VAST_URL", "VAST_API_KEY", "XDG_CONFIG_HOME", "PYTHONPATH", "VASTAI_INSTALL_DIR"):
        monkeypatch.setenv(name, "https://console.vast.ai")
    monkeypatch.setenv("no_proxy", "elsewhere")
    fake.plays(answered({"credit": 1})).credit()
    (run,) = fake.seen
    environ, home = run["environ"], fake.home / "state" / "vastai"
    assert {k: v for k, v in environ.items() if "console.vast.ai" in v} == {}
    assert environ["VAST_URL"] == NOWHERE
    assert environ["VAST_API_KEY"] == KEY
    assert KEY not in " ".join(run["argv"])
    assert environ["NO_PROXY"] == environ["no_proxy"] == "127.0.0.1,localhost,::1"
    assert environ["HOME"] == str(home)
    assert environ["VASTAI_NO_UPDATE_CHECK"] == "1"
    assert run["stdin"] == ""
    assert (Path(environ["XDG_CONFIG_HOME"]) / "vastai" / "vast_role").read_text() == "client"
    cache = Path(environ["XDG_CACHE_HOME"]) / "vastai" / "gpu_names_cache.json"
    assert json.loads(cache.read_text()) == {"gpu_names": []}
    assert (Path(environ["XDG_STATE_HOME"]) / "vastai").is_dir()


def test_the_production_service_is_asked_when_no_url_is_given(fake: FakeCli) -> None:
    fake.plays(answered({"credit": 1}), url=None, local=False).credit()
    assert "VAST_URL" not in fake.seen[0]["environ"]


def test_the_cache_that_spares_a_request_at_import_never_gets_old(fake: FakeCli) -> None:
    vast = fake.plays(answered({"credit": 1}))
    cache = fake.home / "state" / "vastai" / "cache" / "vastai" / "gpu_names_cache.json"
    os.utime(cache, (1.0, 1.0))
    vast.credit()
    assert time.time() - cache.stat().st_mtime < 3600
    cache.unlink()
    vast.credit()
    assert cache.exists()


def test_first_runs_at_the_same_time_do_not_race(fake: FakeCli) -> None:
    (fake.home / "vastai.py").write_text(FAKE_SCRIPT)
    for n in range(20):
        settings = fake.settings(state_dir=fake.home / f"state{n}")
        with ThreadPoolExecutor(4) as pool:
            for made in [pool.submit(Cli, settings) for _ in range(4)]:
                made.result()
        assert sorted(p.name for p in (fake.home / f"state{n}").rglob("*") if p.is_file()) == [
            "gpu_names_cache.json",
            "vast_role",
        ]


def test_neither_repr_nor_an_echoed_key_shows_the_key(fake: FakeCli) -> None:
    assert KEY not in repr(fake.settings())
    with pytest.raises(ApiError) as raised:
        fake.plays(refused(403, f"key {KEY} may not do that")).credit()
    assert KEY not in str(raised.value)
    assert "[key]" in str(raised.value)


def test_a_cli_that_cannot_be_run_is_a_transport_error(fake: FakeCli) -> None:
    program = fake.home / "vastai"
    program.write_text("not a program")
    with pytest.raises(TransportError, match="expected to run it"):
        Vast(Cli(fake.settings(executable=[str(program)]))).credit()


def test_a_missing_cli_or_an_unusable_directory_is_the_operators(fake: FakeCli) -> None:
    with pytest.raises(ConfigError, match="no vastai command at"):
        Cli(fake.settings(executable=[str(fake.home / "none")]))
    (fake.home / "state").write_text("a file")
    with pytest.raises(ConfigError, match="cannot prepare"):
        Cli(fake.settings())


# --- rate limits and time limits (vast-contract 1.3) -----------------------------------------------


def test_calls_of_one_endpoint_keep_their_distance_and_others_do_not_wait(fake: FakeCli) -> None:
    vast = fake.plays(
        said("starting instance 5."), said("destroying instance 6."), said("starting instance 7.")
    )
    vast.start(5)
    vast.destroy(6)
    assert fake.slept == []
    vast.start(7)
    assert fake.slept == [1.0]


MADE = answered({"success": True, "new_contract": 1})


def test_creates_are_four_and_a_half_seconds_apart_and_twelve_after_a_429(fake: FakeCli) -> None:
    vast = fake.plays(MADE, refused(429, None), MADE, MADE)
    create(vast)
    with pytest.raises(RateLimited):
        create(vast)
    create(vast)
    create(vast)
    assert fake.slept == [4.5, 12.0, 4.5]


def test_a_call_that_failed_counts_too_and_a_speedup_divides(fake: FakeCli) -> None:
    vast = fake.plays(refused(500, "oops"), MADE, speedup=30.0)
    with pytest.raises(ApiError):
        create(vast)
    create(vast)
    assert fake.slept == [pytest.approx(0.15)]


# Leaves a file while it runs and writes down how many of its kind it saw.
CROWD_SCRIPT = """
import os, sys, time
here = os.path.dirname(os.path.abspath(__file__))
kind = "lists" if "show" in sys.argv else "changes"
mine = os.path.join(here, "running", kind + str(os.getpid()))
open(mine, "w").close()
end = time.time() + 0.03
while time.time() < end:
    here_now = os.listdir(os.path.join(here, "running"))
    same = sum(name.startswith(kind) for name in here_now)
    with open(os.path.join(here, "crowd"), "a") as f:
        f.write(f"{kind} {same} {len(here_now)}\\n")
    time.sleep(0.003)
os.remove(mine)
print('{"instances": [], "total_instances": 0}' if kind == "lists" else "starting instance 5.")
"""


def test_at_most_one_run_that_lists_and_one_that_does_anything_else(fake: FakeCli) -> None:
    (fake.home / "running").mkdir()
    (fake.home / "vastai.py").write_text(CROWD_SCRIPT)
    vast = Vast(Cli(fake.settings(speedup=1e6)))
    calls: list[Callable[[], object]] = [vast.list_instances, lambda: vast.start(5)] * 8
    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.result()
    seen = [line.split() for line in (fake.home / "crowd").read_text().splitlines()]
    assert {(kind, same) for kind, same, _ in seen} == {("lists", "1"), ("changes", "1")}
    assert max(int(both) for _, _, both in seen) == 2


# Never ends, and has a child that holds its pipes open.
HANGING_SCRIPT = """
import os, subprocess, sys, time
here = os.path.dirname(os.path.abspath(__file__))
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
with open(os.path.join(here, "pids.new"), "w") as f:
    f.write(f"{os.getpid()} {child.pid}")
os.rename(os.path.join(here, "pids.new"), os.path.join(here, "pids"))
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    """Whether it runs; a dead one that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_run_over_its_limit_is_killed_with_all_that_it_started(fake: FakeCli) -> None:
    (fake.home / "vastai.py").write_text(HANGING_SCRIPT)
    with pytest.raises(CloudTimeout, match=r"vastai show user: expected an answer within 1 s"):
        Vast(Cli(fake.settings(timeout_s=1.0))).credit()
    pids = [int(pid) for pid in (fake.home / "pids").read_text().split()]
    assert len(pids) == 2
    wait_for("they are gone", lambda: not any(is_alive(pid) for pid in pids))


# --- the real CLI on a made-up service -------------------------------------------------------------


@dataclass
class Answer:
    """body: JSON unless it is text. hang: never sent."""

    status: int = 200
    body: object = field(default_factory=dict)
    content_type: str = "application/json"
    hang: bool = False


@dataclass
class Request:
    method: str
    path: str
    authorization: str | None
    body: Any


class FakeApi(ThreadingHTTPServer):
    """Answers each route with what it is given, the last for ever, 404 otherwise; keeps all requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, list[Answer]] = {}
        self.requests: list[Request] = []
        self.look: Callable[[], None] = lambda: None  # while the caller waits for its answer
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def on(self, route: str, *answers: Answer) -> None:
        """route: method and path, without the query."""
        self.answers[route] = list(answers)

    @property
    def routes(self) -> list[str]:
        return [f"{r.method} {r.path}" for r in self.requests]


class _Handler(BaseHTTPRequestHandler):
    server: FakeApi

    def answer(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.look()
        path = self.path.partition("?")[0]
        body = json.loads(sent) if sent else None
        self.server.requests.append(Request(self.command, path, self.headers.get("Authorization"), body))
        plan = self.server.answers.get(f"{self.command} {path}", [Answer(404, {"msg": "no such route"})])
        answer = plan.pop(0) if len(plan) > 1 else plan[0]
        if answer.hang:
            self.server.closing.wait()
            return
        text = answer.body if isinstance(answer.body, str) else json.dumps(answer.body)
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def api() -> Iterator[FakeApi]:
    server = FakeApi()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def vast(api: FakeApi, tmp_path: Path) -> Vast:
    return real(api, tmp_path)


def real(api: FakeApi, home: Path, **changed: Any) -> Vast:
    settings = VastSettings(state_dir=home, api_key=KEY, url=api.url, local=True, speedup=1000.0)
    return Vast(Cli(replace(settings, **changed)))


LIST = "GET /api/v1/instances/"


ASK = "PUT /api/v0/asks/11/"


FIVE = "/api/v0/instances/5/"


GONE = {
    "success": False,
    "error": "no_such_ask",
    "msg": "error 410/3907: no_such_ask Instance type 11 is gone.",
}


def test_real_a_create_sends_all_that_it_was_given_and_nothing_else_is_asked(
    api: FakeApi, vast: Vast
) -> None:
    api.on(ASK, Answer(body={"success": True, "new_contract": 1001, "instance_api_key": "abc"}))
    assert create(vast, onstart="#!/bin/bash\necho 'ü'\n", env="-e A='b c' -p 8000:8000") == 1001
    (request,) = api.requests  # no gpu_names, no users/current: the files for both are there
    assert request.authorization == f"Bearer {KEY}"
    sent = {
        k: request.body[k]
        for k in ("image", "disk", "label", "onstart", "env", "runtype", "cancel_unavail", "price")
    }
    assert sent == {
        "image": "vllm/vllm-openai:v0.11.0",
        "disk": 40.0,
        "label": "fleet/a",
        "onstart": "#!/bin/bash\necho 'ü'\n",
        "env": {"A": "b c", "-p 8000:8000": "1"},
        "runtype": "ssh_direc ssh_proxy",
        "cancel_unavail": True,
        "price": None,
    }


def test_real_a_create_whose_reply_was_lost_is_sent_once_and_found_by_its_label(
    api: FakeApi, vast: Vast
) -> None:
    """The first answer hides an effect; a second try would say that the offer is gone."""
    api.on(ASK, Answer(504, "<html>", "text/html"), Answer(410, GONE))
    api.on(LIST, Answer(body=listing([instance(1001, label="fleet/a")])))
    with pytest.raises(ApiError) as raised:
        create(vast)
    assert raised.value.status == 504
    assert api.routes == [ASK]
    assert [(row.id, row.label) for row in vast.list_instances("fleet/")] == [(1001, "fleet/a")]


def test_real_a_refused_key_is_an_auth_error(api: FakeApi, vast: Vast) -> None:
    api.on(LIST, Answer(401, {"success": False, "error": "auth_error", "msg": "Invalid user key"}))
    with pytest.raises(CloudAuthError, match="401"):
        vast.list_instances()


def test_real_too_often_is_told_from_the_plain_text_answer(api: FakeApi, vast: Vast) -> None:
    api.on(LIST, Answer(429, "API requests too frequent", "text/plain"))
    with pytest.raises(RateLimited):
        vast.list_instances()
    assert api.routes == [LIST] * 3


def test_real_an_outage_that_answers_braces_is_not_an_empty_account(api: FakeApi, vast: Vast) -> None:
    api.on(LIST, Answer(body={}))
    with pytest.raises(ProtocolError, match="got no such field"):
        vast.list_instances()


def test_real_two_pages_are_one_listing(api: FakeApi, vast: Vast) -> None:
    first = Answer(body=listing(MANY[:25], total=30, next_token="e30="))
    second = Answer(body=listing(MANY[25:], total=30))
    api.on(LIST, first, first, second)
    rows = vast.list_instances()
    assert [row.id for row in rows] == list(range(1, 31))
    assert rows[29] == replace(ROW, id=30)


def test_real_a_server_that_never_answers_costs_the_limit_and_no_more(api: FakeApi, tmp_path: Path) -> None:
    api.on(LIST, Answer(hang=True))
    with pytest.raises(CloudTimeout):
        real(api, tmp_path, timeout_s=4.0).list_instances()
    assert api.routes == [LIST]


def test_real_a_server_that_is_not_there_is_a_transport_error(api: FakeApi, tmp_path: Path) -> None:
    vast = real(api, tmp_path, url=NOWHERE)
    with pytest.raises(TransportError, match="ConnectionError"):
        vast.list_instances()


def test_real_the_sentences_of_the_changes_are_these(api: FakeApi, vast: Vast) -> None:
    api.on(f"PUT {FIVE}", Answer(body={"success": True}))
    api.on(f"DELETE {FIVE}", Answer(body={"success": True}))
    vast.start(5)
    vast.stop(5)
    vast.label(5, "fleet/b")
    vast.destroy(5)
    assert [(r.method, r.path, r.body) for r in api.requests] == [
        ("PUT", FIVE, {"state": "running"}),
        ("PUT", FIVE, {"state": "stopped"}),
        ("PUT", FIVE, {"label": "fleet/b"}),
        ("DELETE", FIVE, {}),
    ]


def test_real_a_destroy_without_effect_raises_and_one_of_nothing_does_not(api: FakeApi, vast: Vast) -> None:
    api.on(
        f"DELETE {FIVE}",
        Answer(body={"success": False, "msg": "try later"}),
        Answer(404, {"success": False, "error": "not_found", "msg": "Instance not found"}),
    )
    with pytest.raises(ProtocolError, match="try later"):
        vast.destroy(5)
    vast.destroy(5)


def test_real_an_ssh_key_is_added_to_the_account(api: FakeApi, vast: Vast) -> None:
    api.on("GET /api/v0/ssh/", Answer(body=[]))
    api.on("POST /api/v0/ssh/", Answer(body={"success": True, "key": {"id": 1, "public_key": PUBLIC_KEY}}))
    vast.register_ssh_key(PUBLIC_KEY)
    assert [r.body for r in api.requests] == [None, {"ssh_key": PUBLIC_KEY}]
