"""Users: planned ahead from the seed, sent in time whatever happens, tried elsewhere, and counted."""

import asyncio
import http.server
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import sim
from engine.profiles import get_profile
from process.errors import ConfigError
from sim import parse
from simulation.live import measure, users
from simulation.live.config import SimConfig
from simulation.live.local_stack import LocalStack
from simulation.live.operator import FleetColumns, NoAnswer, Operator
from simulation.live.workload import body_of, parse_schedule, plan
from simulation.report import FAILURES
from tests.paths import ROOT
from tests.ports import free_port
from tests.process.test_local_stack import running, stand_ins
from tests.waiting import wait_for
from web.messages.decoding import decode

# -- the plan ------------------------------------------------------------------------------------------

BUSY = SimConfig(num_iterations=50, base_num_users=20, request_probability=0.5, seed=1)


def test_the_plan_follows_from_the_seed() -> None:
    assert plan(BUSY) == plan(BUSY)
    assert plan(BUSY) != plan(replace(BUSY, seed=2))


def test_each_user_sends_at_most_one_request_a_round_with_its_probability() -> None:
    arrivals = plan(BUSY)
    by_round = [sum(int(a.at_s) == n for a in arrivals) for n in range(50)]
    assert max(by_round) <= 20
    assert len(arrivals) == pytest.approx(500, abs=60)
    assert [a.at_s for a in arrivals] == sorted(a.at_s for a in arrivals)
    assert [a.number for a in arrivals] == list(range(len(arrivals)))


def test_the_schedule_multiplies_the_users_over_equal_slices() -> None:
    config = replace(BUSY, request_probability=1.0, load_schedule=(1.0, 0.0, 3.0), num_iterations=30)
    arrivals = plan(config)
    assert [sum(10 * n <= a.at_s < 10 * n + 10 for a in arrivals) for n in range(3)] == [200, 0, 600]


def test_lengths_have_the_means_asked_for_and_fit_the_context() -> None:
    arrivals = plan(replace(BUSY, num_iterations=400))
    assert sum(a.prompt_tokens for a in arrivals) / len(arrivals) == pytest.approx(300, rel=0.1)
    assert sum(a.max_tokens for a in arrivals) / len(arrivals) == pytest.approx(180, rel=0.1)
    assert all(a.prompt_tokens >= 1 <= a.max_tokens for a in arrivals)
    assert all(a.prompt_tokens + a.max_tokens <= 4096 for a in arrivals)


def test_every_prompt_is_its_own_and_has_the_length_that_was_planned() -> None:
    arrivals = plan(BUSY)[:50]
    prompts = [tuple(body_of(a, "m", True, 1)["prompt"]) for a in arrivals]
    assert len(set(prompts)) == 50
    assert [len(p) for p in prompts] == [a.prompt_tokens for a in arrivals]
    assert body_of(arrivals[0], "m", True, 1)["stream_options"] == {"include_usage": True}
    assert "stream_options" not in body_of(arrivals[0], "m", False, 1)


# -- a fleet of fakes ----------------------------------------------------------------------------------

LEASE = {"address": "http://a", "token": "t", "request_id": "r", "instance_id": 1, "expires_in_s": 60.0}

Serve = Callable[[int, web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


class Fakes:
    """A loadbalancer, an autoscaler and two instances in a thread; `serve` says how instance n answers.

    route_answer, when it gives something for the number of the call, is what /route answers instead of a
    lease; client_key is what the loadbalancer wants; costs_status what GET /costs answers.
    """

    def __init__(
        self,
        serve: Serve,
        route_answer: Callable[[int], web.Response | None] = lambda _: None,
        client_key: str = "",
        costs_status: int = 200,
    ) -> None:
        self.serve = serve
        self.route_answer = route_answer
        self.client_key = client_key
        self.costs_status = costs_status
        self.managed: list[bool] = []  # bodies of PUT /manage
        self.asked: list[dict[str, Any]] = []  # bodies of /route
        self.bodies: list[dict[str, Any]] = []  # what instances were asked for
        self.done: list[dict[str, Any]] = []
        self.served: list[tuple[int, float]] = []  # (instance, when)
        self.at_once = self.most_at_once = 0
        self.ports = [0, 0, 0]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._up = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._up.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner_cleanup())
        self._loop.close()

    async def _start(self) -> None:
        self.runners = []
        for n, routes in enumerate(([*self._control()], self._instance(1), self._instance(2))):
            app = web.Application()
            app.add_routes(routes)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", self.ports[n], backlog=1024)
            await site.start()
            self.ports[n] = runner.addresses[0][1]
            self.runners.append(runner)

    async def _runner_cleanup(self) -> None:
        for runner in self.runners:
            await runner.cleanup()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _control(self) -> list[web.RouteDef]:
        def wrong_key(request: web.Request) -> bool:
            wanted = f"Bearer {self.client_key}"
            return bool(self.client_key) and request.headers.get("Authorization") != wanted

        async def route(request: web.Request) -> web.Response:
            body = await request.json()
            self.asked.append(body)
            if wrong_key(request):
                return web.json_response({"error": "unauthorized"}, status=401)
            if (said := self.route_answer(len(self.asked))) is not None:
                return said
            n = next((n for n in (1, 2) if n not in body.get("avoid", [])), 1)
            lease = {
                **LEASE,
                "address": f"http://127.0.0.1:{self.ports[n]}",
                "instance_id": n,
                "model": "vllm-13",
            }
            return web.json_response({**lease, "request_id": f"r{len(self.asked)}"})

        async def done(request: web.Request) -> web.Response:
            if wrong_key(request):
                return web.json_response({"error": "unauthorized"}, status=401)
            self.done.append(await request.json())
            return web.json_response({})

        async def manage(request: web.Request) -> web.Response:
            self.managed.append((await request.json())["manage"])
            return web.json_response({})

        async def instances(request: web.Request) -> web.Response:
            return web.json_response({"instances": [{"state": "hot", "price_usd_h": 0.5}], "manage": True})

        async def status(request: web.Request) -> web.Response:
            return web.json_response({"model": "vllm-13", "demand": 0.5})

        async def costs(request: web.Request) -> web.Response:
            usd = dict.fromkeys(("total", "hot_working", "hot_idle", "loading", "stopped"), 0.1)
            counts = dict.fromkeys(("starts", "stops", "creates", "destroys"), 0)
            said = {"usd": usd, "usd_if_all_hot": 0.2, "order_to_hot_s": [], **counts}
            return web.json_response(said, status=self.costs_status)

        return [
            web.post("/route", route),
            web.post("/done", done),
            web.put("/manage", manage),
            web.get("/instances", instances),
            web.get("/status", status),
            web.get("/costs", costs),
        ]

    def _instance(self, n: int) -> list[web.RouteDef]:
        async def completions(request: web.Request) -> web.StreamResponse:
            self.served.append((n, time.perf_counter()))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            try:
                self.bodies.append(await request.json())
                return await self.serve(n, request, self.bodies[-1])
            finally:
                self.at_once -= 1

        return [web.post("/v1/completions", completions)]

    @contextmanager
    def running(self) -> Iterator["Fakes"]:
        self._thread.start()
        assert self._up.wait(10)
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)


async def answer(request: web.Request, body: dict[str, Any], pause_s: float = 0.0) -> web.StreamResponse:
    """A proper stream of as many tokens as were asked for, at most three events."""
    reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await reply.prepare(request)
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    for said in ({"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}, {"choices": [], "usage": usage}):
        await reply.write(f"data: {json.dumps(said)}\n\n".encode())
        await asyncio.sleep(pause_s)
    await reply.write(b"data: [DONE]\n\n")
    return reply


async def well(n: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return await answer(request, body)


async def first_is_dead(n: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """Instance 1 breaks off in the middle of the answer."""
    if n == 2:
        return await answer(request, body)
    reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await reply.prepare(request)
    await reply.write(b'data: {"choices": [{"text": "a"}]}\n\n')
    assert request.transport is not None
    request.transport.abort()
    return reply


SMALL = SimConfig(
    num_iterations=4,
    round_s=0.1,
    base_num_users=5,
    request_probability=1.0,
    seed=1,
    wait_s=1.0,
    request_timeout_s=20.0,
    prompt_tokens=5.0,
    max_tokens=5.0,
    quiet=True,
    needs_autoscaler=True,
)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fakes have no figures that come a second late, and do not come back; signals are pytest's again."""
    monkeypatch.setattr(measure, "SETTLE_S", 0.0)
    monkeypatch.setattr(measure, "ANSWER_S", 0.0)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def carried_out(fakes: Fakes, **other: Any) -> dict[str, Any]:
    config = replace(SMALL, loadbalancer=fakes.url, autoscaler=fakes.url, **other)
    found = asyncio.run(measure.run(config, asyncio.Event(), "fake engine"))
    assert set(found["requests"]["failed_by_kind"]) <= set(FAILURES), "a kind without an explanation"
    return found


ONE: dict[str, Any] = {"base_num_users": 1, "num_iterations": 1}


def test_every_request_is_served() -> None:
    with Fakes(well).running() as fakes:
        found = carried_out(fakes)
        arrivals = plan(SMALL)
        assert found["requests"]["completed"] == found["requests"]["sent"] == len(arrivals) == 20
        assert found["tokens"] == {
            "prompt": sum(a.prompt_tokens for a in arrivals),
            "output": sum(a.max_tokens for a in arrivals),
        }
        assert len(fakes.done) == 1, "that asks who is there: ends are reported by the instances"
        assert found["cost_usd"]["total"] == 0.1
        assert found["latency_s"]["ttft"]["max"] <= found["latency_s"]["e2e"]["max"]


def test_a_broken_answer_is_tried_again_elsewhere() -> None:
    with Fakes(first_is_dead).running() as fakes:
        found = carried_out(fakes)
        assert (found["requests"]["completed"], found["requests"]["retried"]) == (20, 20)
        assert found["requests"]["setbacks_by_kind"] == {"broken_off": 20}
        assert [a["avoid"] for a in fakes.asked if "avoid" in a] == [[1]] * 20
        assert sum(d["outcome"] == "failed" for d in fakes.done) == 20


@pytest.mark.parametrize(
    ("status", "kind", "tries"),
    [(400, "rejected", 1), (500, "broken_off", 2), (401, "not_started", 2), (503, "not_started", 2)],
)
def test_a_request_fails_by_the_kind_of_its_last_setback(status: int, kind: str, tries: int) -> None:
    """A 4xx that speaks of the request is final; all else is tried elsewhere until the time is up."""

    async def refuses(n: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no"}}, status=status)

    with Fakes(refuses).running() as fakes:
        found = carried_out(fakes, **ONE, request_timeout_s=1.0)
        assert found["requests"]["failed_by_kind"] == {kind: 1}
        assert set(found["requests"]["setbacks_by_kind"]) == {kind}
        assert len(fakes.served) == tries if tries == 1 else len(fakes.served) >= tries
        assert [n for n, _ in fakes.served[:2]] == [1, 2][:tries]


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        ([{"error": {"message": "engine died"}}], "broken_off"),
        ([{"choices": [{"text": "a"}]}], "broken_off"),
        ([{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 0}}], "bad_answer"),
    ],
    ids=["an error in the stream", "no usage", "no token"],
)
def test_an_answer_that_is_not_one_is_tried_elsewhere(events: list[dict[str, Any]], kind: str) -> None:
    async def first_is_odd(n: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if n == 2:
            return await answer(request, body)
        return web.Response(
            text="".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n",
            content_type="text/event-stream",
        )

    with Fakes(first_is_odd).running() as fakes:
        found = carried_out(fakes, **ONE)
        assert (found["requests"]["completed"], found["requests"]["setbacks_by_kind"]) == (1, {kind: 1})
        assert [(d["outcome"], d["why"]) for d in fakes.done[1:]] == [("failed", kind)]


def test_what_the_loadbalancer_calls_wrong_is_not_asked_again() -> None:
    def refuses(_: int) -> web.Response:
        return web.json_response({"error": "bad_request"}, status=400)

    with Fakes(well, refuses).running() as fakes:
        found = carried_out(fakes, **ONE)
        assert found["requests"]["failed_by_kind"] == {"refused_by_loadbalancer": 1}
        assert found["requests"]["route_refusals_by_kind"] == {"bad_request": 1}
        assert len(fakes.asked) == 1


def test_a_long_retry_after_does_not_end_a_request_before_its_time() -> None:
    """Room may come sooner than the loadbalancer thought: it is asked once more while there is time."""

    def full_at_first(call: int) -> web.Response | None:
        full = web.json_response({"error": "nothing_hot"}, status=503, headers={"Retry-After": "60"})
        return full if call < 3 else None

    with Fakes(well, full_at_first).running() as fakes:
        found = carried_out(fakes, **ONE, request_timeout_s=4.0)
        assert (found["requests"]["completed"], len(fakes.asked)) == (1, 3)
        assert found["latency_s"]["route"]["max"] == pytest.approx(3.0, abs=0.5), "its pauses are part of it"


def test_a_fleet_that_stays_full_is_no_capacity() -> None:
    def full(_: int) -> web.Response:
        return web.json_response({"error": "all_busy"}, status=503)

    with Fakes(well, full).running() as fakes:
        found = carried_out(fakes, **ONE, request_timeout_s=1.0)
        assert found["requests"]["failed_by_kind"] == {"no_capacity": 1}
        assert 2 <= len(fakes.asked) <= 10


def test_a_loadbalancer_that_is_gone_for_a_moment_costs_time_and_no_request() -> None:
    def gone(call: int) -> web.Response | None:
        return web.Response(status=502, text="starting") if call <= 20 else None

    with Fakes(well, gone).running() as fakes:
        found = carried_out(fakes)
        assert found["requests"]["completed"] == 20
        assert found["requests"]["route_refusals_by_kind"] == {"http_502": 20}
        assert found["requests"]["retried"] == 0, "no instance was tried in vain"


def test_only_the_last_instances_that_failed_are_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loadbalancer refuses lists without end, and would end the request with that."""
    monkeypatch.setattr(users, "MOST_AVOIDED", 1)
    monkeypatch.setattr(users, "PAUSE_S", (0.01, 0.02))

    async def refuses(n: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=503)

    with Fakes(refuses).running() as fakes:
        carried_out(fakes, **ONE, request_timeout_s=0.7)
        assert len(fakes.asked) > 3
        assert [a.get("avoid") for a in fakes.asked[:4]] == [None, [1], [2], [1]]


def test_without_streaming_tokens_are_counted_and_no_first_token_is_timed() -> None:
    async def at_once(n: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert body["stream"] is False
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        return web.json_response({"choices": [{"text": "ab"}], "usage": usage})

    with Fakes(at_once).running() as fakes:
        found = carried_out(fakes, streaming=False)
        assert found["requests"]["completed"] == 20
        assert found["tokens"]["output"] == sum(a.max_tokens for a in plan(SMALL))
        assert set(found["latency_s"]["ttft"].values()) == {None}
        assert found["latency_s"]["e2e"]["max"] > 0


def test_an_answer_that_takes_too_long_is_a_timeout() -> None:
    async def slow(n: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    with Fakes(slow).running() as fakes:
        found = carried_out(fakes, **ONE, request_timeout_s=0.5)
        assert found["requests"]["failed_by_kind"] == {"timeout": 1}


@pytest.mark.alone
def test_a_slow_answer_never_delays_the_next_arrival() -> None:
    """Open loop: all are under way together although each answer takes longer than the whole plan."""

    async def slow(n: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await answer(request, body, pause_s=0.4)

    with Fakes(slow).running() as fakes:
        found = carried_out(fakes)
        assert fakes.most_at_once == 20
        begun = min(at for _, at in fakes.served)
        due = [a.at_s for a in plan(SMALL)]
        late = [
            at - begun - (d - due[0])
            for (_, at), d in zip(sorted(fakes.served, key=lambda s: s[1]), due, strict=True)
        ]
        assert max(late) < 0.4
        assert found["requests"]["completed"] == 20


@pytest.mark.alone
def test_500_streams_at_once_do_not_make_the_driver_late(tmp_path: Path) -> None:
    """One driver process; what is measured is the driver, since the fakes have a process of their own."""

    async def slow(n: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await answer(request, body, pause_s=1.5)

    with Fakes(slow).running() as fakes:
        process = command(
            *("--quiet", "--seed", "1", "--loadbalancer", fakes.url, "--autoscaler", fakes.url),
            *("--num-iterations", "5", "--round-s", "0.4", "--base-num-users", "100"),
            *("--request-probability", "1", "--json", str(tmp_path / "r.json")),
        )
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, ""), err
        found = json.loads((tmp_path / "r.json").read_text())
        assert found["requests"]["completed"] == 500
        assert fakes.most_at_once > 450
        assert found["driver"]["send_lag_s"]["p99"] < 0.1
        assert "ms after due (p50)" in out, "and the report says so"


def test_a_stop_ends_the_run_with_what_there_is() -> None:
    async def slow(n: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await answer(request, body, pause_s=20.0)

    async def stopped(fakes: Fakes) -> dict[str, Any]:
        stop = asyncio.Event()
        config = replace(SMALL, loadbalancer=fakes.url, autoscaler=fakes.url)
        running = asyncio.create_task(measure.run(config, stop, "fake engine"))
        while len(fakes.served) < 5:
            await asyncio.sleep(0.01)
        stop.set()
        return await running

    with Fakes(slow).running() as fakes:
        found = asyncio.run(stopped(fakes))
        assert found["interrupted"]
        assert found["requests"]["failed_by_kind"] == {"interrupted": found["requests"]["sent"]}
        assert fakes.done[1:] == [], "it was not the instances' fault"


# -- who is there, and who wants a key -----------------------------------------------------------------


def test_the_manage_flag_is_set_for_the_run_and_then_as_it_was() -> None:
    with Fakes(well).running() as fakes:
        carried_out(fakes, manage=False)
        assert fakes.managed == [False, True]


def test_a_flag_that_is_as_wanted_is_left_alone_afterwards() -> None:
    with Fakes(well).running() as fakes:
        carried_out(fakes, manage=True)
        assert fakes.managed == [True]


def test_a_flag_that_cannot_be_set_back_is_told_and_the_report_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    once = Operator.manage

    async def only_at_first(self: Operator, wanted: bool) -> None:
        if wanted:
            raise NoAnswer("it is gone")
        await once(self, wanted)

    monkeypatch.setattr(Operator, "manage", only_at_first)
    with Fakes(well).running() as fakes:
        assert carried_out(fakes, manage=False)["requests"]["completed"] == 20
    assert "could not be set again: it is gone" in capsys.readouterr().err


def test_an_autoscaler_that_does_not_tell_costs_leaves_them_unknown_and_says_why() -> None:
    with Fakes(well, costs_status=500).running() as fakes:
        found = carried_out(fakes)
        assert found["cost_usd"]["total"] is None
        assert "wanted 200, got 500" in found["cost"]["why_unknown"]
        assert found["requests"]["completed"] == 20


@pytest.mark.usefixtures("impatient")
def test_an_autoscaler_that_was_named_must_be_there_another_need_not() -> None:
    with Fakes(well).running() as fakes:
        config = replace(SMALL, loadbalancer=fakes.url, autoscaler=f"http://127.0.0.1:{free_port()}", **ONE)
        with pytest.raises(ConfigError, match="the autoscaler does not answer"):
            asyncio.run(measure.run(config, asyncio.Event(), "fake engine"))
        with pytest.raises(ConfigError, match="the autoscaler does not answer"):
            asyncio.run(
                measure.run(replace(config, needs_autoscaler=False, manage=True), asyncio.Event(), "fake")
            )
        assert fakes.asked == [], "nothing was sent"
        found = asyncio.run(
            measure.run(replace(config, needs_autoscaler=False), asyncio.Event(), "fake engine")
        )
        assert (found["requests"]["completed"], found["cost_usd"]["total"]) == (1, None)


def test_another_model_than_the_fleet_serves_is_refused() -> None:
    with Fakes(well).running() as fakes, pytest.raises(ConfigError, match="the loadbalancer serves vllm-13"):
        carried_out(fakes, model="vllm-70")


def test_a_client_key_is_asked_for_and_sent(tmp_path: Path) -> None:
    key_file = tmp_path / "client.key"
    key_file.write_text("a-key-of-the-clients\n")
    key_file.chmod(0o600)
    with Fakes(well, client_key="a-key-of-the-clients").running() as fakes:
        with pytest.raises(ConfigError, match="--client-key-file"):
            carried_out(fakes, **ONE)
        found = carried_out(fakes, **ONE, client_key_file=key_file)
        assert found["requests"]["completed"] == 1
        assert len(fakes.done) == 1, "who is there was asked with the key too"


def test_a_client_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    key_file = tmp_path / "client.key"
    key_file.write_text("a-key-of-the-clients\n")
    key_file.chmod(0o644)
    with Fakes(well).running() as fakes, pytest.raises(ConfigError, match="chmod 600"):
        carried_out(fakes, **ONE, client_key_file=key_file)


# -- the command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "vllm-7"], "unknown model 'vllm-7'"),
        (["--num-iterations", "0"], "--num-iterations 0"),
        (["--request-probability", "1.5"], "--request-probability 1.5"),
        (["--base-num-users", "many"], "--base-num-users"),
        (["--load-schedule", "1,x"], "--load-schedule"),
        (["--prompt-tokens", "4000", "--max-tokens", "1000"], "at most 4096 together"),
        (["--loadbalancer", "ftp://x"], "--loadbalancer"),
        (["--json", "/nowhere/x.json"], "there is no directory /nowhere"),
        (["--json", "/tmp"], "wanted a file"),
        (["--seed", "-1"], "--seed -1"),
        (["--round-s", "nan"], "--round-s nan"),
        (["--local", "--loadbalancer", "http://127.0.0.1:1"], "goes not with --local"),
        (["--instances", "3"], "goes only with --local"),
        (["--engine", "vllm"], "goes only with --local"),
        (["--local", "--engine", "gpu"], "--engine gpu: wanted paced or vllm"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_wrong_flag_is_refused_by_name(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(flags)


def test_with_real_vllm_a_local_run_has_its_model_and_two_instances() -> None:
    config = parse(["--local", "--engine", "vllm"])
    assert (config.model, config.instances) == ("tiny", 2)
    assert config.prompt_tokens + config.max_tokens < get_profile("tiny").max_model_len
    assert parse(["--local"]).model == "vllm-13"


def test_what_is_said_on_the_command_line_goes_before_what_suits_the_engine() -> None:
    config = parse(["--local", "--engine", "vllm", "--instances", "1", "--load-schedule", "1,2"])
    assert (config.instances, config.load_schedule) == (1, (1.0, 2.0))


def test_without_a_seed_one_is_drawn_and_shown() -> None:
    assert parse([]).seed != parse([]).seed
    assert parse(["--seed", "5"]).seed == 5


def test_file_and_environment_say_what_the_command_line_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('local = true\nload-schedule = "1,2"\nseed = 7\nnum-iterations = 10\nmanage = false\n')
    monkeypatch.setenv("SIM_NUM_ITERATIONS", "11")
    config = parse(["--config", str(file), "--engine", "vllm"])
    assert (config.local, config.load_schedule, config.seed, config.manage) == (True, (1.0, 2.0), 7, False)
    assert (config.num_iterations, config.instances) == (11, 2)  # the engine's, where nothing was said
    with pytest.raises(ConfigError, match="--loadbalancer goes not with --local"):
        parse(["--config", str(file), "--loadbalancer", "http://127.0.0.1:1"])


def test_a_schedule_is_numbers_with_commas() -> None:
    assert parse_schedule("1,2.5,0") == (1.0, 2.5, 0.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that are not there are not waited for."""
    monkeypatch.setattr(measure, "START_S", 0.0)


def command(*flags: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "sim.py", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--loadbalancer", "http://127.0.0.1:FREE"], "does not answer"),
        (["--model", "vllm-7"], "unknown model 'vllm-7'"),
        (["--base-num-users", "many"], "--base-num-users"),
        (["--client-key-file", "/nowhere/key"], "/nowhere/key cannot be read"),
        (["--state-dir", "/nowhere"], "/nowhere/control.key cannot be read"),
    ],
)
def test_what_cannot_be_run_as_asked_is_one_line_and_exit_2(flags: list[str], words: str) -> None:
    """`sim.main` is what the process runs: what it raises is said in one line, as the next test shows."""
    with pytest.raises(ConfigError) as refused:
        sim.main(["--quiet", *(flag.replace("FREE", str(free_port())) for flag in flags)])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_process_says_what_is_wrong_in_one_line_and_exits_2() -> None:
    no_lease_was_given = http.server.BaseHTTPRequestHandler
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), no_lease_was_given) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        process = command("--quiet", "--loadbalancer", f"http://127.0.0.1:{other.server_port}")
        out, err = process.communicate(timeout=30)
        other.shutdown()
    assert (process.returncode, out, len(err.splitlines())) == (2, "", 1), err
    assert err.startswith("sim.py: ")
    assert "is no loadbalancer: POST /done answered 501" in err


def test_servers_that_were_started_just_now_are_waited_for() -> None:
    """`sim.py` 2 s after the loadbalancer said that it does not answer."""
    fakes = Fakes(well)
    fakes.ports[0] = free_port()
    config = replace(SMALL, loadbalancer=fakes.url, autoscaler=fakes.url, needs_autoscaler=True, **ONE)
    over = threading.Event()

    def begin_late() -> None:
        time.sleep(1.0)
        with fakes.running():
            over.wait(30.0)

    starter = threading.Thread(target=begin_late)
    starter.start()
    try:
        found = asyncio.run(measure.run(config, asyncio.Event(), "fake engine"))
    finally:
        over.set()
        starter.join()
    assert found["requests"]["completed"] == 1


def test_requests_that_failed_are_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def refuses(n: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no"}}, status=400)

    with Fakes(refuses).running() as fakes:
        status = sim.main(
            [
                *("--quiet", "--loadbalancer", fakes.url, "--autoscaler", fakes.url, "--seed", "1"),
                *("--num-iterations", "1", "--round-s", "0.1", "--request-probability", "1"),
            ]
        )
    assert status == 1
    assert f"20 rejected: {FAILURES['rejected']}" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_with_a_report_and_exit_130(tmp_path: Path, number: signal.Signals) -> None:
    async def slow(n: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await answer(request, body, pause_s=20.0)

    with Fakes(slow).running() as fakes:
        process = command(
            *("--seed", "1", "--loadbalancer", fakes.url, "--autoscaler", fakes.url),
            *("--base-num-users", "50", "--json", str(tmp_path / "r.json")),
        )
        wait_for("requests are under way", lambda: len(fakes.served) > 3)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in out
    assert "Traceback" not in err
    assert json.loads((tmp_path / "r.json").read_text())["interrupted"] is True


# -- everything on this machine ------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`--local` with stand-ins for the three processes; gives the file of what their cloud lists."""
    rows = tmp_path / "rows.json"
    rows.write_text('[{"id": 1, "state": "hot"}]')
    monkeypatch.setenv("ROWS_FILE", str(rows))
    programs = stand_ins(tmp_path)
    monkeypatch.setattr(sim, "LocalStack", lambda config, say: LocalStack(config, programs, say))
    return rows


def local_flags(tmp_path: Path) -> list[str]:
    return ["--local", "--quiet", "--state-dir", str(tmp_path / "state"), "--json", str(tmp_path / "r.json")]


def ran(engine: str | None, fakes: Fakes) -> dict[str, Any]:
    return carried_out(fakes, **ONE) | {"engine": engine}


def test_a_local_run_reports_what_answered_and_that_nothing_was_left(
    tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Fakes(well).running() as fakes:
        monkeypatch.setattr(sim, "carry_out", lambda config, engine: ran(engine, fakes))
        assert sim.main(local_flags(tmp_path)) == 0
    assert running(tmp_path) == []
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["engine"] == "local cloud, paced engine"
    assert found["local_stack"] == {"restarts": {}, "left_behind": []}
    assert capsys.readouterr().out.endswith("left behind: nothing\n")


def test_a_local_run_with_real_vllm_says_so(
    tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Fakes(well).running() as fakes:
        monkeypatch.setattr(sim, "carry_out", lambda config, engine: ran(engine, fakes))
        sim.main([*local_flags(tmp_path), "--engine", "vllm"])
    assert json.loads((tmp_path / "r.json").read_text())["engine"] == "local cloud, vllm engine"


def test_what_a_local_run_leaves_is_named_and_exit_1(
    tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DESTROY_FAILS", "1")
    with Fakes(well).running() as fakes:
        monkeypatch.setattr(sim, "carry_out", lambda config, engine: ran(engine, fakes))
        assert sim.main(local_flags(tmp_path)) == 1
    assert "left behind: instance 1" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ConfigError("odd"), KeyboardInterrupt()], ids=["an error", "Ctrl-C"])
def test_a_local_run_that_ends_badly_names_what_it_leaves_even_when_quiet(
    tmp_path: Path,
    local: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    def raises(config: SimConfig, engine: str) -> dict[str, Any]:
        raise error

    monkeypatch.setenv("DESTROY_FAILS", "1")
    monkeypatch.setattr(sim, "carry_out", raises)
    with pytest.raises(type(error)):
        sim.main(local_flags(tmp_path))
    assert "left behind: instance 1" in capsys.readouterr().err
    assert running(tmp_path) == []


def test_the_columns_of_the_autoscalers_history_are_taken_over_with_times_of_the_run() -> None:
    columns = {name: [1.0, 2.0] for name in FleetColumns.__struct_fields__}
    said = columns | {"at_s": [1005.0, 1010.0], "from": 0.0}
    found = decode(json.dumps(said).encode(), FleetColumns).since(1000.0, 1012.0)
    assert (found["from"], found["to"]) == (0.0, 12.0)
    assert found["at_s"] == [5.0, 10.0]
    assert found["offered"] == (1.0, 2.0)
    unequal = decode(json.dumps(said | {"held": []}).encode(), FleetColumns)
    with pytest.raises(NoAnswer, match="columns of equal length"):
        unequal.since(1000.0, 1012.0)
