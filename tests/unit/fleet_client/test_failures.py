"""An instance or the loadbalancer fails: where a request goes then, and what its program is told."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest

from fleet_client import loop_side, retry, thread_transport
from tests.fake_fleet import (
    FakeFleet,
    FakeInstance,
    FakeLoadbalancer,
    Out,
    Seen,
    fake_fleet,
    make_certificate,
)
from tests.ports import free_port
from tests.unit.fleet_client.users import (
    ALL,
    SECRET,
    Make,
    break_off,
    hang_up,
    plan,
    says,
    silent,
    stall,
    told,
)
from tests.waiting import wait_for


@pytest.mark.parametrize("status", [429, 503])
def test_an_instance_without_room_sends_it_elsewhere(user: Make, fleet: FakeFleet, status: int) -> None:
    plan(fleet, says(status, **{"Retry-After": "7"}))
    assert user(fleet.url).stream() == ALL
    assert [body.get("avoid") for body in fleet.loadbalancer.routes] == [
        None,
        [fleet.loadbalancer.given[0].instance_id],
    ]
    assert told(fleet) == [("failed", f"status_{status}")]
    assert len({seen.header("authorization") for seen in fleet.requests}) == 2


def test_a_refused_token_sends_it_elsewhere(user: Make, fleet: FakeFleet) -> None:
    fleet.loadbalancer.wrong[2] = {"token": "not-a-token"}
    assert user(fleet.url).stream() == ALL
    assert told(fleet) == [("failed", "status_401")]


def test_the_last_answer_of_a_full_fleet_is_passed_on_as_it_is(user: Make, fleet: FakeFleet) -> None:
    plan(fleet, *[says(429, {"error": {"message": "slow down", "code": 7}}, **{"Retry-After": "9"})] * 4)
    one = user(fleet.url, wait_s=0.2)
    with pytest.raises(openai.RateLimitError, match="slow down") as e:
        one.chat()
    assert e.value.response.headers["retry-after"] == "9"


def test_an_instance_that_refuses_connections_is_left_for_another(user: Make, fleet: FakeFleet) -> None:
    fleet.loadbalancer.wrong[2] = {"address": f"https://127.0.0.1:{free_port()}"}
    assert user(fleet.url).stream() == ALL
    assert told(fleet) == [("failed", "no_connection")]


def test_an_instance_without_tls_is_left_for_another(user: Make, fleet: FakeFleet) -> None:
    received: list[bytes] = []

    def plain() -> None:
        connection, _ = server.accept()
        with connection:
            received.append(connection.recv(65536))
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=plain)
        thread.start()
        fleet.loadbalancer.wrong[2] = {"address": f"https://127.0.0.1:{server.getsockname()[1]}"}
        assert user(fleet.url).stream() == ALL
        thread.join(10)
    assert told(fleet) == [("failed", "no_tls")]
    assert SECRET.encode() not in received[0]


def test_an_instance_that_does_not_answer_a_connection_is_left_for_another(
    user: Make, fleet: FakeFleet
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # connects, and never says a word of TLS
        fleet.loadbalancer.wrong[2] = {"address": f"https://127.0.0.1:{mute.getsockname()[1]}"}
        assert user(fleet.url, connect_s=0.2).stream() == ALL
    assert told(fleet) == [("failed", "no_connection")]


def test_a_wrong_certificate_is_reported_and_the_prompt_goes_elsewhere(user: Make, fleet: FakeFleet) -> None:
    fleet.loadbalancer.wrong[2] = {"certificate": make_certificate()[0]}
    assert user(fleet.url).stream() == ALL
    assert told(fleet) == [("failed", "wrong_certificate")]
    assert fleet.instances[1].received == b""


def test_with_nothing_but_wrong_certificates_the_error_names_the_instance(
    user: Make, fleet: FakeFleet
) -> None:
    fleet.loadbalancer.wrong = {n: {"certificate": make_certificate()[0]} for n in (1, 2)}
    with pytest.raises(openai.APIConnectionError) as e:
        user(fleet.url, wait_s=0.2).chat()
    cause = e.value.__cause__
    assert isinstance(cause, httpx2.ConnectError)
    assert "does not have the certificate" in str(cause)
    assert "instance " in str(cause)
    assert [instance.received for instance in fleet.instances] == [b"", b""]


def test_no_prompt_leaves_in_the_clear_or_without_a_certificate(user: Make, fleet: FakeFleet) -> None:
    fleet.loadbalancer.wrong = {1: {"address": "http://192.0.2.1:80"}, 2: {"certificate": None}}
    with pytest.raises(openai.APIConnectionError) as e:
        user(fleet.url, wait_s=0.2, max_tries=2).chat()
    assert "instance" in str(e.value.__cause__)
    assert told(fleet, 2) == [("failed", "bad_address")] * 2
    assert fleet.instances[1].received == b""


def test_on_loopback_plain_http_will_do(user: Make) -> None:
    fleet = fake_fleet(1, tls=False)
    try:
        assert user(fleet.url).stream() == ALL
    finally:
        fleet.stop()


@pytest.mark.parametrize("days", [(-30, -20), (20, 30)], ids=["expired", "not-yet"])
def test_clocks_and_dates_do_not_matter(user: Make, days: tuple[int, int]) -> None:
    instance = FakeInstance(1, make_certificate(days))
    fleet = FakeFleet(FakeLoadbalancer([instance]), [instance])
    fleet.loadbalancer.clock_wrong_s = -300.0
    try:
        assert user(fleet.url, ahead=2).stream() == ALL
    finally:
        fleet.stop()


def test_after_the_first_byte_nothing_is_tried_again(user: Make, fleet: FakeFleet) -> None:
    plan(fleet, break_off)
    one = user(fleet.url)
    with pytest.raises(openai.APIConnectionError) as e:
        one.stream()
    assert isinstance(e.value.__cause__, httpx2.RemoteProtocolError)
    assert told(fleet) == [("failed", "broke_off")]
    assert len(fleet.requests) == 1


def test_a_connection_that_breaks_before_the_first_byte_is_an_error_too(user: Make, fleet: FakeFleet) -> None:
    plan(fleet, hang_up)
    with pytest.raises(openai.APIConnectionError) as e:
        user(fleet.url).chat()
    assert isinstance(e.value.__cause__, httpx2.ReadError)
    assert told(fleet) == [("failed", "broke_off")]
    assert len(fleet.requests) == 1


def test_what_is_no_http_is_an_error(user: Make, fleet: FakeFleet) -> None:
    async def nonsense(seen: Seen, out: Out) -> None:
        await out.raw(b"220 smtp.example ESMTP\r\n\r\n")

    plan(fleet, nonsense)
    with pytest.raises(openai.APIConnectionError):
        user(fleet.url).chat()
    assert told(fleet) == [("failed", "bad_answer")]


def test_a_kept_alive_connection_that_breaks_is_replaced_with_the_same_token(user: Make) -> None:
    fleet = fake_fleet(1)
    try:
        one = user(fleet.url)
        one.chat()
        fleet.instances[0].before.append(hang_up)  # its token is not taken
        assert one.chat().choices[0].message.content == ALL
        assert len(fleet.loadbalancer.routes) == 2
        first, second = (seen.header("authorization") for seen in fleet.requests[1:])
        assert first == second
        assert fleet.instances[0].connections == 2
        assert fleet.loadbalancer.dones == []
    finally:
        fleet.stop()


def test_when_the_first_copy_was_taken_the_request_is_over(user: Make, fleet: FakeFleet) -> None:
    one = user(fleet.url)
    for _ in range(2):
        one.chat()
    plan(fleet, hang_up)  # its token is taken
    with pytest.raises(openai.APIConnectionError) as e:
        one.chat()
    assert isinstance(e.value.__cause__, httpx2.ReadError)
    assert sum(instance.refused for instance in fleet.instances) == 1
    assert len(fleet.requests) == 4
    assert len(fleet.loadbalancer.routes) == 3


def test_a_connection_closed_while_it_was_idle_costs_nothing(user: Make) -> None:
    fleet = fake_fleet(1)
    instance = fleet.instances[0]

    async def answer_and_close(seen: Seen, out: Out) -> None:
        await out.answer(200, {"object": "list", "data": []})
        out.close()

    try:
        instance.plan.append(answer_and_close)
        one = user(fleet.url)
        one.models()
        wait_for("the end of the connection", lambda: all(c.transport.is_closing() for c in instance.open))
        assert one.stream() == ALL
        assert len(fleet.requests) == 2
    finally:
        fleet.stop()


def test_an_idle_connection_is_not_used_again_after_its_time(
    user: Make, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (loop_side, thread_transport):
        monkeypatch.setattr(module, "MODEL_KEEP_ALIVE_S", 0.0)
    one = user(fleet.url)
    for _ in range(4):
        one.chat()
    assert sum(instance.connections for instance in fleet.instances) == 4


def test_no_capacity_is_openais_own_503(user: Make, fleet: FakeFleet) -> None:
    fleet.loadbalancer.refusals.append((503, 40))
    with pytest.raises(openai.InternalServerError, match="every instance is busy") as e:
        user(fleet.url, wait_s=1.0).chat()
    assert e.value.status_code == 503
    assert e.value.code == "no_capacity"
    assert e.value.response.headers["retry-after"] == "40"


def test_a_lease_is_asked_for_again_until_the_wait_is_over(user: Make, fleet: FakeFleet) -> None:
    fleet.loadbalancer.refusals.extend([(503, 0), (503, 0)])
    assert user(fleet.url).stream() == ALL
    assert len(fleet.loadbalancer.routes) == 3


def test_a_silent_answer_ends_by_the_users_timeout_and_is_not_tried_again(
    user: Make, fleet: FakeFleet
) -> None:
    plan(fleet, silent)
    with pytest.raises(openai.APITimeoutError):
        user(fleet.url).chat(timeout=0.3)
    assert told(fleet) == [("failed", "read_timeout")]
    assert len(fleet.requests) == 1


def test_a_stalled_stream_ends_by_the_users_timeout(user: Make, fleet: FakeFleet) -> None:
    plan(fleet, stall)
    with pytest.raises(openai.APITimeoutError):
        user(fleet.url).stream(timeout=0.3)
    assert told(fleet) == [("failed", "read_timeout")]


def test_a_loadbalancer_that_is_not_there_is_named(user: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "UNREACHABLE_S", 0.2)
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(openai.APIConnectionError) as e:
        user(url).chat()
    assert f"loadbalancer {url}" in str(e.value.__cause__)


def test_a_loadbalancer_that_restarts_is_waited_for(user: Make, fleet: FakeFleet) -> None:
    one = user(fleet.url)
    one.chat()
    fleet.loadbalancer.stop()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(one.stream)
        second = FakeLoadbalancer(fleet.instances, port=fleet.loadbalancer.port)
        fleet.extra.append(second)
        assert answer.result(30) == ALL
