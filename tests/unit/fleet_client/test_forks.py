"""A process that forks: parent and children serve their requests, and no child ends what is its parent's."""

import asyncio
import collections
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from fleet_client import FleetTransport
from tests.fake_fleet import WORDS, Act, FakeFleet, Out, Seen
from tests.paths import ROOT
from tests.unit.fleet_client.users import ALL, Loop, Make, Threads
from tests.waiting import wait_for

STREAM = {"model": "m", "prompt": "x", "stream": True}

START = """
    import asyncio, multiprocessing, os, sys, threading
    import httpx2
    from fleet_client import AsyncFleetTransport, FleetTransport

    URL, MODE = sys.argv[1:]
    STREAM = {"model": "m", "prompt": "x", "stream": True}
    client = httpx2.Client(transport=FleetTransport(URL, ahead=4), timeout=20.0)

    def models():
        response = client.get("http://fleet/v1/models")
        assert response.status_code == 200, response.text
        assert response.extensions["fleet"]["setbacks"] == (), response.extensions

    def child():
        if MODE in ("works", "process", "uvloop"):
            for _ in range(5):
                models()
        elif MODE == "closes":
            client.close()
        elif MODE == "collects":
            globals().pop("client")
            import gc; gc.collect()

    def end_child():
        if MODE in ("process", "uvloop"):
            process = multiprocessing.get_context("fork").Process(target=child)
            process.start()
            process.join()
            assert process.exitcode == 0, process.exitcode
        else:
            pid = os.fork()
            if pid == 0:
                child()
                sys.exit(0)  # with all that Python does at the end
            assert os.waitpid(pid, 0)[1] == 0
"""

IN_THREADS = """
    begun = threading.Event()
    texts = []

    def read():
        with client.stream("POST", "http://fleet/v1/completions", json=STREAM) as response:
            for part in response.iter_text():
                texts.append(part)
                begun.set()

    models()
    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(20)
    end_child()
    models()
    client.get("http://fleet/released")
    reader.join(20)
    print("".join(texts).count('"text"'), "[DONE]" in "".join(texts))
"""

IN_A_LOOP = """
    async def main():
        async with httpx2.AsyncClient(transport=AsyncFleetTransport(URL, ahead=4), timeout=20.0) as http:
            async def models():
                response = await http.get("http://fleet/v1/models")
                assert response.status_code == 200, response.text
                assert response.extensions["fleet"]["setbacks"] == (), response.extensions

            global child
            def child():
                if MODE in ("works", "process", "uvloop"):
                    asyncio.run(models())
                elif MODE == "closes":
                    asyncio.run(http.aclose())
                elif MODE == "collects":
                    import gc; gc.collect()

            await asyncio.gather(*[models() for _ in range(5)])
            begun = asyncio.Event()
            texts = []

            async def read():
                async with http.stream("POST", "http://fleet/v1/completions", json=STREAM) as response:
                    async for part in response.aiter_text():
                        texts.append(part)
                        begun.set()

            reader = asyncio.create_task(read())
            await asyncio.wait_for(begun.wait(), 20)
            end_child()
            await asyncio.gather(*[models() for _ in range(5)])
            await http.get("http://fleet/released")
            await reader
            print("".join(texts).count('"text"'), "[DONE]" in "".join(texts))

    if MODE == "uvloop":
        import uvloop
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
    else:
        asyncio.run(main())
"""


def held(fleet: FakeFleet) -> Act:
    """Stream the first word, and the others when somebody has asked for /released."""

    async def act(seen: Seen, out: Out) -> None:
        async def event(word: str) -> None:
            await out.chunk(b"data: " + json.dumps({"choices": [{"text": word}]}).encode() + b"\n\n")

        await out.start(200, {"Content-Type": "text/event-stream"})
        await event(WORDS[0])
        while not any(one.target == "/released" for one in fleet.requests):
            if out.gone.is_set():
                return
            await asyncio.sleep(0.01)
        for word in WORDS[1:]:
            await event(word)
        await out.chunk(b"data: [DONE]\n\n")
        await out.end()

    return act


def streams_are_held(fleet: FakeFleet) -> None:
    """Whichever instance a stream comes to, it is held; other requests are answered."""
    act = held(fleet)
    for instance in fleet.instances:

        async def model(seen: Seen, out: Out, usual: Act = instance.model) -> None:
            await (act if seen.target == "/v1/completions" else usual)(seen, out)

        instance.model = model  # type: ignore[method-assign]


def run_program(fleet: FakeFleet, text: str, mode: str) -> str:
    """What a program printed, which has forks."""
    source = textwrap.dedent(START) + textwrap.dedent(text)
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", source, fleet.url, mode],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("mode", ["exits", "works", "closes", "collects", "process"])
@pytest.mark.parametrize("program", [IN_THREADS, IN_A_LOOP], ids=["threads", "asyncio"])
def test_a_child_ends_nothing_of_its_parents(fleet: FakeFleet, program: str, mode: str) -> None:
    streams_are_held(fleet)
    assert run_program(fleet, program, mode) == f"{len(WORDS)} True"
    assert sum(instance.refused for instance in fleet.instances) == 0
    assert {done["outcome"] for done in fleet.loadbalancer.dones} <= {"unused"}


def test_a_child_of_uvloops_process_ends_nothing_of_its_parents(fleet: FakeFleet) -> None:
    """One that leaves by os._exit: else uvloop itself crashes, with whatever connections (0.23.0)."""
    streams_are_held(fleet)
    assert run_program(fleet, IN_A_LOOP, "uvloop") == f"{len(WORDS)} True"


PRELOADED = """
    def serve():
        threads = [threading.Thread(target=lambda: [models() for _ in range(5)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    models()
    pids = []
    for _ in range(3):
        if (pid := os.fork()) == 0:
            serve()
            sys.exit(0)
        pids.append(pid)
    serve()
    print([os.waitpid(pid, 0)[1] for pid in pids])
    models()
"""


def test_workers_of_a_preloaded_program_have_leases_of_their_own(fleet: FakeFleet) -> None:
    """As gunicorn --preload and Celery fork them, and with leases ahead in the parent."""
    assert run_program(fleet, PRELOADED, "") == "[0, 0, 0]"
    tokens = collections.Counter(seen.header("authorization") for seen in fleet.requests)
    assert len(tokens) == 1 + 4 * 20 + 1
    assert set(tokens.values()) == {1}
    used = {token for instance in fleet.instances for token in instance.used}
    unused = {given.request_id for given in fleet.loadbalancer.given if given.token not in used}
    told = collections.Counter(done["request_id"] for done in fleet.loadbalancer.dones)
    assert dict(told) == dict.fromkeys(unused, 1)  # each lease was used or given back, by who had it


def in_fork(do: Callable[[], Any]) -> Any:
    """What that returns in a child; it ends at once, so that nothing of pytest's runs there."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = pickle.dumps(do())
        except BaseException:  # noqa: BLE001 whatever it is, the parent is to see it
            said = pickle.dumps(traceback.format_exc())
        os.write(writing, said)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return pickle.loads(said)  # noqa: S301 our own


def test_a_child_is_told_that_an_answer_is_its_parents(fleet: FakeFleet) -> None:
    streams_are_held(fleet)
    with httpx2.Client(transport=FleetTransport(fleet.url), timeout=20.0) as http:
        request = http.build_request("POST", "http://fleet/v1/completions", json=STREAM)
        response = http.send(request, stream=True)
        parts = response.iter_text()
        first = next(parts)

        def read_on() -> str:
            try:
                return "".join(parts)
            except httpx2.ReadError as e:
                response.close()
                return str(e)

        assert in_fork(read_on).endswith(
            "this process is a fork, and the answer its parent's: ask again here"
        )
        assert in_fork(response.close) is None
        http.get("http://fleet/released")
        assert (first + "".join(parts)).count('"text"') == len(WORDS)
    assert fleet.loadbalancer.dones == []


def test_a_fork_amid_the_work_of_many_threads_works_on(fleet: FakeFleet) -> None:
    """Whatever locks they held, and whatever they were in the middle of.

    Without openai, which may hold Python's lock of cached properties.
    """
    one = Threads(fleet.url, ahead=8)
    body = {"model": "m", "prompt": "x"}

    def ask() -> str:
        text: str = one.request("POST", "/v1/completions", json=body).json()["choices"][0]["text"]
        return text

    over = threading.Event()
    failures: list[Exception] = []

    def work() -> None:
        try:
            while not over.is_set():
                assert ask() == ALL
        except Exception as e:  # noqa: BLE001 the test shows it
            failures.append(e)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            assert in_fork(lambda: [ask(), ask()]) == [ALL, ALL]
    finally:
        over.set()
        for thread in threads:
            thread.join(20)
        one.close()
    assert failures == []
    assert sum(instance.refused for instance in fleet.instances) == 0


def ask_in_child(url: str) -> None:
    """A program of its own."""
    one = Threads(url)
    assert one.stream() == ALL
    one.close()


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_child_of_multiprocessing_makes_its_own(fleet: FakeFleet, how: Any) -> None:
    parent = Threads(fleet.url, ahead=4)
    assert parent.stream() == ALL
    process = multiprocessing.get_context(how).Process(target=ask_in_child, args=(fleet.url,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert parent.stream() == ALL
    parent.close()


# -- event loops that follow one another, and ends while streams run ----------------------------------


LOOPS = """
    def by_hand(what):
        loop = asyncio.new_event_loop()
        try:
            return loop.run_until_complete(what)
        finally:
            loop.close()

    transport = AsyncFleetTransport(URL, ahead=4)
    http = httpx2.AsyncClient(transport=transport, timeout=20.0)

    async def ask():
        return [(await http.get("http://fleet/v1/models")).status_code for _ in range(2)]

    async def end():
        codes = await ask()
        await http.aclose()
        return codes

    run = by_hand if MODE == "by_hand" else asyncio.run
    print(run(ask()), run(ask()), run(end()), transport.leases_ahead)
"""


@pytest.mark.parametrize("how", ["asyncio.run", "by_hand"])
def test_a_transport_serves_one_event_loop_after_another(fleet: FakeFleet, how: str) -> None:
    """by_hand: a loop that is closed with its tasks still in it."""
    assert run_program(fleet, LOOPS, how) == "[200, 200] [200, 200] [200, 200] 0"
    assert sum(instance.refused for instance in fleet.instances) == 0


FORGOTTEN = """
    import gc
    loop = asyncio.new_event_loop()

    async def ask():
        http = httpx2.AsyncClient(transport=AsyncFleetTransport(URL, ahead=4), timeout=20.0)
        async with http.stream("POST", "http://fleet/v1/completions", json=STREAM) as response:
            async for _ in response.aiter_text():
                return response.status_code

    print([loop.run_until_complete(ask()) for _ in range(3)], file=sys.stderr)
    if MODE == "closed":
        loop.close()
    del loop
    gc.collect()
"""


@pytest.mark.parametrize("how", ["closed", "left open"])
def test_a_loop_that_is_thrown_away_with_open_transports_leaves_no_traceback(
    fleet: FakeFleet, how: str
) -> None:
    """As pydantic-ai's run_sync does. That nothing was closed may be said, in a line each."""
    source = textwrap.dedent(START) + textwrap.dedent(FORGOTTEN)
    ran = subprocess.run(
        [sys.executable, "-c", source, fleet.url, how], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "[200, 200, 200]" in ran.stderr
    assert "Traceback" not in ran.stderr, ran.stderr


def test_answers_that_are_read_go_on_when_the_transport_is_closed(user: Make, fleet: FakeFleet) -> None:
    streams_are_held(fleet)
    one = user(fleet.url, ahead=2)

    def read_after_close() -> str:
        assert isinstance(one, Threads)
        with one.http.stream("POST", "http://fleet/v1/completions", json=STREAM) as response:
            parts = response.iter_text()
            first = next(parts)
            one.transport.close()
            release(fleet)
            return first + "".join(parts)

    async def aread_after_close() -> str:
        assert isinstance(one, Loop)
        async with one.http.stream("POST", "http://fleet/v1/completions", json=STREAM) as response:
            parts = response.aiter_text()
            first = await anext(parts)
            await one.transport.aclose()
            await asyncio.to_thread(release, fleet)
            return first + "".join([part async for part in parts])

    text = one.do(aread_after_close()) if isinstance(one, Loop) else read_after_close()
    assert text.count('"text"') == len(WORDS)
    assert text.endswith("data: [DONE]\n\n")
    wait_for("its connections are closed", lambda: not any(instance.open for instance in fleet.instances))
    assert {done["outcome"] for done in fleet.loadbalancer.dones} <= {"unused"}


def release(fleet: FakeFleet) -> None:
    with Releaser(fleet.url) as http:
        http.get("http://fleet/released")


class Releaser(httpx2.Client):
    """Lets streams that are held go on."""

    def __init__(self, url: str) -> None:
        super().__init__(transport=FleetTransport(url))


def test_a_request_without_an_answer_goes_on_when_the_transport_is_closed(
    user: Make, fleet: FakeFleet
) -> None:
    closed = threading.Event()
    one = user(fleet.url)

    async def late(seen: Seen, out: Out) -> None:
        while not closed.is_set():
            await asyncio.sleep(0.01)
        await out.answer(200, {"object": "list", "data": [{"id": "late", "object": "model"}]})

    for instance in fleet.instances:
        instance.plan.append(late)
    names: list[str] = []
    asking = threading.Thread(target=lambda: names.extend(one.models()))
    asking.start()
    wait_for("the request", lambda: len(fleet.requests) == 1)
    one.do(one.transport.aclose()) if isinstance(one, Loop) else one.transport.close()
    closed.set()
    asking.join(20)
    assert names == ["late"]


def test_a_keeper_that_starts_anew_has_nothing_of_the_one_before(fleet: FakeFleet) -> None:
    one = Threads(fleet.url, ahead=4)
    one.chat()
    wait_for("leases", lambda: one.transport.leases_ahead == 4)
    assert in_fork(lambda: (one.transport.leases_ahead, one.transport.untold)) == (0, 0)
    assert one.transport.leases_ahead == 4
    one.close()
