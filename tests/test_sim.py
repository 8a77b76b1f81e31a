"""Users: planned ahead from the seed, sent in time whatever happens, tried elsewhere, and counted."""

import asyncio
import json
import signal
import socket
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
from errors import ConfigError
from sim import Config, Lease, Refusal, body_of, parse, parse_schedule, plan, read_route
from tests.waiting import wait_for

ROOT = Path(__file__).parent.parent


# -- the plan ------------------------------------------------------------------------------------------

BUSY = Config(num_iterations=50, base_num_users=20, request_probability=0.5, seed=1)


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


# -- what /route says ----------------------------------------------------------------------------------

LEASE = {"address": "http://a", "token": "t", "request_id": "r", "instance_id": 1, "model": "m"}


@pytest.mark.parametrize(
    ("status", "said", "retry_after", "found"),
    [
        (200, LEASE, None, Lease("http://a", "t", "r", 1, "m")),
        (503, {"error": "all_busy"}, "3", Refusal("all_busy", "no_capacity", 3.0)),
        (503, {"error": "nothing_hot"}, "soon", Refusal("nothing_hot", "no_capacity")),
        (400, {"error": "bad_request"}, None, Refusal("bad_request", "refused_by_loadbalancer", final=True)),
        (
            401,
            {"error": "unauthorized"},
            None,
            Refusal("unauthorized", "refused_by_loadbalancer", final=True),
        ),
        (429, {"error": "slow"}, None, Refusal("slow", "loadbalancer_unreachable")),
        (502, "odd", None, Refusal("http_502", "loadbalancer_unreachable")),
        (200, {"address": "http://a"}, None, Refusal("bad_answer", "loadbalancer_unreachable")),
    ],
)
def test_an_answer_of_route_is_a_lease_or_says_whether_to_ask_again(
    status: int, said: Any, retry_after: str | None, found: Lease | Refusal
) -> None:
    assert read_route(status, json.dumps(said).encode(), retry_after) == found


# -- a fleet of fakes ----------------------------------------------------------------------------------

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Fakes:
    """A loadbalancer, an autoscaler and two instances in a thread; `serve` says how instance n answers."""

    def __init__(
        self, serve: Callable[[int, web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]
    ) -> None:
        self.serve = serve
        self.asked: list[dict[str, Any]] = []  # bodies of /route
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
            site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
            await site.start()
            self.ports[n] = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
            self.runners.append(runner)

    async def _runner_cleanup(self) -> None:
        for runner in self.runners:
            await runner.cleanup()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _control(self) -> list[web.RouteDef]:
        async def route(request: web.Request) -> web.Response:
            body = await request.json()
            self.asked.append(body)
            n = next((n for n in (1, 2) if n not in body.get("avoid", [])), None)
            if n is None:
                return web.json_response({"error": "all_busy"}, status=503)
            lease = {
                **LEASE,
                "address": f"http://127.0.0.1:{self.ports[n]}",
                "instance_id": n,
                "model": "vllm-13",
            }
            return web.json_response({**lease, "request_id": f"r{len(self.asked)}"})

        async def done(request: web.Request) -> web.Response:
            self.done.append(await request.json())
            return web.json_response({})

        async def instances(request: web.Request) -> web.Response:
            return web.json_response({"instances": [{"state": "hot", "price_usd_h": 0.5}], "manage": True})

        async def status(request: web.Request) -> web.Response:
            return web.json_response({"model": "vllm-13", "demand": 0.5})

        async def costs(request: web.Request) -> web.Response:
            usd = dict.fromkeys(("total", "hot_working", "hot_idle", "loading", "stopped"), 0.1)
            counts = dict.fromkeys(("starts", "stops", "creates", "destroys"), 0)
            return web.json_response({"usd": usd, "usd_if_all_hot": 0.2, "order_to_hot_s": [], **counts})

        return [
            web.post("/route", route),
            web.post("/done", done),
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
                return await self.serve(n, request, await request.json())
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


SMALL = Config(
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


def carried_out(fakes: Fakes, **other: Any) -> dict[str, Any]:
    config = replace(SMALL, loadbalancer=fakes.url, autoscaler=fakes.url, **other)
    return asyncio.run(sim.run(config, asyncio.Event(), "fake engine"))


def test_every_request_is_served_and_its_lease_ended() -> None:
    with Fakes(well).running() as fakes:
        found = carried_out(fakes)
        arrivals = plan(SMALL)
        assert found["requests"]["completed"] == found["requests"]["sent"] == len(arrivals) == 20
        assert found["tokens"] == {
            "prompt": sum(a.prompt_tokens for a in arrivals),
            "output": sum(a.max_tokens for a in arrivals),
        }
        assert [d["outcome"] for d in fakes.done[1:]] == ["finished"] * 20, "the first asks who is there"
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
    ("status", "kind", "setbacks"), [(400, "rejected", 1), (500, "broken_off", 2), (401, "not_started", 2)]
)
def test_a_request_fails_by_the_kind_of_its_last_setback(status: int, kind: str, setbacks: int) -> None:
    async def refuses(n: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no"}}, status=status)

    with Fakes(refuses).running() as fakes:
        found = carried_out(fakes, base_num_users=1, num_iterations=1, request_timeout_s=1.0)
        assert found["requests"]["failed_by_kind"] in ({kind: 1}, {"no_capacity": 1})
        assert found["requests"]["setbacks_by_kind"][kind] >= min(setbacks, 1)


def test_an_answer_that_takes_too_long_is_a_timeout() -> None:
    async def slow(n: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    with Fakes(slow).running() as fakes:
        found = carried_out(fakes, base_num_users=1, num_iterations=1, request_timeout_s=0.5)
        assert found["requests"]["failed_by_kind"] == {"timeout": 1}


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


def test_500_streams_at_once_do_not_make_the_driver_late() -> None:
    async def slow(n: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await answer(request, body, pause_s=1.5)

    with Fakes(slow).running() as fakes:
        found = carried_out(fakes, num_iterations=5, round_s=0.4, base_num_users=100)
        assert found["requests"]["completed"] == 500
        assert fakes.most_at_once > 400
        assert found["driver"]["send_lag_s"]["p99"] < 0.25, "half a core of fakes shares this machine"


def test_a_stop_ends_the_run_with_what_there_is() -> None:
    async def slow(n: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await answer(request, body, pause_s=20.0)

    async def stopped(fakes: Fakes) -> dict[str, Any]:
        stop = asyncio.Event()
        config = replace(SMALL, loadbalancer=fakes.url, autoscaler=fakes.url)
        running = asyncio.create_task(sim.run(config, stop, "fake engine"))
        while len(fakes.served) < 5:
            await asyncio.sleep(0.01)
        stop.set()
        return await running

    with Fakes(slow).running() as fakes:
        found = asyncio.run(stopped(fakes))
        assert found["interrupted"]
        assert found["requests"]["failed_by_kind"] == {"interrupted": found["requests"]["sent"]}


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
        (["--json", "/nowhere/x.json"], "--json"),
        (["--local", "--loadbalancer", "http://127.0.0.1:1"], "goes not with --local"),
        (["--instances", "3"], "goes only with --local"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_wrong_flag_is_refused_by_name(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(flags)


def test_without_a_seed_one_is_drawn_and_shown() -> None:
    assert parse([]).seed != parse([]).seed
    assert parse(["--seed", "5"]).seed == 5


def test_a_schedule_is_numbers_with_commas() -> None:
    assert parse_schedule("1,2.5,0") == (1.0, 2.5, 0.0)


def command(*flags: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "sim.py", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_unreachable_loadbalancer_is_one_line_and_exit_2(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        process = command("--quiet", "--loadbalancer", f"http://127.0.0.1:{sock.getsockname()[1]}")
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, len(err.splitlines())) == (2, "", 1)
    assert "does not answer" in err


def test_ctrl_c_ends_with_a_report_and_exit_130(tmp_path: Path) -> None:
    async def slow(n: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await answer(request, body, pause_s=20.0)

    with Fakes(slow).running() as fakes:
        process = command(
            *(
                "--seed",
                "1",
                "--loadbalancer",
                fakes.url,
                "--autoscaler",
                fakes.url,
                "--base-num-users",
                "50",
            ),
            *("--json", str(tmp_path / "r.json")),
        )
        wait_for("requests are under way", lambda: len(fakes.served) > 3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in out
    assert "Traceback" not in err
    assert json.loads((tmp_path / "r.json").read_text())["interrupted"] is True
