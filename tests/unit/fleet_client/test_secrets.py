"""Nothing that a transport sends or says shows a token, a key or a prompt where it must not."""

import logging
import traceback
from contextlib import suppress

import openai
import pytest

from tests.fake_fleet import Act, FakeFleet, FakeServer, make_certificate
from tests.unit.fleet_client.users import ALL, SECRET, Make, break_off, hang_up, plan, says, silent, stall


def test_no_proxy_of_the_environment_sees_anything(
    user: Make, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = FakeServer()
    fleet.extra.append(proxy)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.address)
        monkeypatch.setenv(name.lower(), proxy.address)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    plan(fleet, says(503))
    assert user(fleet.url, ahead=2).stream() == ALL
    assert proxy.connections == 0


@pytest.mark.parametrize(
    "acts",
    [[hang_up], [break_off], [stall], [says(401)], [says(429)] * 4, [says(500)], [silent]],
    ids=["hang-up", "break-off", "stall", "401", "429", "500", "silent"],
)
def test_a_token_is_never_in_a_message_or_a_log(
    user: Make, fleet: FakeFleet, acts: list[Act], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("openai").setLevel(logging.INFO)  # its debug log has the prompt, which is its user's
    plan(fleet, *acts)
    one = user(fleet.url, ahead=2, wait_s=0.3, api_key="a-client-key")
    texts = [repr(one.transport), str(one.transport)]
    with suppress(openai.OpenAIError):
        one.stream(timeout=0.3)
    fleet.loadbalancer.wrong = {n: {"certificate": make_certificate()[0]} for n in (1, 2)}
    try:
        one.stream(timeout=0.3)
    except openai.OpenAIError as e:
        texts += traceback.format_exception(e)
        seen: BaseException | None = e
        while seen is not None:
            texts += [str(seen), repr(seen), repr(seen.__dict__)]
            seen = seen.__cause__ or seen.__context__
    one.close()
    texts += [record.getMessage() for record in caplog.records]
    secrets = [given.token for given in fleet.loadbalancer.given]
    assert len(secrets) >= 2
    for secret in (*secrets, "a-client-key", SECRET):
        assert not any(secret in text for text in texts)
