"""What a client tells of how fast answers came: seconds and pieces, of some answers, now and then."""

import asyncio
import json
from typing import Any

import pytest

from fleet_client import answer_pace
from fleet_client.answer_pace import MOST_TOLD, NOT_AGAIN_S, TELL_EVERY_S, AnswerPace
from fleet_client.leases import Refusal
from tests.fake_fleet import FakeFleet, Out, Seen, lease
from tests.unit.fleet_client.test_lease_keeper import TOLD, Woken
from tests.unit.fleet_client.users import ALL, Make, plan
from tests.waiting import wait_for


def test_only_the_time_that_is_waited_for_the_instance_counts() -> None:
    """A program that takes its time between two parts does not make the instance slow."""
    pace = AnswerPace(0.5)
    for asked, came in ((1.0, 1.5), (11.5, 11.75), (100.0, 100.25)):
        pace.ask(asked)
        pace.came(b"event: x\ndata: {}\n\n", came)
    assert pace.end(200.0)
    assert (pace.first_s, pace.rest_s, pace.pieces) == (1.0, 0.5, 3)


def test_what_is_waited_for_in_vain_counts_and_what_is_not_waited_for_does_not() -> None:
    assert not AnswerPace(0.5).end(9.0)
    pace = AnswerPace(0.5)
    pace.ask(1.0)
    assert pace.end(61.0)
    assert pace.told("r1") == {"request_id": "r1", "first_s": 60.5, "rest_s": 0.0, "pieces": 0}


def ended(first_s: float = 0.5) -> AnswerPace:
    return AnswerPace(first_s, begun=True)


def test_answers_are_told_together_and_no_more_than_a_message_holds() -> None:
    keeper = Woken()
    for n in range(3 * MOST_TOLD):
        keeper.note_pace(lease(n), ended(), 10.0)
    assert keeper.woken == 1
    assert keeper.next_job(10.0 + TELL_EVERY_S - 0.1) is None
    assert keeper.look_in_s(10.5) == pytest.approx(TELL_EVERY_S - 0.5)
    job = keeper.next_job(10.0 + TELL_EVERY_S)
    assert job is not None
    assert job.path == "/pace"
    assert [one["request_id"] for one in job.body["answers"]] == [f"r{n}" for n in range(MOST_TOLD)]
    keeper.finish_job(job, TOLD, 12.1)
    assert (keeper.next_job(99.0), keeper.look_in_s(99.0), keeper.untold) == (None, None, 0)


def test_an_older_loadbalancer_is_left_alone_for_a_while() -> None:
    keeper = Woken()
    keeper.note_pace(lease(1), ended(), 0.0)
    job = keeper.next_job(TELL_EVERY_S)
    assert job is not None
    keeper.finish_job(job, (404, b"{}", None), 3.0)
    keeper.note_pace(lease(2), ended(), 4.0)
    assert keeper.next_job(NOT_AGAIN_S) is None
    assert keeper.next_job(NOT_AGAIN_S + 3.0) is not None


def test_a_loadbalancer_that_is_away_misses_what_it_was_to_be_told() -> None:
    keeper = Woken()
    keeper.note_pace(lease(1), ended(), 0.0)
    job = keeper.next_job(TELL_EVERY_S)
    assert job is not None
    keeper.finish_job(job, Refusal(0, "away"), 3.0)
    assert (keeper.next_job(9.0), keeper.untold) == (None, 0)


def test_at_the_end_nothing_more_is_told() -> None:
    keeper = Woken()
    keeper.note_pace(lease(1), ended(), 0.0)
    keeper.give_all_back()
    assert (keeper.next_job(9.0), keeper.look_in_s(0.0)) == (None, None)


@pytest.fixture
def told_soon(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> FakeFleet:
    monkeypatch.setattr(answer_pace, "TELL_EVERY_S", 0.05)
    return fleet


def told(fleet: FakeFleet) -> list[dict[str, Any]]:
    """What the loadbalancer was told, once it was."""
    return wait_for("a message", lambda: fleet.loadbalancer.paces)


def test_a_stream_is_told_with_its_first_part_its_rest_and_its_pieces(
    user: Make, told_soon: FakeFleet
) -> None:
    async def slow(seen: Seen, out: Out) -> None:
        await out.start(200, {"Content-Type": "text/event-stream"})
        await asyncio.sleep(0.3)
        for word in ("one", " two", " three", " four", " five"):
            event = {"id": "r", "object": "text_completion", "created": 1, "model": "m"}
            event |= {"choices": [{"index": 0, "finish_reason": None, "delta": {"content": word}}]}
            await out.chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
            await asyncio.sleep(0.1)
        await out.chunk(b"data: [DONE]\n\n")
        await out.end()

    plan(told_soon, slow)
    assert user(told_soon.url).stream() == ALL
    (one,) = told(told_soon)
    assert one["request_id"] == told_soon.loadbalancer.given[0].request_id
    assert (0.3 <= one["first_s"] < 3.0, 0.39 <= one["rest_s"] < 3.0, one["pieces"]) == (True, True, 5)


def test_an_answer_in_one_piece_is_told_without_pieces(user: Make, told_soon: FakeFleet) -> None:
    assert user(told_soon.url).chat(max_tokens=5).choices[0].message.content == ALL
    (one,) = told(told_soon)
    assert (one["pieces"], 0.0 <= one["first_s"] < 3.0) == (0, True)


def test_an_answer_of_an_error_is_not_told(user: Make, told_soon: FakeFleet) -> None:
    async def refuses(seen: Seen, out: Out) -> None:
        await out.answer(400, {"error": {"message": "no", "code": "bad"}})

    plan(told_soon, refuses)
    with pytest.raises(Exception, match="no"):
        user(told_soon.url).chat(max_tokens=5)
    user(told_soon.url).chat(max_tokens=5)
    (one,) = told(told_soon)
    assert one["request_id"] == told_soon.loadbalancer.given[1].request_id
