"""A program's traceparent goes to the loadbalancer and to the instance, and stands in our logs by its id."""

import logging
import re

import openai
import pytest

from fleet_client.trace_context import trace_id, traceparent_in
from tests.fake_fleet import FakeFleet
from tests.unit.fleet_client.users import ALL, Make

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
WRONG = [
    "",
    PARENT.upper(),
    PARENT + "-more",
    PARENT[:-1],
    f"ff-{TRACE}-00f067aa0ba902b7-01",
    f"00-{'0' * 32}-00f067aa0ba902b7-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"{PARENT}, {PARENT}",
    "the quick brown fox",
    "0" * 5000,
]


@pytest.mark.parametrize("value", WRONG)
def test_a_wrong_value_is_none(value: str) -> None:
    assert traceparent_in([(b"traceparent", value.encode())]) is None
    assert trace_id(value.encode()) == ""


def test_a_right_value_is_found_once() -> None:
    header = (b"Traceparent", PARENT.encode())
    assert traceparent_in([(b"host", b"x"), header]) == PARENT
    assert traceparent_in([header, header]) is None
    assert trace_id(PARENT.encode()) == TRACE


def test_it_reaches_the_loadbalancer_and_the_instance_as_it_came(user: Make, fleet: FakeFleet) -> None:
    assert user(fleet.url).stream(extra_headers={"traceparent": PARENT, "tracestate": "a=b"}) == ALL
    (asked,) = [s for s in fleet.loadbalancer.seen if s.target == "/route"]
    assert asked.header("traceparent") == PARENT
    (served,) = [s for i in fleet.instances for s in i.seen if s.target.startswith("/v1/")]
    assert (served.header("traceparent"), served.header("tracestate")) == (PARENT, "a=b")


@pytest.mark.parametrize("more", [{}, {"extra_headers": {"traceparent": "the quick brown fox"}}], ids=str)
def test_none_is_made_up_and_a_wrong_one_is_not_told_the_loadbalancer(
    user: Make, fleet: FakeFleet, more: dict[str, dict[str, str]]
) -> None:
    assert user(fleet.url).stream(**more) == ALL
    assert [s.header("traceparent") for s in fleet.loadbalancer.seen] == [None] * len(fleet.loadbalancer.seen)


def test_the_gateway_passes_it_on_and_logs_its_id_beside_the_requests(
    fleet: FakeFleet, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.fake_fleet import Out, Seen
    from tests.process.test_gateway import SECRET, chat, client, running

    async def break_off(seen: Seen, out: Out) -> None:
        await out.start(200)
        out.abort()

    caplog.set_level(logging.INFO)
    with running(fleet) as port, client(port) as one:
        chat(one, extra_headers={"traceparent": PARENT})
        for instance in fleet.instances:
            instance.plan.clear()
            instance.plan.append(break_off)
        with pytest.raises(openai.OpenAIError):
            for _ in chat(one, stream=True, extra_headers={"traceparent": PARENT}):
                pass
    asked = [s.header("traceparent") for s in fleet.loadbalancer.seen if s.target == "/route"]
    assert asked == [PARENT] * len(asked)
    assert len(asked) >= 2
    assert re.search(rf"POST /v1/chat/completions .*trace {TRACE}", caplog.text)
    assert SECRET not in caplog.text
