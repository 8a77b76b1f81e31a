"""Transports begin, are shared, are cancelled and end, and every lease is used or given back."""

import asyncio
import gc
import socket
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from fleet_client import AsyncFleetTransport, FleetTransport, loop_side, thread_transport
from tests.fake_fleet import FakeFleet, FakeLoadbalancer, Out, Seen
from tests.unit.fleet_client.users import ALL, Loop, Make, Threads, chat_request, plan, says, silent, told
from tests.waiting import wait_for


def test_closing_a_stream_ends_it_at_the_instance_at_once(user: Make, fleet: FakeFleet) -> None:
    for instance in fleet.instances:
        instance.pause_s = 60.0
    close = user(fleet.url).begin()
    assert sum(instance.streams for instance in fleet.instances) == 1
    close()
    wait_for("the instance sees it", lambda: sum(instance.disconnects for instance in fleet.instances) == 1)
    assert fleet.loadbalancer.dones == []


def test_a_cancelled_task_ends_its_request_at_the_instance(fleet: FakeFleet) -> None:
    one = Loop(fleet.url)
    plan(fleet, silent)

    async def cancelled() -> None:
        task = asyncio.create_task(one.openai.chat.completions.create(**chat_request()))
        while not fleet.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    one.do(cancelled())
    wait_for("the connection is gone", lambda: not any(instance.open for instance in fleet.instances))
    one.close()
    assert fleet.loadbalancer.dones == []


def test_a_task_cancelled_while_it_connects_gives_its_lease_back(fleet: FakeFleet) -> None:
    one = Loop(fleet.url)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"https://127.0.0.1:{mute.getsockname()[1]}"
        fleet.loadbalancer.wrong = {n: {"address": address} for n in (1, 2)}

        async def cancelled() -> None:
            task = asyncio.create_task(one.openai.chat.completions.create(**chat_request()))
            while not fleet.loadbalancer.given:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        one.do(cancelled())
        assert told(fleet) == [("unused", "")]
    one.close()


def test_a_close_does_not_wait_for_a_loadbalancer_that_hangs(
    user: Make, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (loop_side, thread_transport):
        monkeypatch.setattr(module, "CLOSE_S", 0.2)
    one = user(fleet.url)
    plan(fleet, says(503), says(503))

    async def hang(seen: Seen, out: Out) -> None:
        if seen.target == "/done":
            await out.gone.wait()
        await FakeLoadbalancer.act(fleet.loadbalancer, seen, out)

    monkeypatch.setattr(fleet.loadbalancer, "act", hang)
    assert one.stream() == ALL  # an end that cannot be told delays nothing
    begun = time.monotonic()
    one.close()
    assert time.monotonic() - begun < 3.0


def test_a_closed_transport_says_so(user: Make, fleet: FakeFleet) -> None:
    one = user(fleet.url)
    one.chat()
    one.close()
    if isinstance(one, Threads):
        with pytest.raises(RuntimeError, match="closed"):
            one.transport.handle_request(httpx2.Request("GET", "http://fleet/v1/models"))
    else:
        with pytest.raises(RuntimeError, match="closed"):
            asyncio.run(one.transport.handle_async_request(httpx2.Request("GET", "http://fleet/v1/models")))
    assert "closed" in repr(one.transport)


def test_many_requests_at_once_share_one_transport(user: Make, fleet: FakeFleet) -> None:
    one = user(fleet.url, ahead=8)
    assert one.streams(128) == [ALL] * 128
    one.close()
    tokens = [seen.header("authorization") for seen in fleet.requests]
    assert len(tokens) == len(set(tokens)) == 128
    assert sum(instance.refused for instance in fleet.instances) == 0
    ends = {done["request_id"] for done in fleet.loadbalancer.dones}
    used = {token for instance in fleet.instances for token in instance.used}
    unused = {given.request_id for given in fleet.loadbalancer.given if given.token not in used}
    assert ends == unused  # each lease was used or given back


def test_an_async_transport_may_be_made_outside_a_loop_but_belongs_to_one(fleet: FakeFleet) -> None:
    http = httpx2.AsyncClient(transport=AsyncFleetTransport(fleet.url))

    async def ask() -> int:
        return (await http.get("http://fleet/v1/models")).status_code

    with asyncio.Runner() as first:
        assert first.run(ask()) == 200
        with (
            ThreadPoolExecutor(1) as pool,
            pytest.raises(RuntimeError, match="belongs to another event loop"),
        ):
            pool.submit(asyncio.run, ask()).result(10)
        first.run(http.aclose())


def forgetful_threads(url: str) -> None:
    """Use a transport and drop it."""
    transport = FleetTransport(url, ahead=2)
    assert httpx2.Client(transport=transport).get("http://fleet/v1/models").status_code == 200
    wait_for("two leases", lambda: transport.leases_ahead == 2)


def forgetful_loop(url: str) -> None:
    """Use a transport and end its event loop."""

    async def main() -> None:
        transport = AsyncFleetTransport(url, ahead=2)
        http = httpx2.AsyncClient(transport=transport)
        assert (await http.get("http://fleet/v1/models")).status_code == 200
        while transport.leases_ahead < 2:
            await asyncio.sleep(0.01)

    asyncio.run(main())


@pytest.mark.parametrize("program", [forgetful_threads, forgetful_loop], ids=["threads", "asyncio"])
def test_a_program_that_forgets_to_close_gives_leases_back_all_the_same(
    fleet: FakeFleet, program: Callable[[str], None]
) -> None:
    program(fleet.url)
    assert told(fleet, 2) == [("unused", "")] * 2


def test_an_answer_that_is_forgotten_closes_its_connection(fleet: FakeFleet) -> None:
    for instance in fleet.instances:
        instance.pause_s = 60.0
    with httpx2.Client(transport=FleetTransport(fleet.url)) as http:
        request = http.build_request(
            "POST", "http://fleet/v1/completions", json={"prompt": "x", "stream": True}
        )
        response = http.send(request, stream=True)
        wait_for("a stream", lambda: sum(instance.streams for instance in fleet.instances) == 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # as it should be told
            del response
            gc.collect()
        wait_for("its end", lambda: sum(instance.disconnects for instance in fleet.instances) == 1)


def test_a_thread_that_reads_is_ended_by_another_that_closes(fleet: FakeFleet) -> None:
    for instance in fleet.instances:
        instance.pause_s = 60.0
    with httpx2.Client(transport=FleetTransport(fleet.url), timeout=30.0) as http:
        body = {"model": "m", "prompt": "x", "stream": True}
        request = http.build_request("POST", "http://fleet/v1/completions", json=body)
        response = http.send(request, stream=True)
        chunks = response.iter_raw()
        next(chunks)
        timer = threading.Timer(0.1, response.close)
        timer.start()
        with pytest.raises(httpx2.HTTPError):
            next(chunks)
        timer.join()
    assert fleet.loadbalancer.dones == []
