"""The whole system with real vLLM: two instances on the local cloud, booted, checked and driven as anywhere.

One stack serves all tests of this folder; each begins and ends with both instances hot.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Completion

from localcloud.engines import TINY_MODEL, VLLM_ENVIRONMENT
from simulation.live.workload import Workload, plan
from tests.paths import ROOT
from tests.vllm.fleet import BOOT_S, INSTANCES, MODEL, Fleet, Lease
from tests.waiting import wait_for

pytestmark = pytest.mark.timeout(500)  # of which the start takes most: the first test waits for it


QUESTION = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 5, "ignore_eos": True}


@pytest.fixture(autouse=True)
def both_hot(fleet: Fleet) -> Iterator[None]:
    """Before and after a test the loadbalancer gives leases on both instances."""

    def both_ready() -> bool:
        rows = fleet.status()["instances"]
        return len(rows) == INSTANCES and all(row["in_queue"] and row["tokens_in_stock"] for row in rows)

    wait_for("both serve", both_ready, BOOT_S)
    yield
    wait_for("both serve", both_ready, BOOT_S)


def files_of(directory: Path) -> dict[str, tuple[int, int]]:
    """Name, inode and time of change of what is in it."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in directory.iterdir()}


def shared_memory(pids: list[int]) -> set[str]:
    """The inodes in /dev/shm that these processes have open."""
    return {
        line.split(maxsplit=5)[4]
        for pid in pids
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
        if "/dev/shm/" in line
    }


# -- the model ---------------------------------------------------------------------------------------


def made(directory: Path) -> dict[str, bytes]:
    """The files of a tiny model in that directory, made there if there is none."""
    script = ROOT / "localcloud" / "tiny_model.py"
    subprocess.run((VLLM_ENVIRONMENT / "bin" / "python", "-I", script, directory), check=True, timeout=100)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_tiny_model_is_the_same_whenever_it_is_made(tmp_path: Path) -> None:
    there = files_of(TINY_MODEL)
    assert made(tmp_path / "new" / "tiny") == made(TINY_MODEL)
    assert files_of(TINY_MODEL) == there, "one that is there is left as it is"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tiny"]


# -- hot ---------------------------------------------------------------------------------------------


def test_both_became_hot_by_the_log_over_ssh_and_a_test_prompt(fleet: Fleet) -> None:
    rows = fleet.instances()
    assert len(rows) == INSTANCES
    for number, row in rows.items():
        assert (row["state"], row["address"].partition("://")[0]) == ("hot", "https")
        assert re.match(r"test prompt: [1-9]\d* token", row["why"]), row["why"]
        log = (fleet.home(number) / "fleet" / "model.log").read_text()
        assert "Application startup complete." in log
        assert "vLLM" in log
        assert "paced" not in log


def test_it_is_said_to_be_the_local_cloud_with_real_vllm(fleet: Fleet) -> None:
    banner = fleet.stack.tail("localcloud").splitlines()[0] + fleet.stack.engine
    assert "local cloud, vllm engine" in banner
    lease = fleet.lease()
    answer = fleet.post(lease, "/v1/completions", QUESTION)
    assert answer.status == 200
    assert answer.said["system_fingerprint"].startswith("vllm-")


# -- requests ----------------------------------------------------------------------------------------


def users(fleet: Fleet, report: Path, load: Workload) -> "subprocess.Popen[str]":
    """`sim.py` sends that load to the running fleet, and writes what came of it to that file."""
    return subprocess.Popen(
        [
            *(sys.executable, "sim.py", "--quiet", "--json", str(report), "--model", load.model),
            *("--seed", str(load.seed), "--num-iterations", str(load.num_iterations)),
            *("--base-num-users", str(load.base_num_users)),
            *("--request-probability", str(load.request_probability)),
            *("--prompt-tokens", str(load.prompt_tokens), "--max-tokens", str(load.max_tokens)),
            "--streaming" if load.streaming else "--no-streaming",
            *("--loadbalancer", fleet.stack.loadbalancer_url, "--autoscaler", fleet.stack.autoscaler_url),
            *("--state-dir", str(fleet.stack.state_dir)),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(running: "subprocess.Popen[str]", report: Path) -> dict[str, Any]:
    """The report of that run, in which every request was completed."""
    try:
        said, _ = running.communicate(timeout=200)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 0, said
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["requests"]["completed"] == found["requests"]["sent"]
    return found


def completed(client: openai.OpenAI, changed: dict[str, Any]) -> Completion:
    """The answer to the question with those changes, some of which OpenAI has no word for."""
    return client.completions.create(model=MODEL, prompt="", extra_body=QUESTION | changed)


@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "whole"])
def test_all_requests_of_a_run_are_answered_and_every_token_is_counted(
    fleet: Fleet, tmp_path: Path, streaming: bool
) -> None:
    """Real usage figures add up to the lengths that were drawn, and both instances had their share."""
    load = Workload(
        num_iterations=8,
        base_num_users=60,
        request_probability=0.2,
        streaming=streaming,
        model=MODEL,
        prompt_tokens=80.0,
        max_tokens=60.0,
        seed=7,
    )
    arrivals = plan(load)
    before = fleet.working_s()
    report = ended(users(fleet, tmp_path / "report", load), tmp_path / "report")
    assert report["requests"]["sent"] == len(arrivals) > 60
    assert report["tokens"] == {
        "prompt": sum(a.prompt_tokens for a in arrivals),
        "output": sum(a.max_tokens for a in arrivals),
    }
    assert (report["latency_s"]["ttft"]["p50"] is not None) == streaming
    assert all(seconds > before[number] for number, seconds in fleet.working_s().items())


def test_openai_clients_get_chats_and_streams_with_vllms_own_usage(fleet: Fleet) -> None:
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "How many stars are there?"}]}
    with fleet.openai() as client:
        whole = client.chat.completions.create(**asked, max_tokens=12, extra_body={"ignore_eos": True})
        stream = client.chat.completions.create(
            **asked,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        events = list(stream)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].message.content
    assert events[-1].usage == whole.usage
    assert sum(bool(e.choices and e.choices[0].delta.content) for e in events) > 1, "it came in one piece"


def test_many_at_once_are_batched_and_each_gets_what_it_asked_for(fleet: Fleet) -> None:
    def one(length: int) -> int:
        answer = completed(client, {"max_tokens": length})
        assert answer.usage is not None
        return answer.usage.completion_tokens

    lengths = [10 + n for n in range(48)]
    with fleet.openai() as client, ThreadPoolExecutor(len(lengths)) as at_once:
        assert list(at_once.map(one, lengths)) == lengths


# -- errors ------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], str]] = {
    "context": ({"prompt": [7] * 1100}, openai.BadRequestError, "maximum context length is 1024"),
    "parameter": ({"temperature": -3.0}, openai.BadRequestError, "temperature must be non-negative"),
    "token": ({"prompt": [5, 6, 512]}, openai.BadRequestError, "out of vocabulary"),
    "model": ({"model": "gpt-4"}, openai.NotFoundError, "The model `gpt-4` does not exist"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_of_vllm_reaches_the_client_as_it_is_and_costs_one_token(fleet: Fleet, name: str) -> None:
    """4xx and vLLM's own body, as the instance itself gives them; the loadbalancer gave one lease."""
    changed, kind, text = WRONG[name]
    direct = fleet.post(fleet.lease(), "/v1/completions", QUESTION | changed)
    before = fleet.status()["routed"]
    with fleet.openai() as client, pytest.raises(kind) as caught:
        completed(client, changed)
    assert fleet.status()["routed"] == before + 1
    assert (caught.value.status_code, caught.value.response.json()) == (direct.status, direct.said)
    assert set(direct.said) == {"error"}
    assert text in direct.said["error"]["message"]
    assert direct.said["error"]["code"] == direct.status


# -- tokens ------------------------------------------------------------------------------------------


def test_a_token_admits_one_request_once_on_one_instance(fleet: Fleet) -> None:
    one, other = fleet.lease_on(min(fleet.stocks())), fleet.lease_on(max(fleet.stocks()))
    assert fleet.post(one, "/v1/completions", QUESTION, token=other.token).status == 401
    assert fleet.post(one, "/v1/completions", QUESTION).status == 200
    assert fleet.post(one, "/v1/completions", QUESTION).status == 401
    assert fleet.post(other, "/v1/completions", QUESTION).status == 200


def test_without_a_token_only_health_is_open(fleet: Fleet) -> None:
    lease = fleet.lease()
    fleet.give_back(lease)
    closed = ("/v1/models", "/metrics", "/load", "/version", "/openapi.json", "/docs", "/ping")
    assert {path: fleet.get(lease, path).status for path in closed} == dict.fromkeys(closed, 401)
    assert fleet.get(lease, "/health").status == 200


def test_tokens_are_fetched_anew_before_they_run_out(fleet: Fleet, tmp_path: Path) -> None:
    """More requests than the two have tokens for, and none of them waits or fails."""
    stock = sum(fleet.stocks().values())
    load = Workload(
        num_iterations=15,
        base_num_users=65,
        request_probability=1.0,
        model=MODEL,
        prompt_tokens=4.0,
        max_tokens=2.0,
        seed=11,
    )
    assert len(plan(load)) > stock
    report = ended(users(fleet, tmp_path / "report", load), tmp_path / "report")
    assert report["requests"]["route_refusals_by_kind"] == {}


# -- stop and start ----------------------------------------------------------------------------------


def in_state(fleet: Fleet, state: str, count: int) -> list[int]:
    """The instances in that state, once they are so many."""
    found: Callable[[], list[int] | None] = lambda: (  # noqa: E731
        numbers if len(numbers := fleet.in_state(state)) == count else None
    )
    return wait_for(f"{count} {state}", found, BOOT_S)


def test_an_instance_that_was_stopped_comes_back_with_its_model_and_without_its_tokens(fleet: Fleet) -> None:
    """It is hot again by the same checks, nothing was loaded from elsewhere, and an old token is refused."""
    leases: dict[int, Lease] = {number: fleet.lease_on(number) for number in fleet.stocks()}
    for lease in leases.values():
        fleet.give_back(lease)
    memory = {number: shared_memory(row["pids"]) for number, row in fleet.rentals().items()}
    model, boots = files_of(TINY_MODEL), {number: row["boot"] for number, row in fleet.rentals().items()}

    fleet.keep_hot(1, total=INSTANCES)
    (stopped,) = in_state(fleet, "cold", 1)
    assert memory[stopped]
    assert not memory[stopped] & {str(p.stat().st_ino) for p in Path("/dev/shm").iterdir()}
    assert fleet.rentals()[stopped]["pids"] == []
    assert fleet.lease().instance_id != stopped

    fleet.keep_hot(INSTANCES, total=INSTANCES)
    in_state(fleet, "hot", INSTANCES)
    assert fleet.rentals()[stopped]["boot"] == boots[stopped] + 1
    assert files_of(TINY_MODEL) == model
    lease = wait_for("it serves", lambda: fleet.lease_on(stopped) if fleet.stocks().get(stopped) else None)
    old = leases[stopped].token
    assert fleet.post(lease, "/v1/completions", QUESTION, token=old).status == 401
    answer = fleet.post(lease, "/v1/completions", QUESTION)
    assert (answer.status, answer.said["usage"]["completion_tokens"]) == (200, QUESTION["max_tokens"])


# -- death -------------------------------------------------------------------------------------------


def test_when_an_engine_dies_in_the_middle_of_its_work_no_request_is_lost(
    fleet: Fleet, tmp_path: Path
) -> None:
    """vLLM ends with its engine, is started again on its machine, and earns hot again."""
    load = Workload(
        num_iterations=15,
        base_num_users=30,
        request_probability=0.2,
        model=MODEL,
        prompt_tokens=50.0,
        max_tokens=200.0,
        seed=3,
    )

    def busy_one() -> int | None:
        rows = fleet.status()["instances"]
        return next((row["id"] for row in rows if row["running"] > 0 and row["unfinished"] > 0), None)

    running = users(fleet, tmp_path / "report", load)
    try:
        victim = wait_for("one is busy", busy_one)
        memory = shared_memory(fleet.rentals()[victim]["pids"])
        os.kill(engine_of(fleet, victim), signal.SIGKILL)
        wait_for("it is no longer hot", lambda: victim not in fleet.in_state("hot"))
    finally:
        report = ended(running, tmp_path / "report")
    assert report["requests"]["retried"] > 0
    in_state(fleet, "hot", INSTANCES)
    assert "fleet: the model server ended" in (fleet.home(victim) / "fleet" / "model.log.old").read_text()
    for path in Path("/dev/shm").iterdir():  # a rented machine's goes with its container
        if str(path.stat().st_ino) in memory:
            path.unlink()


def engine_of(fleet: Fleet, instance_id: int) -> int:
    """The process of vLLM's engine on that instance."""
    pids = fleet.rentals()[instance_id]["pids"]
    (engine,) = [pid for pid in pids if "EngineCor" in Path(f"/proc/{pid}/comm").read_text()]
    return int(engine)
