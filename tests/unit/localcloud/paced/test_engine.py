"""The ASGI app: tokens when they are due, routes, clients that go, start and end."""

import asyncio
import json

import pytest

from engine.reference import SteppedModelServer
from localcloud.paced.engine import MAX_BODY, Message, PacedEngine
from localcloud.paced.served_model import ServedModel
from tests.unit.localcloud.paced.hand_clock import (
    CHAT,
    COMPLETION,
    EVEN,
    HELLO,
    HELLO_CHAT,
    Call,
    PacedWorld,
    asked,
)


def test_tokens_come_when_they_are_due_and_one_timer_serves_all() -> None:
    async def run() -> None:
        world = PacedWorld()
        body = HELLO | {"stream": True}
        calls = [world.call(COMPLETION, body) for _ in range(30)]
        await world.settle()
        assert world.clock.pending == 1
        assert all(c.status == 0 for c in calls)  # the first byte waits for the first token
        world.clock.next()
        await world.settle()
        # The first came alone; all others are read in the next step, in which it gets its second token.
        assert [len(c.pieces) for c in calls] == [1] + [0] * 29
        wakes = 1
        while world.clock.pending:
            assert world.clock.pending == 1
            world.clock.next()
            await world.settle()
            wakes += 1
        assert wakes == 4
        assert world.clock.now == pytest.approx(0.04)
        assert all(c.whole and c.events[-1] == "[DONE]" for c in calls)

    asyncio.run(run())


def test_a_late_wake_up_delivers_what_was_due_as_single_events() -> None:
    async def run() -> None:
        world = PacedWorld()
        call = world.call(COMPLETION, HELLO | {"stream": True, "max_tokens": 50})
        await world.settle()
        world.clock.now = 0.305
        world.clock.next()
        await world.settle()
        assert len(call.pieces) == 1
        assert len(call.events) == 30
        await world.finish(call)
        assert len(call.events) == 51
        assert world.clock.now == pytest.approx(0.5)

    asyncio.run(run())


def test_when_the_client_goes_its_work_is_gone_at_once() -> None:
    async def run() -> None:
        world = PacedWorld()
        calls = [
            world.call(COMPLETION, HELLO | {"max_tokens": 500, "stream": True, "n": 2}),
            world.call(CHAT, HELLO_CHAT | {"max_tokens": 500}),
        ]
        await world.settle()
        world.clock.next()
        await world.settle()
        assert world.server.running == 3
        for call in calls:
            call.hang_up()
        await world.settle()
        assert all(c.task.done() for c in calls)
        assert (world.server.running, world.server.waiting, world.server.kv_use) == (0, 0, 0.0)
        assert world.clock.pending == 0
        assert world.app.ended == {"abort": 3}

    asyncio.run(run())


def test_a_client_that_goes_before_its_body_is_there_leaves_nothing() -> None:
    async def run() -> None:
        world = PacedWorld()
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        inbox.put_nowait({"type": "http.request", "body": b'{"prompt', "more_body": True})
        inbox.put_nowait({"type": "http.disconnect"})
        scope: Message = {"type": "http", "method": "POST", "path": COMPLETION, "headers": []}

        async def never(message: Message) -> None:
            raise AssertionError(message)

        await world.app(scope, inbox.get, never)
        assert world.server.running == 0

    asyncio.run(run())


def test_the_small_routes() -> None:
    health = asked("/health", b"", "GET")
    assert (health.status, health.body) == (200, b"")
    cards = asked("/v1/models", b"", "GET").said["data"]
    assert [(c["id"], c["root"], c["max_model_len"]) for c in cards] == [
        ("vllm-13", "org/name", 1_000),
        ("org/name", "org/name", 1_000),
    ]
    assert "paced" in asked("/version", b"", "GET").said["version"]
    assert asked("/tokenize", {"prompt": "x" * 9}).said["count"] == 3
    assert asked("/tokenize", {"messages": HELLO_CHAT["messages"]}).said["count"] == 10


def test_every_name_is_served_and_answers_carry_the_first() -> None:
    assert asked(COMPLETION, HELLO | {"model": "org/name"}).said["model"] == "vllm-13"


def test_the_server_may_start_and_end() -> None:
    async def run() -> None:
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        sent = []

        async def send(message: Message) -> None:
            sent.append(message["type"])

        inbox.put_nowait({"type": "lifespan.startup"})
        inbox.put_nowait({"type": "lifespan.shutdown"})
        await PacedWorld().app({"type": "lifespan"}, inbox.get, send)
        await PacedWorld().app({"type": "websocket"}, inbox.get, send)
        assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close"]

    asyncio.run(run())


def test_an_unknown_path_is_a_404_and_a_wrong_method_a_405() -> None:
    assert asked("/v1/embeddings", {}).status == 404
    assert asked("/", b"", "GET").said == {"detail": "Not Found"}
    wrong = asked(COMPLETION, b"", "GET")
    assert (wrong.status, wrong.headers[b"allow"]) == (405, b"POST")
    assert asked("/health", {}).status == 405


def test_a_body_must_be_json_by_name_and_not_over_long() -> None:
    async def run() -> tuple[Call, Call]:
        world = PacedWorld()
        form = Call(world.app, "POST", COMPLETION, json.dumps(HELLO).encode(), None)
        long = Call(world.app, "POST", COMPLETION, b" " * (MAX_BODY + 2), "application/json")
        await world.finish(form, long)
        return form, long

    form, long = asyncio.run(run())
    assert (form.status, long.status) == (400, 413)


def test_a_context_that_the_memory_cannot_hold_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        PacedEngine(ServedModel(("m",), "m", 3_000), SteppedModelServer(EVEN))
