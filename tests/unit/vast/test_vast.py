"""What the typed calls promise, on runs of a made-up CLI and, below the line, of the real one.

`FakeCli` is an executable that prints what it is told and writes down what it was given; it costs 20 ms.
`FakeApi` is a service on loopback for the real vastai command, which costs 0.5 s of CPU per run.
"""

import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from process.errors import CloudError, ConfigError
from vast import cli
from vast.client import (
    ApiError,
    CloudAuthError,
    CloudTimeout,
    NoSuchInstance,
    OfferGone,
    ProtocolError,
    RateLimited,
    TransportError,
    Vast,
    VastSettings,
    check_env,
    find_api_key,
)
from vast.rows import Offer, Row

KEY = "k-0123456789abcdef0123456789"
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

        return Vast(self.settings(**settings), clock=lambda: now, sleep=sleep)

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


def said(text: str) -> tuple[str, str, int]:
    return text + "\n", "", 0


def answered(value: object) -> tuple[str, str, int]:
    """As the CLI prints JSON under --raw."""
    return said(json.dumps(value, indent=1, sort_keys=True))


def refused(status: int, msg: str | None) -> tuple[str, str, int]:
    """As the CLI reports an HTTP error under --raw: on stderr, exit status 0."""
    return "", json.dumps({"error": True, "status_code": status, "msg": msg}) + "\n", 0


def refused_plainly(status: int, msg: str | None) -> tuple[str, str, int]:
    return "", f"Failed with error {status}: {msg}\n", 0


CRASH = 'Traceback (most recent call last):\n  File "x", line 1, in <module>\n'
NO_CONNECTION = CRASH + "requests.exceptions.ConnectionError: Max retries exceeded: Connection refused\n"


def listing(rows: Sequence[object], total: int | None = None, **changed: object) -> dict[str, object]:
    """The service's envelope around one page."""
    return {
        "success": True,
        "instances_found": len(rows),
        "total_instances": len(rows) if total is None else total,
        "label_counts": {},
        "next_token": None,
        "instances": list(rows),
    } | changed


def instance(id: object = 1001, **changed: object) -> dict[str, object]:
    """A row as the service sends it (vast-contract 2.11)."""
    return {
        "id": id,
        "machine_id": 77,
        "label": "fleet/a",
        "actual_status": "running",
        "intended_status": "running",
        "cur_state": "running",
        "status_msg": "success, running\n",
        "public_ipaddr": " 63.135.50.11\n",
        "ports": {
            "22/tcp": [{"HostIp": "0.0.0.0", "HostPort": "33522"}],
            "8000/tcp": [{"HostIp": "0.0.0.0", "HostPort": "33526"}, {"HostIp": "::", "HostPort": "33526"}],
        },
        "ssh_host": "ssh2.vast.ai",
        "ssh_port": 10882,
        "gpu_name": "RTX 3090",
        "num_gpus": 1,
        "dph_base": 0.2,
        "dph_total": 0.21,
        "storage_total_cost": 0.01,
        "instance": {"gpuCostPerHour": 0.2, "diskHour": 0.01, "totalHour": 0.21},
        "start_date": 1.7e9,
        "end_date": 1.8e9,
        "image_uuid": "vllm/vllm-openai",
        "onstart": "echo master-token",
        "extra_env": [["-p 8000:8000", "1"]],
    } | changed


ROW = Row(
    id=1001,
    machine_id=77,
    label="fleet/a",
    actual_status="running",
    intended_status="running",
    cur_state="running",
    status_msg="success, running",
    public_ip="63.135.50.11",
    ports={22: 33522, 8000: 33526},
    ssh_host="ssh2.vast.ai",
    ssh_port=10882,
    gpu_name="RTX 3090",
    num_gpus=1,
    dph_base=0.2,
    dph_total=0.21,
    storage_usd_h=0.01,
    price_now_usd_h=0.21,
    start_date=1.7e9,
    end_date=1.8e9,
    image="vllm/vllm-openai",
    onstart="echo master-token",
)


def offer(id: int = 11, **changed: object) -> dict[str, object]:
    """An offer as the service sends it (vast-contract 2.1)."""
    return {
        "id": id,
        "machine_id": 100 + id,
        "host_id": 5,
        "gpu_name": "RTX 3090",
        "num_gpus": 1,
        "gpu_ram": 24576,
        "dph_total": 0.21,
        "dph_base": 0.2,
        "storage_cost": 0.18,
        "inet_down": 800.5,
        "reliability": 0.99,
        "dlperf": None,
        "geolocation": "Norway, NO",
        "is_bid": False,
        "min_bid": 0.1,
        "duration": 1e6,
    } | changed


def create(vast: Vast, **changed: Any) -> int:
    order: dict[str, Any] = {
        "offer_id": 11,
        "image": "vllm/vllm-openai:v0.11.0",
        "disk_gb": 40.0,
        "label": "fleet/a",
        "env": "-p 3000:3000 -p 8000:8000",
        "onstart": "echo hello\n",
    }
    return vast.create(**(order | changed))


# --- failures (vast-contract 1.1) ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "error", "words"),
    [
        (refused(401, "Invalid user key"), CloudAuthError, "401 'Invalid user key'"),
        (refused(404, "Invalid user key"), CloudAuthError, "404"),
        (refused(404, "Session expired. Please log in again."), CloudAuthError, "404"),
        (refused(429, "(no detail message supplied)"), RateLimited, "429"),
        (refused(429, None), RateLimited, "429 'None'"),
        (refused(410, "/api/v0/instances/ is deprecated."), ApiError, "410"),
        (refused(500, "oops"), ApiError, "500 'oops'"),
        (refused(504, "(no detail message supplied)"), ApiError, "504"),
        (refused(0, "Expecting value: line 1 column 1 (char 0)"), ProtocolError, "JSON from the service"),
        (("[]\n", refused(500, "late")[1], 0), ApiError, "500 'late'"),
        (("", "Warning: slow\n" + refused(500, "last")[1], 0), ApiError, "500 'last'"),
        (("", NO_CONNECTION, 1), TransportError, "Connection refused"),
        (("", CRASH + "AttributeError: 'list' object has no attribute 'get'\n", 1), ProtocolError, "got 1 ("),
        (
            ("", "usage: vastai\nvastai: error: unrecognized arguments: --limit\n", 2),
            ProtocolError,
            "got 2 (",
        ),
        (("", "", 1), ProtocolError, "nothing on stderr"),
        (("", "", 0), ProtocolError, "expected JSON on stdout, got nothing"),
        (said("invalid return Content-Type: text/html"), ProtocolError, "Content-Type: text/html"),
        (('{"instances": [{"onstart": "echo master-to', "", 0), ProtocolError, "broken JSON"),
    ],
)
def test_a_run_that_failed_raises_whatever_its_exit_status(
    fake: FakeCli, run: tuple[str, str, int], error: type[CloudError], words: str
) -> None:
    with pytest.raises(error) as raised:
        fake.plays(run).list_instances()
    assert type(raised.value) is error
    assert str(raised.value).startswith("vastai show instances: expected ")
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({}, "expected a list as instances of the listing, got no such field"),
        ([], "expected an object for each listing, got a list of 0"),
        (None, "got null"),
        (listing([], success=False, msg="database is away"), "success: false 'database is away'"),
        (listing([], instances=None), "expected a list as instances of the listing, got null"),
        (listing([instance()], total=3), "the 3 instances that it claims, got 1"),
        (listing([instance(), instance()], total=2), "the 2 instances that it claims, got 1"),
        (listing([instance()], instances_found=2), "the 2 rows that the page claims, got 1"),
        (listing([], total_instances=None), "a whole number as total_instances"),
        (listing([instance(id="x")]), "a whole number as id of the instance, got a str"),
        (listing([instance(machine_id=None)]), "a whole number as machine_id"),
        (listing([instance(dph_total=None)]), "as dph_total of the instance, got null"),
        (listing([instance(dph_total=float("nan"))]), "as dph_total"),
        (listing([instance(dph_total=-1)]), "as dph_total"),
        (listing([7]), "expected an object for each instance, got a int"),
    ],
)
def test_a_listing_that_is_not_whole_raises_and_is_never_empty(
    fake: FakeCli, answer: object, words: str
) -> None:
    with pytest.raises(ProtocolError) as raised:
        fake.plays(answered(answer)).list_instances()
    assert words in str(raised.value)
    assert "master-token" not in str(raised.value)


CHANGES: dict[str, tuple[Callable[[Vast], None], str, list[str]]] = {
    "start": (lambda v: v.start(5), "starting instance 5.", ["start", "instance", "5", "--retry=1", "--raw"]),
    "stop": (lambda v: v.stop(5), "stopping instance 5.", ["stop", "instance", "5", "--retry=1", "--raw"]),
    "label": (
        lambda v: v.label(5, "fleet/b"),
        "label for 5 set to fleet/b.",
        ["label", "instance", "5", "fleet/b", "--retry=1", "--raw"],
    ),
    "destroy": (
        lambda v: v.destroy(5),
        "destroying instance 5.",
        ["destroy", "instance", "5", "-y", "--retry=1"],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_done_when_its_own_sentence_says_so(fake: FakeCli, name: str) -> None:
    call, sentence, argv = CHANGES[name]
    call(fake.plays(said(sentence)))
    assert fake.argvs == [argv]


@pytest.mark.parametrize(
    ("printed", "words"),
    [
        ("", "got nothing"),
        ("Aborted.\n", "got 'Aborted.'"),
        ("No GPU is free on that machine.\n", "got 'No GPU is free"),
        ("starting instance 55.\nstopping instance 55.\ndestroying instance 55.\n", "got 'starting"),
    ],
)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_prints_anything_else_is_not_done_although_it_exits_0(
    fake: FakeCli, name: str, printed: str, words: str
) -> None:
    call, sentence, _ = CHANGES[name]
    with pytest.raises(ProtocolError) as raised:
        call(fake.plays((printed, "", 0)))
    assert repr(sentence) in str(raised.value)
    assert words in str(raised.value)


@pytest.mark.parametrize("name", ["start", "stop", "label"])
def test_a_change_to_an_instance_that_is_not_there_says_so(fake: FakeCli, name: str) -> None:
    with pytest.raises(NoSuchInstance):
        CHANGES[name][0](fake.plays(refused(404, "no_such_instance")))


def test_destroying_what_is_gone_is_fine(fake: FakeCli) -> None:
    fake.plays(refused_plainly(404, "Instance not found")).destroy(5)


@pytest.mark.parametrize(
    ("run", "error"),
    [
        (refused_plainly(404, "(no detail message supplied)"), ApiError),  # a proxy's page, not the service
        (refused_plainly(404, "Invalid user key"), CloudAuthError),
        (refused_plainly(500, "oops"), ApiError),
        (refused_plainly(429, "None"), RateLimited),
        (("", f"Failed with error 401: None\n{CRASH}TypeError: 'in <string>'\n", 1), CloudAuthError),
        (
            ("", "Failed with error 401: no\n  Sent key from $VAST_API_KEY (ends in ...6789).\n", 0),
            CloudAuthError,
        ),
        (("", "Expecting value: line 1 column 1 (char 0)\n", 0), ProtocolError),
    ],
)
def test_a_destroy_that_failed_raises(
    fake: FakeCli, run: tuple[str, str, int], error: type[CloudError]
) -> None:
    with pytest.raises(error) as raised:
        fake.plays(run).destroy(5)
    assert type(raised.value) is error
    assert "6789" not in str(raised.value)


@pytest.mark.parametrize(
    ("run", "error"),
    [
        (refused(410, "error 410/3907: no_such_ask Instance type 11 is no longer available."), OfferGone),
        (refused(404, "error 404/3603: no_such_ask Instance type by id 11 is not available."), OfferGone),
        (answered({"success": False, "msg": "no_such_ask"}), OfferGone),
        (answered({"success": False, "error": "spend_rate_limit"}), ApiError),
        (refused(404, "Not found"), ApiError),
        (refused(504, "(no detail message supplied)"), ApiError),
        (answered({"success": True, "instance_api_key": "secret"}), ProtocolError),
        (answered({"success": True, "new_contract": "1001", "instance_api_key": "secret"}), ProtocolError),
        (said("Started. {'instance_api_key': 'x'}"), ProtocolError),
    ],
)
def test_a_create_that_failed_says_how_and_shows_no_key(
    fake: FakeCli, run: tuple[str, str, int], error: type[CloudError]
) -> None:
    with pytest.raises(error) as raised:
        create(fake.plays(run))
    assert type(raised.value) is error
    assert str(raised.value).startswith("vastai create instance 11: expected ")
    assert "secret" not in str(raised.value)


def test_a_refusal_in_the_body_has_status_200_and_its_words(fake: FakeCli) -> None:
    with pytest.raises(ApiError) as raised:
        create(fake.plays(answered({"success": False, "msg": "spend_rate_limit"})))
    assert (raised.value.status, raised.value.msg) == (200, "spend_rate_limit")


def test_a_log_that_was_not_uploaded_in_time_is_a_timeout(fake: FakeCli) -> None:
    with pytest.raises(CloudTimeout, match="uploaded"):
        fake.plays(("", CRASH + "TimeoutError: Result not ready after 9.0s: http://x\n", 1)).logs(5)


def test_a_log_is_text_and_an_empty_one_is_an_empty_line(fake: FakeCli) -> None:
    vast = fake.plays(said("a\nb"), said(""), ("", "", 0))
    assert (vast.logs(5, tail=2), vast.logs(5)) == ("a\nb", "")
    assert fake.argvs == [["logs", "5", "--tail=2", "--raw"], ["logs", "5", "--tail=100", "--raw"]]
    with pytest.raises(ProtocolError):
        vast.logs(5)


# --- what is sent and what is read -----------------------------------------------------------------


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


@pytest.mark.parametrize(
    "env",
    [
        "",
        "-p 3000:3000 -p 8000:8000",
        "-e A=1 -e B= -e C=x=y -h host-1 -v /a:/b -n net-1 -p 70000:70000/udp",
        "-e A='two words' -e B=\"it is\"",
    ],
)
def test_an_env_that_is_accepted_is_kept_in_full_by_the_cli(env: str) -> None:
    check_env(env)
    options = sum(word in ("-e", "-p", "-h", "-v", "-n") for word in env.split())
    assert len(parse_env_of_the_cli(env)) == options


def parse_env_of_the_cli(env: str) -> dict[str, str]:
    """Its own parser, loaded without the rest of the package, which takes 0.4 s."""
    package = importlib.util.find_spec("vastai")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).with_name("utils.py")
    spec = importlib.util.spec_from_file_location("vastai_utils", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parsed: dict[str, str] = module.parse_env(env)
    return parsed


@pytest.mark.parametrize(
    "env",
    [
        "-e  A=secret",  # a double space drops the variable
        "-e A=secret  -p 1:1",
        "-e A=secret ",
        " -e A=secret",
        "-e A=secret\n",
        "-e A",
        "--shm-size 1g",
        "--gpus all",
        "A=secret",
        "-e A=secret -x",
        "-p all",
        "-p 8000",
        "-e A=it's",
        "-e A='open",
        "-e 'A=b'",
        "-h under_score",
        "-n UPPER",
        " ".join(f"-p {p}:{p}" for p in range(1000, 1065)),
    ],
)
def test_an_env_of_which_the_cli_drops_a_part_is_refused_before_anything_is_sent(
    fake: FakeCli, env: str
) -> None:
    vast = fake.plays(said("{}"))
    with pytest.raises(ValueError, match="env") as raised:
        create(vast, env=env)
    assert "secret" not in str(raised.value)
    assert not (fake.home / "seen").exists()


@pytest.mark.parametrize("label", ["", "-x", "two words", "a\n", "é", "x" * 257])
def test_a_label_that_would_be_misread_is_refused(fake: FakeCli, label: str) -> None:
    vast = fake.plays(said("{}"))
    with pytest.raises(ValueError, match="label"):
        create(vast, label=label)
    with pytest.raises(ValueError, match="label"):
        vast.label(5, label)


def test_a_start_script_over_the_services_limit_is_refused(fake: FakeCli) -> None:
    with pytest.raises(ValueError, match="at most 16384 bytes, got 16386"):
        create(fake.plays(said("{}")), onstart="é" * 8193)


def test_search_asks_for_the_storage_and_leaves_out_what_has_no_price(
    fake: FakeCli, caplog: pytest.LogCaptureFixture
) -> None:
    answer = [
        offer(11),
        offer(12, dph_total=None),
        offer(13, machine_id=7),
        offer(14, reliability=None, reliability2=0.9),
    ]
    vast = fake.plays(answered(answer))
    offers = vast.search_offers("num_gpus=1", 40, exclude_machines=[7, 3])
    assert fake.argvs == [
        [
            "search",
            "offers",
            "num_gpus=1 machine_id notin [3,7]",
            "--type=on-demand",
            "--storage=40",
            "--order=dph_total",
            "--limit=64",
            "--raw",
        ]
    ]
    eleven = Offer(
        id=11,
        machine_id=111,
        host_id=5,
        gpu_name="RTX 3090",
        num_gpus=1,
        gpu_ram_mb=24576,
        dph_total=0.21,
        dph_base=0.2,
        storage_cost_gb_month=0.18,
        inet_down_mbps=800.5,
        reliability=0.99,
        dlperf=None,
        geolocation="Norway, NO",
        is_bid=False,
        min_bid=0.1,
        duration_s=1e6,
    )
    assert offers == [eleven, replace(eleven, id=14, machine_id=114, reliability=0.9)]
    assert "1 of 4 offers left out" in caplog.text


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (answered({"offers": []}), "a list of offers, got an object with offers"),
        (answered([offer(gpu_name="")]), "a text as gpu_name of the offer"),
        (said("invalid return Content-Type: application/json; charset=utf-8"), "charset"),
        (
            ("Error:  Unknown operator. Did you forget to quote your query? ''\n1\n", "", 0),
            "Unknown operator",
        ),
    ],
)
def test_a_search_that_was_not_understood_raises(
    fake: FakeCli, run: tuple[str, str, int], words: str
) -> None:
    with pytest.raises(ProtocolError) as raised:
        fake.plays(run).search_offers("num_gpus", 40)
    assert words in str(raised.value)


def test_nothing_for_rent_is_an_empty_list(fake: FakeCli) -> None:
    assert fake.plays(answered([])).search_offers("num_gpus=9", 40) == []


def test_a_row_is_read_in_full_and_its_start_script_is_not_shown(fake: FakeCli) -> None:
    (row,) = fake.plays((answered(listing([instance()]))[0], "Warning: harmless\n", 0)).list_instances()
    assert row == ROW
    assert "master-token" not in repr(row)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"ports": None, "public_ipaddr": None}, {"ports": {}, "public_ip": None}),
        ({"ports": {"70000/udp": [{"HostPort": "1"}], "22/tcp": None, "8000/tcp": []}}, {"ports": {}}),
        ({"actual_status": None, "label": None}, {"actual_status": None, "label": None}),
        ({"instance": {"totalHour": 0.013}}, {"price_now_usd_h": 0.013}),
        ({"instance": None}, {"price_now_usd_h": 0.21}),
        ({"instance": None, "cur_state": "stopped"}, {"price_now_usd_h": 0.01, "cur_state": "stopped"}),
        (
            {"storage_total_cost": None, "storage_cost": 0.18, "disk_space": 40.0, "dph_base": None},
            {"storage_usd_h": 40.0 * 0.18 / 720, "dph_base": 0.21 - 40.0 * 0.18 / 720},
        ),
        ({"end_date": None, "start_date": None}, {"end_date": None, "start_date": None}),
    ],
)
def test_what_a_row_does_not_say_is_none_or_computed(
    fake: FakeCli, changed: dict[str, object], expected: dict[str, Any]
) -> None:
    (row,) = fake.plays(answered(listing([instance(**changed)]))).list_instances()
    assert row == replace(ROW, **expected)


def test_labels_are_compared_here_and_a_strangers_odd_row_does_not_matter(fake: FakeCli) -> None:
    rows = [
        instance(1, label="fleet/a"),
        instance(2, label="other/a", dph_total=None),
        instance(3, label=None),
        instance(4, label="fleet/b"),
    ]
    vast = fake.plays(answered(listing(rows)))
    assert [row.id for row in vast.list_instances("fleet/")] == [1, 4]
    assert fake.argvs == [["show", "instances", "--raw", "--limit=25"]]


def test_an_account_without_instances_is_an_empty_list(fake: FakeCli) -> None:
    assert fake.plays(answered(listing([]))).list_instances() == []


MANY = [instance(id) for id in range(1, 31)]
FIRST_PAGE = answered(listing(MANY[:25], total=30, next_token="e30="))


def test_more_than_a_page_is_fetched_flat_and_counted(fake: FakeCli) -> None:
    vast = fake.plays(FIRST_PAGE, answered(MANY))
    assert [row.id for row in vast.list_instances()] == list(range(1, 31))
    assert fake.argvs[1] == ["show", "instances", "--raw", "--retry=6"]


def test_one_that_went_between_the_two_calls_is_not_missing(fake: FakeCli) -> None:
    now_29 = answered(listing(MANY[:25], total=29, next_token="e30="))
    assert len(fake.plays(FIRST_PAGE, answered(MANY[:29]), now_29).list_instances()) == 29


@pytest.mark.parametrize("rows", [[], MANY[:25], MANY[:29] + MANY[:1]])
def test_a_flat_list_that_lost_rows_raises(fake: FakeCli, rows: list[object]) -> None:
    with pytest.raises(ProtocolError, match="the 30 instances that it claims"):
        fake.plays(FIRST_PAGE, answered(rows), FIRST_PAGE).list_instances()


def test_credit_may_be_negative(fake: FakeCli) -> None:
    assert fake.plays(answered({"credit": -0.25, "balance": 0})).credit() == -0.25


@pytest.mark.parametrize("user", [{}, {"credit": None}, {"credit": True}, {"credit": float("inf")}, []])
def test_an_account_that_does_not_say_its_credit_raises(fake: FakeCli, user: object) -> None:
    with pytest.raises(ProtocolError):
        fake.plays(answered(user)).credit()


def test_a_refused_key_at_start_up_is_the_operators_and_an_outage_is_not(fake: FakeCli) -> None:
    vast = fake.plays(refused(401, "Invalid user key"), refused(500, "oops"), answered({"credit": 1}))
    with pytest.raises(ConfigError, match="refuses the API key"):
        vast.check_key()
    with pytest.raises(ApiError, match="500"):
        vast.check_key()
    vast.check_key()


PUBLIC_KEY = "ssh-ed25519 AAAAC3Nza+/= autoscaler-py"
KEY_MADE = said(
    "Adding provided SSH public key to account...\nssh-key created {'success': True, 'key': {}}\nNote: x"
)


@pytest.mark.parametrize(
    "known",
    [
        [],
        [{"id": 1, "key": "ssh-ed25519 BBBB autoscaler-py"}],
        [{"id": 1, "public_key": PUBLIC_KEY, "deleted_at": "2026-01-01T00:00:00Z"}],
    ],
)
def test_a_key_the_account_lacks_is_added(fake: FakeCli, known: list[object]) -> None:
    fake.plays(answered(known), KEY_MADE).register_ssh_key(PUBLIC_KEY + "\n")
    assert fake.argvs == [["show", "ssh-keys", "--raw"], ["create", "ssh-key", PUBLIC_KEY, "--retry=1"]]


@pytest.mark.parametrize("name", ["key", "public_key"])
def test_a_key_the_account_has_is_not_added_again(fake: FakeCli, name: str) -> None:
    known = [{"id": 1, name: "ssh-ed25519 AAAAC3Nza+/= another comment", "deleted_at": None}]
    fake.plays(answered(known)).register_ssh_key(PUBLIC_KEY)
    assert len(fake.argvs) == 1


@pytest.mark.parametrize(
    "run",
    [("", "", 0), said("ssh-key created {'success': False, 'msg': 'no'}"), refused_plainly(400, "bad key")],
)
def test_a_key_that_was_not_added_raises(fake: FakeCli, run: tuple[str, str, int]) -> None:
    with pytest.raises(CloudError):
        fake.plays(answered([]), run).register_ssh_key(PUBLIC_KEY)


@pytest.mark.parametrize(
    "key", ["", "ssh-ed25519", "-----BEGIN OPENSSH PRIVATE KEY-----", "ssh-rsa A\nssh-rsa B"]
)
def test_what_is_not_one_public_key_is_not_sent(fake: FakeCli, key: str) -> None:
    with pytest.raises(ValueError, match="one line of an ssh public key"):
        fake.plays(answered([])).register_ssh_key(key)


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
            for made in [pool.submit(cli.Cli, settings) for _ in range(4)]:
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
        Vast(fake.settings(executable=[str(program)])).credit()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"local": True, "url": None}, "loopback"),
        ({"local": True, "url": "https://console.vast.ai"}, "loopback"),
        ({"local": True, "url": "https://127.0.0.1.evil.org"}, "loopback"),
        ({"local": True, "url": "http://localhost@evil.org"}, "without a slash"),
        ({"local": True, "url": "http://127.0.0.1:8500/"}, "without a slash"),
        ({"local": True, "url": "http://127.0.0.1:8500/api"}, "without a slash"),
        ({"local": True, "url": "http://127.0.0.1:99999"}, "http://127.0.0.1:PORT"),
        ({"local": True, "url": "127.0.0.1:8500"}, "http://127.0.0.1:PORT"),
        ({"local": True, "url": "http://10.0.0.1:8500"}, "unencrypted"),
        ({"local": False, "url": "http://console.vast.ai"}, "unencrypted"),
        ({"local": False, "url": None, "speedup": 30.0}, "local cloud only"),
        ({"speedup": 0.5}, "1 or more"),
        ({"speedup": float("nan")}, "1 or more"),
        ({"api_key": ""}, "API key"),
        ({"api_key": "two words"}, "API key"),
    ],
)
def test_settings_that_would_ask_the_wrong_service_are_refused(
    fake: FakeCli, changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        fake.settings(**changed)
    assert words in str(raised.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8500", "http://localhost:8500", "http://[::1]:8500"])
def test_a_loopback_url_is_accepted(fake: FakeCli, url: str) -> None:
    assert fake.settings(url=url).url == url


def test_a_missing_cli_or_an_unusable_directory_is_the_operators(fake: FakeCli) -> None:
    with pytest.raises(ConfigError, match="no vastai command at"):
        Vast(fake.settings(executable=[str(fake.home / "none")]))
    (fake.home / "state").write_text("a file")
    with pytest.raises(ConfigError, match="cannot prepare"):
        Vast(fake.settings())


def test_the_command_is_the_one_beside_this_python(tmp_path: Path) -> None:
    settings = VastSettings(state_dir=tmp_path, api_key=KEY)
    assert settings.executable == [str(Path(sys.executable).with_name("vastai"))]


def test_the_key_is_found_where_the_cli_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vastai set api-key"):
        find_api_key({"VAST_API_KEY": " "}, tmp_path)
    (tmp_path / ".vast_api_key").write_text("legacy\n")
    assert find_api_key({}, tmp_path) == "legacy"
    (tmp_path / ".config" / "vastai").mkdir(parents=True)
    (tmp_path / ".config" / "vastai" / "vast_api_key").write_text("set\n")
    assert find_api_key({}, tmp_path) == "set"
    assert find_api_key({"VAST_API_KEY": "given\n"}, tmp_path) == "given"
    elsewhere = tmp_path / "xdg" / "vastai"
    elsewhere.mkdir(parents=True)
    (elsewhere / "vast_api_key").write_text("xdg\n")
    assert find_api_key({"XDG_CONFIG_HOME": str(tmp_path / "xdg")}, tmp_path) == "xdg"


def test_a_key_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / ".vast_api_key").mkdir()
    with pytest.raises(ConfigError, match="vast_api_key"):
        find_api_key({}, tmp_path)


# --- pace (vast-contract 1.3) ----------------------------------------------------------------------


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
    vast = Vast(fake.settings(speedup=1e6))
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
        Vast(fake.settings(timeout_s=1.0)).credit()
    pids = [int(pid) for pid in (fake.home / "pids").read_text().split()]
    assert len(pids) == 2
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


def wait_until(true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


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
    return Vast(replace(settings, **changed))


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
