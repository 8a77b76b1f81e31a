"""The comparison with other routers measures what it says: its parts, without any router."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.children import ROOT
from bench.routers import __main__ as bench
from bench.routers import figures, processes
from bench.routers.backend import EngineConnection, engine
from bench.routers.figures import AHEAD, ASKED, DIRECT, WayRound
from bench.routers.load import (
    TOKENS,
    ClientConnection,
    Failed,
    Kept,
    Leased,
    LoadResult,
    completion,
    connect,
    flat_out,
    gives_batches,
    paced,
    post,
)
from fleet_client.flags import run_main
from process.errors import ConfigError
from remote import boot as boots
from remote.token_check import App, TokenCheck
from remote.tokens import Issuer, request_id

# -- figures -------------------------------------------------------------------------------------------


def cell(p50_ms: float, router_ms: float, engine_ms: float = 5.0, **other: Any) -> WayRound:
    same: dict[str, Any] = {
        **{"ended": 100, "cut": 0, "failed": 0, "why": "", "seconds": 4.0, "p99_ms": p50_ms + 1.0},
        **{"beside_ms": 0.0, "client_ms": 1.0, "core": 0.5},
    }
    return WayRound(p50_ms=p50_ms, router_ms=router_ms, engine_ms=engine_ms, **same | other)


def test_what_is_added_is_the_median_of_the_differences_within_rounds() -> None:
    """In the second round all were slow; the way adds 1, 2 and 3 ms, whatever the medians of both are."""
    direct = [cell(1.0, 0.0), cell(10.0, 0.0), cell(1.0, 0.0)]
    row = figures.summary("x", [cell(2.0, 3.0), cell(12.0, 5.0), cell(4.0, 4.0)], direct)
    assert (row.p50_ms, row.p50_low_ms, row.p50_high_ms) == (4.0, 2.0, 12.0)
    assert (row.added_p50_ms, row.added_p99_ms) == (2.0, 2.0)
    assert (row.cpu_ms, row.cpu_low_ms, row.cpu_high_ms) == (4.0, 3.0, 5.0)
    assert (row.rate, row.ended) == (25.0, 300)


def test_ours_is_charged_for_what_it_adds_to_the_engine_and_a_proxy_is_not() -> None:
    direct, there = cell(1.0, 0.0, engine_ms=5.0), cell(2.0, 1.0, engine_ms=5.5, beside_ms=0.25)
    assert figures.cpu_ms(AHEAD, there, direct) == 1.75
    assert figures.cpu_ms("vllm-router", there, direct) == 1.25


def test_the_verdicts_take_the_cheapest_and_the_fastest_router() -> None:
    cells = {
        DIRECT: [cell(1.0, 0.0)],
        "cheap": [cell(9.0, 2.0)],
        "fast": [cell(2.0, 9.0)],
        AHEAD: [cell(2.0, 0.4)],
        ASKED: [cell(3.6, 0.5)],
    }
    said = figures.verdicts(figures.summaries(cells))
    assert [line.split()[0] for line in said] == ["met", "met", "missed", "missed"]
    assert "at most 0.40, a fifth of cheap" in said[0]
    assert "at most 1.00, fast" in said[1]
    assert "2.60 ms added at the median, target at most 2.50, fast + 1.5" in said[3]


def test_without_a_router_there_is_no_verdict() -> None:
    assert figures.verdicts(figures.summaries({DIRECT: [cell(1.0, 0.0)], AHEAD: [cell(1.0, 0.1)]})) == []


def test_tables_and_picture_have_every_way(tmp_path: Path) -> None:
    cells = {DIRECT: [cell(1.0, 0.0)], "vllm-router": [cell(2.0, 3.0)], AHEAD: [cell(1.5, 0.2)]}
    rows = figures.summaries(cells)
    for text in (figures.table(rows), figures.rate_table(rows)):
        assert all(way in text for way in cells)
    figures.plot({"1 streams": rows, "32 streams": rows}, rows, tmp_path / "a" / "b.png")
    assert (tmp_path / "a" / "b.png").read_bytes().startswith(b"\x89PNG")


def test_everything_that_was_measured_is_shown_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    cells = {DIRECT: [cell(1.0, 0.0)], "vllm-router": [cell(2.0, 3.0)], AHEAD: [cell(1.5, 0.2)]}
    config = bench.RoutersConfig(Path("/v"), 1, (bench.Level(32, 500.0, 2),), 1.0)
    measured = bench.Found([cells], cells, {AHEAD: 0.016}, batches=True)
    bench.show(config, {"vllm-router": "0.1.17"}, measured, 0.5)
    out = capsys.readouterr().out
    for text in (
        "32 streams of 500 tokens/s",
        "vllm-router 0.1.17",
        f"{AHEAD} 1.6%",
        "met     ours",
        "in batches",
    ):
        assert text in out
    said = json.loads(json.dumps(bench.as_json(config, {}, measured, 0.5)))
    assert said["levels"][0]["cells"]["vllm-router"][0]["router_ms"] == 3.0
    assert said["requests_s"]["rows"][0]["way"] == DIRECT


def test_a_percentile_of_nothing_is_0() -> None:
    assert figures.percentile_ms([], 99.0) == 0.0
    assert figures.percentile_ms([0.001, 0.003, 0.002], 50.0) == pytest.approx(2.0)


def test_the_token_check_alone_costs_something_and_little() -> None:
    assert 0.0 < bench.check_alone_ms(requests=3, rounds=3) < 20.0


# -- the load ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def served(protocol: Callable[[], asyncio.Protocol]) -> AsyncIterator[int]:
    """The port of a server of that protocol."""
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0)


class Says(asyncio.Protocol):
    """Answers whatever comes with those pieces, each in a packet of its own; hangs up when told to."""

    def __init__(self, *pieces: bytes, hangs_up: bool = False) -> None:
        self.pieces = pieces
        self.hangs_up = hangs_up

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert isinstance(self.transport, asyncio.Transport)
        for piece in self.pieces:
            self.transport.write(piece)
        if self.hangs_up:
            self.transport.close()


def test_streams_come_to_their_end_and_the_first_of_each_is_not_counted_for_the_first_token() -> None:
    async def run() -> LoadResult:
        async with served(lambda: EngineConnection(engine)) as port:
            client = Kept([port])
            heard = await paced(client, streams=3, pace=5000.0, requests=3, limit_s=10.0)
            await client.close()
            return heard

    heard = asyncio.run(run())
    assert (heard.ended, heard.failed, heard.cut, heard.tokens) == (9, 0, 0, 9 * TOKENS)
    assert (len(heard.first_s), len(heard.beginning_s)) == (6, 3)
    assert all(0.0 < s < 1.0 for s in heard.first_s)


def test_a_stream_that_does_not_end_in_time_is_cut_and_what_came_of_it_counts() -> None:
    async def run() -> LoadResult:
        async with served(lambda: EngineConnection(engine)) as port:
            client = Kept([port])
            heard = await paced(client, streams=1, pace=100.0, requests=1, limit_s=0.2)
            await client.close()
            return heard

    heard = asyncio.run(run())
    assert (heard.ended, heard.failed, heard.cut) == (0, 0, 1)
    assert 0 < heard.tokens < TOKENS


def test_the_pace_is_kept() -> None:
    async def run() -> tuple[float, float]:
        async with served(lambda: EngineConnection(engine)) as port:
            client = Kept([port])
            sample = await client.send(0, completion(7, 21, 100.0, stream=True))
            await client.close()
            return sample.first_s, sample.whole_s

    first_s, whole_s = asyncio.run(run())
    assert whole_s - first_s >= 0.19
    assert first_s < 0.19, "the first token comes at once"


def test_requests_of_one_token_go_round_until_it_is_over() -> None:
    async def run() -> LoadResult:
        async with served(lambda: EngineConnection(engine)) as port:
            client, heard, over = Kept([port]), LoadResult(), asyncio.Event()
            load = asyncio.create_task(flat_out(client, 2, heard, over))
            await asyncio.sleep(0.1)
            over.set()
            await load
            await client.close()
            return heard

    heard = asyncio.run(run())
    assert heard.ended > 2
    assert heard.failed == 0


@pytest.mark.parametrize(
    ("stub", "why"),
    [
        (Says(b"HTTP/1.1 503 -\r\nContent-Length: 4\r\n\r\nbusy"), "status 503: b'busy'"),
        (Says(b"HTTP/1.1 200 -\r\nContent-Length: 9\r\n\r\n^", hangs_up=True), "the connection broke"),
        (Says(b"SSH-2.0-x\r\n"), "the connection broke"),
    ],
)
def test_an_answer_that_is_none_is_a_failure(stub: Says, why: str) -> None:
    async def run() -> ClientConnection:
        async with served(lambda: stub) as port:
            line = await connect(port)
            try:
                await line.ask(post("/v1/completions", b"{}"))
            finally:
                line.close()
            return line

    with pytest.raises(Failed, match=why):
        asyncio.run(run())


def test_tokens_are_counted_however_an_answer_is_cut() -> None:
    """A router may merge events, or split them; and a head that comes alone is no token."""
    head = b"HTTP/1.1 200 -\r\nTransfer-Encoding: chunked\r\n\r\n"
    pieces = (head, b"9\r\nda", b"ta: ^\n\n", b"\r\n12\r\ndata: ^\n\ndata: ^\n\n\r\n", b"0\r\n\r\n")

    async def run() -> int:
        async with served(lambda: Says(*pieces)) as port:
            line = await connect(port)
            await line.ask(post("/v1/completions", b"{}"))
            line.close()
            return line.tokens

    assert asyncio.run(run()) == 3


def test_an_engine_answers_404_where_it_has_no_route() -> None:
    """One that streamed there would be waited for: vllm-router asks for more than completions."""

    async def run(path: str) -> bytes:
        async with served(lambda: EngineConnection(engine)) as port:
            line = await connect(port)
            try:
                await line.ask(post(path, completion(1, 256, 1.0, stream=True)))
            finally:
                line.close()
            return line.body

    assert len(json.loads(asyncio.run(run("/v1/completions/render")))[0]["token_ids"]) > 200
    with pytest.raises(Failed, match="status 404"):
        asyncio.run(run("/tokenize"))


# -- our way -------------------------------------------------------------------------------------------


class Leases:
    """A loadbalancer of one instance as an ASGI app; notes what it is asked."""

    def __init__(self, tokens: Sequence[str], *, batches: bool) -> None:
        self._tokens = list(tokens)
        self._batches = batches
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        said = json.loads((await receive())["body"])
        self.asked.append((scope["path"], said))
        status, answer = 200, {}
        if scope["path"] == "/route" and "count" not in said:
            answer = self._lease()
        elif scope["path"] == "/route" and self._batches:
            answer = {"leases": [self._lease() for _ in range(said["count"])], "certificates": {}}
        elif scope["path"] == "/route":
            status = 400
        body = json.dumps(answer).encode()
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _lease(self) -> dict[str, Any]:
        token = self._tokens.pop()
        where = {"address": "http://127.0.0.1:1", "instance_id": 4, "expires_in_s": 60.0}
        return {**where, "token": token, "request_id": request_id(token)}


@pytest.mark.parametrize(("ahead", "batches"), [(0, False), (4, False), (4, True)])
def test_ours_takes_a_lease_for_each_request_and_gives_back_what_it_did_not_use(
    tmp_path: Path, ahead: int, batches: bool
) -> None:
    """The token check is the real one, so each lease was used once, on a new connection."""
    boot = boots.begin(str(tmp_path))
    issuer = Issuer(boot, time.monotonic())
    leases = Leases(issuer.issue(100, time.monotonic()), batches=batches)
    checked: App = TokenCheck(engine, boot)

    async def run() -> LoadResult:
        connections = []

        def connection() -> EngineConnection:
            connections.append(EngineConnection(checked))
            return connections[-1]

        async with (
            served(lambda: EngineConnection(leases)) as loadbalancer,
            served(connection) as port,
        ):
            client = Leased(loadbalancer, {4: port}, None, ahead, batches=batches)
            heard = await paced(client, streams=2, pace=5000.0, requests=3, limit_s=10.0)
            await client.close()
            assert len(connections) == 6
            return heard

    heard = asyncio.run(run())
    assert (heard.ended, heard.failed, heard.why) == (6, 0, "")
    routes = [said for path, said in leases.asked if path == "/route"]
    given = sum(said.get("count", 1) for said in routes)
    back = [said for path, said in leases.asked if path == "/done"]
    assert given - len(back) == 6
    assert all(said["outcome"] == "unused" for said in back)
    assert any("count" in said for said in routes) == batches
    assert issuer.outstanding(time.monotonic()) == 100 - 6


@pytest.mark.parametrize("batches", [True, False])
def test_whether_a_loadbalancer_gives_batches_is_found_out_by_asking(batches: bool) -> None:
    async def run() -> bool:
        async with served(lambda: EngineConnection(Leases(["t"], batches=batches))) as port:
            return await gives_batches(port)

    assert asyncio.run(run()) == batches


# -- routers and flags ---------------------------------------------------------------------------------


def test_a_router_is_started_with_its_default_policy_unless_another_is_asked_for(tmp_path: Path) -> None:
    for router in processes.ROUTERS:
        command = router.command(Path("/v"), 7, [8, 9], tmp_path)
        assert command[0] == f"/v/bin/{router.program}"
        assert ("--policy" in command) == (router.policy is not None)
    models = json.loads((tmp_path / "litellm.yaml").read_text())["model_list"]
    assert [m["litellm_params"]["api_base"] for m in models] == [
        "http://127.0.0.1:8/v1",
        "http://127.0.0.1:9/v1",
    ]


def test_versions_are_those_that_are_installed(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    packages = tmp_path / "lib/python3.11/site-packages"
    for name, program in (("vllm_router-0.1.17", "vllm-router"), ("sglang_router-0.3.2", "sglang-router")):
        (packages / f"{name}.dist-info").mkdir(parents=True)
        (tmp_path / "bin" / program).touch()
    with pytest.raises(ConfigError, match="litellm is not in"):
        processes.versions(tmp_path)
    (packages / "litellm-1.2.3.dist-info").mkdir()
    (packages / "litellm_enterprise-0.1.dist-info").mkdir()
    (tmp_path / "bin" / "litellm").touch()
    assert processes.versions(tmp_path) == {
        "vllm-router": "0.1.17",
        "sglang-router": "0.3.2",
        "litellm": "1.2.3",
    }


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--venv", "/nowhere"], "vllm-router is not in /nowhere: make .venv-routers/.ready installs it"),
        (["--rounds", "0"], "--rounds 0: wanted 1 to 100"),
        (["--ways", "nginx"], "--ways: nginx is none of"),
        (["--warp"], "unrecognized arguments: --warp"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run_main(lambda: bench.main(argv))
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_the_routers_have_versions_in_the_requirements() -> None:
    lines = (ROOT / "requirements-routers.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].partition("[")[0] for line in lines if "==" in line}
    assert pinned == {router.package for router in processes.ROUTERS}


def test_engines_say_their_ports_and_end_when_asked(tmp_path: Path) -> None:
    """A whole instance as in the comparison: a token of its auth_server opens the checked port, once."""
    with processes.engine(3, tmp_path) as it:
        assert set(it.ports) == {"plain", "checked", "tls"}
        assert processes.answers(it.ports["plain"])
        assert not processes.answers(it.ports["checked"]), "without a token"
        assert it.told["id"] == 3
    for pid in it.pids:
        assert not Path(f"/proc/{pid}").exists()
