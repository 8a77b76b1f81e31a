"""One request: where it goes next and when it ends, without a network and without waiting."""

import ast
import json
import random
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from fleet_client.call import Call, Timeouts
from fleet_client.lease_keeper import LeaseKeeper
from fleet_client.leases import ClientLease, Refusal
from fleet_client.options import FleetOptions, OptionFields
from fleet_client.reply import HttpReply
from fleet_client.retry import AcquireLease, Rest, Send, Setback, Step, attempt
from fleet_client.token_estimate import TokenEstimate
from tests.fake_fleet import lease
from tests.paths import ROOT

SMALL = TokenEstimate(100, 50)


@dataclass(frozen=True)
class Look:
    """A look at the leases at hand for one of another instance than these."""

    avoid: tuple[int, ...]


class Script(LeaseKeeper):
    """Answers an attempt's steps, and its looks at the leases at hand, from a list; keeps what was done."""

    def __init__(
        self, *came: Any, step_s: float = 0.0, rules: OptionFields | None = None, **more: Any
    ) -> None:
        options = FleetOptions("https://lb", **(rules or {}))
        super().__init__(options, nullcontext(), lambda: None)
        self.steps: list[Step | Look] = []
        self.told: list[tuple[int, str, str]] = []
        self.call = Call("POST", "/v1/x", [], b"", SMALL, **more)
        self.now = 0.0
        self.came = list(came)
        self._step_s = step_s

    def run(
        self, ahead: ClientLease | None = None, *, stock: bool = False, nearer: bool = False
    ) -> HttpReply:
        """Serve the request. ahead: a lease at hand for it; nearer: it asks for a nearer one."""
        self._first, self._stocked = (ahead, nearer), stock or ahead is not None
        steps = attempt(self.call, self, self.now, random.Random(1))
        try:
            step = next(steps)
            while True:
                self.steps.append(step)
                if isinstance(step, Rest):
                    self.now += step.seconds
                    step = steps.send((None, self.now))
                else:
                    self.now += self._step_s
                    came = self.came.pop(0)
                    if callable(came):
                        came = came(step, self)
                    step = steps.send((came, self.now))
        except StopIteration as end:
            assert not self.came
            reply: HttpReply = end.value
            return reply

    def may_take(self, call: Call) -> bool:
        return self._stocked

    def first(self, call: Call, now: float) -> tuple[ClientLease | None, bool]:
        return self._first

    def another(self, call: Call, avoid: Collection[int], now: float) -> ClientLease | None:
        self.steps.append(Look(tuple(avoid)))
        lease: ClientLease | None = self.came.pop(0)
        return lease

    def tell(self, lease: ClientLease, outcome: str, why: str = "") -> None:
        self.told.append((lease.instance_id, outcome, why))

    @property
    def asked(self) -> list[dict[str, Any]]:
        return [step.body for step in self.steps if isinstance(step, AcquireLease)]


OK = HttpReply(200, [])
REFUSED = Setback("no_connection", httpx2.ConnectError("instance 1"), elsewhere=True)
IMPOSTOR = Setback("wrong_certificate", httpx2.ConnectError("instance 1"), elsewhere=True)
BROKE = Setback("broke_off", httpx2.ReadError("instance 1"), elsewhere=False)
STALE = Setback("broke_off", httpx2.ReadError("instance 1"), elsewhere=False, again=True)
BUSY = Refusal(503, "busy", 1.0)


def held(step: Step, script: Script) -> Refusal:
    """A loadbalancer that holds a request as long as it may and then says no."""
    assert isinstance(step, AcquireLease)
    script.now += step.hold_s
    return BUSY


def test_a_request_takes_a_lease_and_is_sent() -> None:
    script = Script(lease(1), OK)
    assert script.run() is OK
    assert script.steps == [
        AcquireLease({"prompt_tokens": 100, "max_tokens": 50, "wait_s": 30.0}, 30.0),
        Send(lease(1), again=False),
    ]
    assert script.told == []


def test_a_lease_fetched_ahead_costs_no_step() -> None:
    script = Script(OK)
    assert script.run(lease(5)) is OK
    assert script.steps == [Send(lease(5), again=False)]


@pytest.mark.parametrize("came", [REFUSED, IMPOSTOR, *(HttpReply(n, []) for n in (401, 429, 503))], ids=str)
def test_what_was_not_taken_goes_elsewhere_and_is_told(came: HttpReply | Setback) -> None:
    why = came.why if isinstance(came, Setback) else f"status_{came.status}"
    script = Script(lease(1), came, lease(2), OK)
    assert script.run() is OK
    assert [body.get("avoid") for body in script.asked] == [None, [1]]
    assert script.told == [(1, "failed", why)]
    assert script.call.setbacks == [(1, why)]


@pytest.mark.parametrize("status", [200, 204, 400, 404, 413, 422, 500, 502])
def test_every_other_answer_is_the_answer(status: int) -> None:
    reply = HttpReply(status, [])
    assert Script(lease(1), reply).run() is reply


def test_what_may_have_been_taken_is_not_sent_again() -> None:
    script = Script(lease(1), BROKE)
    with pytest.raises(httpx2.ReadError):
        script.run()
    assert script.told == [(1, "failed", "broke_off")]


@pytest.mark.parametrize("second", [HttpReply(401, []), REFUSED, BROKE, STALE, IMPOSTOR], ids=str)
def test_after_a_broken_kept_alive_connection_a_second_failure_is_the_first_one(
    second: HttpReply | Setback,
) -> None:
    script = Script(lease(1), STALE, second)
    with pytest.raises(httpx2.ReadError):
        script.run()
    assert script.steps[1:] == [Send(lease(1), again=False), Send(lease(1), again=True)]
    assert script.told == [(1, "failed", "broke_off")]


def test_after_a_broken_kept_alive_connection_the_same_token_may_still_be_served() -> None:
    script = Script(lease(1), STALE, OK)
    assert script.run() is OK
    assert script.told == []


def test_tries_are_bounded_and_the_last_answer_is_passed_on() -> None:
    full = HttpReply(429, [])
    script = Script(*[one for n in range(3) for one in (lease(n), full)], rules={"max_tries": 3})
    assert script.run() is full
    assert script.asked[2]["avoid"] == [0, 1]


def test_refused_tokens_are_not_passed_on_as_the_users_fault() -> None:
    reply = Script(lease(1), HttpReply(401, []), rules={"max_tries": 1}).run()
    assert reply.status == 503
    assert reply.body is not None
    assert b"refused its token" in reply.body


def test_waiting_for_leases_is_bounded_and_keeps_to_retry_after() -> None:
    script = Script(BUSY, Refusal(503, "busy", 4.0), held)
    reply = script.run()
    assert reply.status == 503
    assert (b"Retry-After", b"1") in reply.headers
    rests = [step.seconds for step in script.steps if isinstance(step, Rest)]
    assert len(rests) == 2
    assert 1.0 <= rests[0] <= 1.25
    assert 4.0 <= rests[1] <= 5.0
    assert script.now == pytest.approx(30.0, abs=0.01)
    assert script.call.asked_s == pytest.approx(30.0, abs=0.01)
    assert len(script.call.refusals) == 3
    assert script.asked[-1]["wait_s"] == pytest.approx(30.0 - sum(rests), abs=0.01)


def test_a_retry_after_beyond_the_wait_is_the_users_to_wait_for() -> None:
    script = Script(Refusal(503, "nothing hot", 90.0))
    reply = script.run()
    assert (reply.status, script.now) == (503, 0.0)
    assert (b"Retry-After", b"90") in reply.headers


def test_the_timeout_for_a_connection_of_the_pool_also_bounds_the_wait_for_a_lease() -> None:
    script = Script(held, timeouts=Timeouts(pool=2.0))
    assert script.run().status == 503
    assert script.asked[0]["wait_s"] == 2.0


def test_instances_to_avoid_are_forgotten_when_there_are_no_others() -> None:
    script = Script(lease(1), REFUSED, held, lease(1), OK)
    assert script.run() is OK
    assert [(body["wait_s"], body.get("avoid")) for body in script.asked] == [
        (30.0, None),
        (3.0, [1]),
        (27.0, None),
    ]


def test_an_instance_that_is_somebody_else_is_not_forgotten() -> None:
    script = Script(lease(1), IMPOSTOR, held)
    with pytest.raises(httpx2.ConnectError, match="instance 1"):
        script.run()
    assert script.asked[1] == {"prompt_tokens": 100, "max_tokens": 50, "wait_s": 30.0, "avoid": [1]}


def test_without_a_lease_for_another_try_the_last_answer_counts() -> None:
    full = HttpReply(503, [])
    script = Script(lease(1), full, Refusal(401, "no key", final=True))
    assert script.run() is full


def test_a_loadbalancer_that_is_silent_is_asked_again_for_a_while() -> None:
    silent = Refusal(0, "ConnectionRefusedError")
    script = Script(silent, silent, lease(1), OK)
    assert script.run() is OK
    assert 0.3 <= script.now <= 0.4
    script = Script(*[silent] * 11)
    with pytest.raises(
        httpx2.ConnectError, match=r"loadbalancer https://lb does not answer \(ConnectionRefused"
    ):
        script.run()
    assert 13.0 <= script.now <= 17.0


def avoided(script: Script) -> list[tuple[int, ...]]:
    """What each question and each look at the leases here was to avoid."""
    return [
        tuple(step.body.get("avoid", ())) if isinstance(step, AcquireLease) else step.avoid
        for step in script.steps
        if isinstance(step, AcquireLease | Look)
    ]


FULL = HttpReply(503, [])


def test_a_loadbalancer_that_dies_with_a_request_that_it_held_is_asked_again() -> None:
    """What it held the request for, as it was asked to, was no silence."""

    def dies(step: Step, script: Script) -> Refusal:
        script.now += 20.0
        return Refusal(0, "unreachable", 0.0)

    silence = Refusal(0, "unreachable", 0.0)
    script = Script(dies, silence, silence, lease(1), OK)
    assert script.run() is OK
    assert script.now > 20.0


def test_every_try_avoids_all_instances_that_were_tried_before() -> None:
    script = Script(lease(1), REFUSED, lease(2), FULL, lease(3), IMPOSTOR, lease(4), OK)
    assert script.run() is OK
    assert avoided(script) == [(), (1,), (1, 2), (1, 2, 3)]
    script = Script(lease(1), REFUSED, lease(2), OK, avoid=(8, 9))
    assert script.run() is OK
    assert avoided(script) == [(8, 9), (8, 9, 1)]


def test_a_lease_fetched_ahead_that_failed_is_avoided_like_any_other() -> None:
    script = Script(FULL, None, lease(2), REFUSED, lease(3), FULL, lease(4), OK)
    assert script.run(lease(1), stock=True) is OK
    assert avoided(script) == [(1,), (1,), (1, 2), (1, 2, 3)]
    assert [type(step) for step in script.steps] == [Send, Look, AcquireLease, Send, Look, Send, Look, Send]
    assert script.call.setbacks == [(1, "status_503"), (2, "no_connection"), (3, "status_503")]


def test_another_try_takes_a_lease_that_is_here_before_it_asks_for_one() -> None:
    script = Script(FULL, lease(2), OK)
    assert script.run(lease(1), stock=True) is OK
    assert script.asked == []


def test_a_request_that_finds_none_here_does_not_look_twice() -> None:
    script = Script(lease(1), OK)
    assert script.run(stock=True) is OK
    assert [type(step) for step in script.steps] == [AcquireLease, Send]


def test_where_the_prefix_lies_is_asked_for_without_waiting() -> None:
    hashes = ("0" * 16, "1" * 16)
    script = Script(lease(1), OK, affinity=hashes)
    assert script.run(stock=True, nearer=True) is OK
    assert script.asked == [{"prompt_tokens": 100, "max_tokens": 50, "affinity": list(hashes)}]
    assert next(step for step in script.steps if isinstance(step, AcquireLease)).slack_s == 1.0


@pytest.mark.parametrize(
    "said", [BUSY, Refusal(429, "too many", 9.0, code="too_many_unused"), Refusal(0, "silent")], ids=str
)
def test_when_there_is_no_room_where_it_lies_a_lease_that_is_here_is_taken(said: Refusal) -> None:
    script = Script(said, lease(5), OK, affinity=("0" * 16,))
    assert script.run(stock=True, nearer=True) is OK
    assert [type(step) for step in script.steps] == [AcquireLease, Look, Send]
    assert script.now == 0.0


def test_when_that_one_is_gone_by_then_it_asks_and_waits_like_any_other() -> None:
    script = Script(BUSY, None, lease(5), OK, affinity=("0" * 16,))
    assert script.run(stock=True, nearer=True) is OK
    assert [body.get("wait_s") for body in script.asked] == [None, 30.0]


@pytest.mark.parametrize("code", ["all_busy", "too_many_unused"])
def test_before_it_gives_up_it_looks_once_more_for_a_lease_that_is_here(code: str) -> None:
    refused = Refusal(429, "no", 90.0, code=code)
    script = Script(refused, lease(5), OK)
    assert script.run(stock=True) is OK
    assert [type(step) for step in script.steps] == [AcquireLease, Look, Send]
    assert Script(refused, None).run(stock=True).status in (429, 503)


def test_every_question_has_the_hashes_and_the_priority_of_the_request() -> None:
    script = Script(lease(1), REFUSED, BUSY, lease(2), OK, affinity=("0" * 16,), priority="low")
    assert script.run() is OK
    assert [(body["affinity"], body["priority"]) for body in script.asked] == [(["0" * 16], "low")] * 3


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
    script = Script(lease(1), OK, priority=own, rules={"priority": of_all})
    assert script.run() is OK
    assert script.asked[0].get("priority") == told


def test_a_priority_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^priority: wanted high, normal or low, got 'urgent'"):
        Script(priority="urgent")
    with pytest.raises(ValueError, match=r"^priority: wanted"):
        FleetOptions(priority="")


def test_who_has_too_many_unused_leases_is_told_so_with_the_time_to_wait() -> None:
    said = Refusal(429, "use those you have", 90.0, code="too_many_unused")
    reply = Script(said).run()
    assert reply.status == 429
    assert (b"Retry-After", b"90") in reply.headers
    assert reply.body is not None
    assert json.loads(reply.body)["error"]["code"] == "too_many_unused"


def test_too_many_unused_leases_are_waited_for_while_there_is_time() -> None:
    script = Script(Refusal(429, "use those you have", 2.0, code="too_many_unused"), lease(1), OK)
    assert script.run() is OK
    assert 2.0 <= script.now <= 2.5


def test_a_key_that_the_loadbalancer_refuses_is_the_users_to_set_right() -> None:
    reply = Script(Refusal(401, "this route needs a key", final=True)).run()
    assert reply.status == 401
    assert reply.body is not None
    said = json.loads(reply.body)["error"]
    assert said["message"] == (
        "loadbalancer https://lb wants another key than it was given, api_key= of the transport, "
        "--client-key-file of the gateway, or FLEET_CLIENT_KEY: this route needs a key"
    )
    assert said["code"] == "loadbalancer_key"
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
    script = Script(lease(1, address=address, certificate=certificate), lease(2), OK)
    assert script.run() is OK
    assert script.told == [(1, "failed", "bad_address")]
    script = Script(
        lease(1, address=address, certificate=certificate), held, rules={"wait_s": 1.0, "max_tries": 1}
    )
    script.came.pop()
    with pytest.raises(httpx2.ConnectError, match="instance 1"):
        script.run()


@pytest.mark.parametrize(
    "name",
    [
        "options",
        "token_estimate",
        "prefix_hashes",
        "leases",
        "leases_ahead",
        "lease_keeper",
        "call",
        "reply",
        "retry",
    ],
)
def test_what_decides_reads_no_clock_and_opens_nothing(name: str) -> None:
    source = (ROOT / "fleet_client" / f"{name}.py").read_text()
    used = {
        node.value.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    assert not used & {"os", "socket", "select", "threading", "asyncio", "time", "aiohttp", "httptools"}
