"""One request: where it goes next and when it ends, without a network and without waiting."""

import ast
import json
import random
from typing import Any

import httpx2
import pytest

from fleet_client.call import Call, Timeouts
from fleet_client.leases import Lease, Refusal
from fleet_client.retry import Ask, Reply, Rest, Rules, Send, Setback, Step, Take, course
from fleet_client.token_estimate import Size
from tests.fake_fleet import lease
from tests.paths import ROOT

SMALL = Size(100, 50)


class World:
    """Answers the steps of a course from a list, and keeps what was done."""

    def __init__(self, *came: Any, step_s: float = 0.0, rules: Rules | None = None, **more: Any) -> None:
        self.steps: list[Step] = []
        self.told: list[tuple[int, str, str]] = []
        self.call = Call("POST", "/v1/x", [], b"", SMALL, **more)
        self.now = 0.0
        self._came = list(came)
        self._step_s = step_s
        self._rules = rules or Rules()

    def run(self, ahead: Lease | None = None, **more: bool) -> Reply:
        steps = course(
            self.call, self._rules, "http://lb", ahead, self.tell, self.now, random.Random(1), **more
        )
        try:
            step = next(steps)
            while True:
                self.steps.append(step)
                if isinstance(step, Rest):
                    self.now += step.seconds
                    step = steps.send((None, self.now))
                else:
                    self.now += self._step_s
                    came = self._came.pop(0)
                    if callable(came):
                        came = came(step, self)
                    step = steps.send((came, self.now))
        except StopIteration as end:
            assert not self._came
            reply: Reply = end.value
            return reply

    def tell(self, one: Lease, outcome: str, why: str) -> None:
        self.told.append((one.instance_id, outcome, why))

    @property
    def asked(self) -> list[dict[str, Any]]:
        return [step.body for step in self.steps if isinstance(step, Ask)]


OK = Reply(200, b"OK", [])
REFUSED = Setback("no_connection", httpx2.ConnectError("instance 1"), elsewhere=True)
STRANGER = Setback("wrong_certificate", httpx2.ConnectError("instance 1"), elsewhere=True)
BROKE = Setback("broke_off", httpx2.ReadError("instance 1"), elsewhere=False)
STALE = Setback("broke_off", httpx2.ReadError("instance 1"), elsewhere=False, again=True)
BUSY = Refusal(503, "busy", 1.0)


def held(step: Step, world: World) -> Refusal:
    """A loadbalancer that holds a request as long as it may and then says no."""
    assert isinstance(step, Ask)
    world.now += step.hold_s
    return BUSY


def test_a_request_takes_a_lease_and_is_sent() -> None:
    world = World(lease(1), OK)
    assert world.run() is OK
    assert world.steps == [
        Ask({"prompt_tokens": 100, "max_tokens": 50, "wait_s": 30.0}, 30.0),
        Send(lease(1), again=False),
    ]
    assert world.told == []


def test_a_lease_fetched_ahead_costs_no_step() -> None:
    world = World(OK)
    assert world.run(lease(5)) is OK
    assert world.steps == [Send(lease(5), again=False)]


@pytest.mark.parametrize("came", [REFUSED, STRANGER, *(Reply(n, b"", []) for n in (401, 429, 503))], ids=str)
def test_what_was_not_taken_goes_elsewhere_and_is_told(came: Reply | Setback) -> None:
    why = came.why if isinstance(came, Setback) else f"status_{came.status}"
    world = World(lease(1), came, lease(2), OK)
    assert world.run() is OK
    assert [body.get("avoid") for body in world.asked] == [None, [1]]
    assert world.told == [(1, "failed", why)]
    assert world.call.setbacks == [(1, why)]


@pytest.mark.parametrize("status", [200, 204, 400, 404, 413, 422, 500, 502])
def test_every_other_answer_is_the_answer(status: int) -> None:
    reply = Reply(status, b"", [])
    assert World(lease(1), reply).run() is reply


def test_what_may_have_been_taken_is_not_sent_again() -> None:
    world = World(lease(1), BROKE)
    with pytest.raises(httpx2.ReadError):
        world.run()
    assert world.told == [(1, "failed", "broke_off")]


@pytest.mark.parametrize("second", [Reply(401, b"", []), REFUSED, BROKE, STALE, STRANGER], ids=str)
def test_after_a_broken_kept_alive_connection_a_second_failure_is_the_first_one(
    second: Reply | Setback,
) -> None:
    world = World(lease(1), STALE, second)
    with pytest.raises(httpx2.ReadError):
        world.run()
    assert world.steps[1:] == [Send(lease(1), again=False), Send(lease(1), again=True)]
    assert world.told == [(1, "failed", "broke_off")]


def test_after_a_broken_kept_alive_connection_the_same_token_may_still_be_served() -> None:
    world = World(lease(1), STALE, OK)
    assert world.run() is OK
    assert world.told == []


def test_tries_are_bounded_and_the_last_answer_is_passed_on() -> None:
    full = Reply(429, b"", [])
    world = World(*[one for n in range(3) for one in (lease(n), full)], rules=Rules(max_tries=3))
    assert world.run() is full
    assert world.asked[2]["avoid"] == [0, 1]


def test_refused_tokens_are_not_passed_on_as_the_users_fault() -> None:
    reply = World(lease(1), Reply(401, b"", []), rules=Rules(max_tries=1)).run()
    assert reply.status == 503
    assert reply.body is not None
    assert b"refused its token" in reply.body


def test_waiting_for_leases_is_bounded_and_keeps_to_retry_after() -> None:
    world = World(BUSY, Refusal(503, "busy", 4.0), held)
    reply = world.run()
    assert reply.status == 503
    assert (b"Retry-After", b"1") in reply.headers
    rests = [step.seconds for step in world.steps if isinstance(step, Rest)]
    assert len(rests) == 2
    assert 1.0 <= rests[0] <= 1.25
    assert 4.0 <= rests[1] <= 5.0
    assert world.now == pytest.approx(30.0, abs=0.01)
    assert world.call.asked_s == pytest.approx(30.0, abs=0.01)
    assert len(world.call.refusals) == 3
    assert world.asked[-1]["wait_s"] == pytest.approx(30.0 - sum(rests), abs=0.01)


def test_a_retry_after_beyond_the_wait_is_the_users_to_wait_for() -> None:
    world = World(Refusal(503, "nothing hot", 90.0))
    reply = world.run()
    assert (reply.status, world.now) == (503, 0.0)
    assert (b"Retry-After", b"90") in reply.headers


def test_the_timeout_for_a_connection_of_the_pool_also_bounds_the_wait_for_a_lease() -> None:
    world = World(held, timeouts=Timeouts(pool=2.0))
    assert world.run().status == 503
    assert world.asked[0]["wait_s"] == 2.0


def test_instances_to_avoid_are_forgotten_when_there_are_no_others() -> None:
    world = World(lease(1), REFUSED, held, lease(1), OK)
    assert world.run() is OK
    assert [(body["wait_s"], body.get("avoid")) for body in world.asked] == [
        (30.0, None),
        (3.0, [1]),
        (27.0, None),
    ]


def test_an_instance_that_is_somebody_else_is_not_forgotten() -> None:
    world = World(lease(1), STRANGER, held)
    with pytest.raises(httpx2.ConnectError, match="instance 1"):
        world.run()
    assert world.asked[1] == {"prompt_tokens": 100, "max_tokens": 50, "wait_s": 30.0, "avoid": [1]}


def test_without_a_lease_for_another_try_the_last_answer_counts() -> None:
    full = Reply(503, b"", [])
    world = World(lease(1), full, Refusal(401, "no key", final=True))
    assert world.run() is full


def test_a_loadbalancer_that_is_silent_is_asked_again_for_a_while() -> None:
    silent = Refusal(0, "ConnectionRefusedError")
    world = World(silent, silent, lease(1), OK)
    assert world.run() is OK
    assert 0.3 <= world.now <= 0.4
    world = World(*[silent] * 6)
    with pytest.raises(httpx2.ConnectError, match="loadbalancer http://lb: ConnectionRefused"):
        world.run()
    assert 3.0 <= world.now <= 7.0


def avoided(world: World) -> list[tuple[int, ...]]:
    """What each question and each look at the leases here was to avoid."""
    return [
        tuple(step.body.get("avoid", ())) if isinstance(step, Ask) else step.avoid
        for step in world.steps
        if isinstance(step, Ask | Take)
    ]


FULL = Reply(503, b"", [])


def test_every_try_avoids_all_instances_that_were_tried_before() -> None:
    world = World(lease(1), REFUSED, lease(2), FULL, lease(3), STRANGER, lease(4), OK)
    assert world.run() is OK
    assert avoided(world) == [(), (1,), (1, 2), (1, 2, 3)]
    world = World(lease(1), REFUSED, lease(2), OK, avoid=(8, 9))
    assert world.run() is OK
    assert avoided(world) == [(8, 9), (8, 9, 1)]


def test_a_lease_fetched_ahead_that_failed_is_avoided_like_any_other() -> None:
    world = World(FULL, None, lease(2), REFUSED, lease(3), FULL, lease(4), OK)
    assert world.run(lease(1), stock=True) is OK
    assert avoided(world) == [(1,), (1,), (1, 2), (1, 2, 3)]
    assert [type(step) for step in world.steps] == [Send, Take, Ask, Send, Take, Send, Take, Send]
    assert world.call.setbacks == [(1, "status_503"), (2, "no_connection"), (3, "status_503")]


def test_another_try_takes_a_lease_that_is_here_before_it_asks_for_one() -> None:
    world = World(FULL, lease(2), OK)
    assert world.run(lease(1), stock=True) is OK
    assert world.asked == []


def test_a_request_that_finds_none_here_does_not_look_twice() -> None:
    world = World(lease(1), OK)
    assert world.run(stock=True) is OK
    assert [type(step) for step in world.steps] == [Ask, Send]


def test_where_the_prefix_lies_is_asked_for_without_waiting() -> None:
    hashes = ("0" * 16, "1" * 16)
    world = World(lease(1), OK, affinity=hashes)
    assert world.run(stock=True, nearer=True) is OK
    assert world.asked == [{"prompt_tokens": 100, "max_tokens": 50, "affinity": list(hashes)}]
    assert next(step for step in world.steps if isinstance(step, Ask)).slack_s == 1.0


@pytest.mark.parametrize(
    "said", [BUSY, Refusal(429, "too many", 9.0, code="too_many_unused"), Refusal(0, "silent")], ids=str
)
def test_when_there_is_no_room_where_it_lies_a_lease_that_is_here_is_taken(said: Refusal) -> None:
    world = World(said, lease(5), OK, affinity=("0" * 16,))
    assert world.run(stock=True, nearer=True) is OK
    assert [type(step) for step in world.steps] == [Ask, Take, Send]
    assert world.now == 0.0


def test_when_that_one_is_gone_by_then_it_asks_and_waits_like_any_other() -> None:
    world = World(BUSY, None, lease(5), OK, affinity=("0" * 16,))
    assert world.run(stock=True, nearer=True) is OK
    assert [body.get("wait_s") for body in world.asked] == [None, 30.0]


@pytest.mark.parametrize("code", ["all_busy", "too_many_unused"])
def test_before_it_gives_up_it_looks_once_more_for_a_lease_that_is_here(code: str) -> None:
    refused = Refusal(429, "no", 90.0, code=code)
    world = World(refused, lease(5), OK)
    assert world.run(stock=True) is OK
    assert [type(step) for step in world.steps] == [Ask, Take, Send]
    assert World(refused, None).run(stock=True).status in (429, 503)


def test_every_question_has_the_hashes_and_the_priority_of_the_request() -> None:
    world = World(lease(1), REFUSED, BUSY, lease(2), OK, affinity=("0" * 16,), priority="low")
    assert world.run() is OK
    assert [(body["affinity"], body["priority"]) for body in world.asked] == [(["0" * 16], "low")] * 3


@pytest.mark.parametrize(
    ("own", "of_all", "told"),
    [
        (None, "normal", None),
        (None, "low", "low"),
        ("high", "low", "high"),
        ("normal", "low", None),  # the default
    ],
)
def test_a_request_has_the_priority_of_the_transport_unless_it_says_another(
    own: str | None, of_all: str, told: str | None
) -> None:
    world = World(lease(1), OK, priority=own, rules=Rules(priority=of_all))
    assert world.run() is OK
    assert world.asked[0].get("priority") == told


def test_a_priority_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^priority: wanted high, normal or low, got 'urgent'"):
        World(priority="urgent")
    with pytest.raises(ValueError, match=r"^priority: wanted"):
        Rules(priority="").checked()


def test_who_has_too_many_unused_leases_is_told_so_with_the_time_to_wait() -> None:
    said = Refusal(429, "use those you have", 90.0, code="too_many_unused")
    reply = World(said).run()
    assert reply.status == 429
    assert (b"Retry-After", b"90") in reply.headers
    assert reply.body is not None
    assert json.loads(reply.body)["error"]["code"] == "too_many_unused"


def test_too_many_unused_leases_are_waited_for_while_there_is_time() -> None:
    world = World(Refusal(429, "use those you have", 2.0, code="too_many_unused"), lease(1), OK)
    assert world.run() is OK
    assert 2.0 <= world.now <= 2.5


def test_a_key_that_the_loadbalancer_refuses_is_the_users_to_set_right() -> None:
    reply = World(Refusal(401, "this route needs a key", final=True)).run()
    assert reply.status == 401
    assert reply.body is not None
    said = json.loads(reply.body)["error"]
    assert said["message"] == "loadbalancer http://lb: this route needs a key"
    assert said["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("address", "certificate"),
    [
        ("http://8.8.8.8:80", None),
        ("http://8.8.8.8:80", "PEM"),
        ("https://8.8.8.8:443", None),
        ("https://8.8.8.8:443", "no certificate"),
        ("http://127.0.0.1:80/path", None),
        ("http://user@127.0.0.1:80", None),
        ("http://127.0.0.1:80?x", None),
        ("ftp://127.0.0.1:80", None),
        ("127.0.0.1:80", None),
        ("http://127.0.0.1.evil.example:80", None),
    ],
)
def test_an_address_that_prompts_must_not_go_to_is_never_sent_to(
    address: str, certificate: str | None
) -> None:
    world = World(lease(1, address=address, certificate=certificate), lease(2), OK)
    assert world.run() is OK
    assert world.told == [(1, "failed", "bad_address")]
    world = World(
        lease(1, address=address, certificate=certificate), held, rules=Rules(wait_s=1.0, max_tries=1)
    )
    world._came.pop()
    with pytest.raises(httpx2.ConnectError, match="instance 1"):
        world.run()


@pytest.mark.parametrize("name", ["token_estimate", "prefix_hashes", "leases", "call", "retry"])
def test_what_decides_reads_no_clock_and_opens_nothing(name: str) -> None:
    source = (ROOT / "fleet_client" / f"{name}.py").read_text()
    used = {
        node.value.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    assert not used & {"os", "socket", "select", "threading", "asyncio", "time", "aiohttp", "httptools"}
