"""Nothing that a program gets from the fleet leads it to an instance: there it would go without a lease."""

import errno
import traceback
from collections.abc import Callable

import httpx2
import openai
import pytest

from fleet_client.call import returned
from fleet_client.instance_names import error_without_address
from tests.fake_fleet import FakeFleet, Out, Seen, make_certificate
from tests.ports import free_port
from tests.unit.fleet_client.users import Make, break_off, hang_up, plan, says, stall

HERE = "https://203.0.113.7:41234"


def port_of(address: str) -> str:
    """That of an address; no other text of a test has these digits."""
    return address.rpartition(":")[2]


@pytest.mark.parametrize(
    ("location", "kept"),
    [
        ("https://203.0.113.7:41234/v1/models?a=b", "/v1/models?a=b"),
        ("http://203.0.113.7/v1/models", "/v1/models"),
        ("//203.0.113.7:41234/v1/models", "/v1/models"),
        ("https://203.0.113.7:41234", "/"),
        ("https://203.0.113.7:41234?a=b", "/?a=b"),
        ("https://evil.example/v1/models", "/v1/models"),
        ("HTTPS://user@evil.example/v1/models", "/v1/models"),
        ("/v1/models", "/v1/models"),
        ("models", "models"),
        ("?a=http://evil.example/", "?a=http://evil.example/"),
        ("https://evil.example//other.example/", None),
        ("https:///evil.example/", "/evil.example/"),
        ("/\\evil.example/", "/"),
        ("\\\\evil.example/v1", "/v1"),
        ("/\t/evil.example/", None),
        ("javascript:alert(1)", None),
        ("/see/203.0.113.7", None),
    ],
)
@pytest.mark.parametrize("name", [b"Location", b"content-location"])
def test_a_redirect_leads_to_a_path_of_the_fleet(name: bytes, location: str, kept: str | None) -> None:
    others = [(b"Server", b"uvicorn"), (b"X-Mine", b"1")]
    wanted = [] if kept is None else [(name, kept.encode())]
    assert returned([*others, (name, location.encode())], HERE) == others + wanted


@pytest.mark.parametrize(
    ("header", "kept"),
    [
        ((b"Link", b'<https://203.0.113.7:41234/v1/models?2>; rel="next"'), b'</v1/models?2>; rel="next"'),
        ((b"Link", b'</v1/models?2>; rel="next"'), b'</v1/models?2>; rel="next"'),
        ((b"Link", b"<http://203.0.113.70/>"), None),  # over-careful
        ((b"Refresh", b"0; url=https://203.0.113.7:41234/"), None),
        ((b"Refresh", b"0; url=https://evil.example/"), None),
        ((b"Alt-Svc", b'h3=":41234"'), None),
        ((b"X-Served-By", b"203.0.113.7:41234"), None),
        ((b"Set-Cookie", b"a=b; Domain=203.0.113.7"), None),
        ((b"X-203.0.113.7", b"1"), None),
        ((b"X-Other", b"203.0.113.8"), b"203.0.113.8"),
    ],
)
def test_a_header_that_names_the_instance_says_its_path_or_nothing(
    header: tuple[bytes, bytes], kept: bytes | None
) -> None:
    assert returned([header], HERE) == ([] if kept is None else [(header[0], kept)])


def test_a_host_may_have_a_name_or_an_address_of_version_6() -> None:
    named = [(b"X-By", b"Host-7.Example.COM"), (b"Link", b"<HTTPS://host-7.example.com:1/a>")]
    assert returned(named, "https://host-7.example.com:41234") == [(b"Link", b"</a>")]
    numbered = [(b"X-By", b"2001:db8::7"), (b"Link", b"<https://[2001:db8::7]:41234/a>")]
    assert returned(numbered, "https://[2001:db8::7]:41234") == [(b"Link", b"</a>")]


def test_a_page_of_this_machine_may_read_what_an_instance_of_this_machine_says() -> None:
    allowed = [(b"Access-Control-Allow-Origin", b"http://127.0.0.1:3000")]
    assert returned(allowed, "http://127.0.0.1:41234") == allowed
    assert returned([(b"X-By", b"127.0.0.1:41234")], "http://127.0.0.1:41234") == []


def test_an_error_that_names_the_address_says_its_kind() -> None:
    refused = OSError(errno.ECONNREFUSED, "Connect call failed ('203.0.113.7', 41234)")
    said = f"ConnectionRefusedError: {refused}"
    assert error_without_address(said, refused, HERE) == "ConnectionRefusedError: Connection refused"
    several = OSError("Multiple exceptions: ('203.0.113.7', 41234)")
    assert error_without_address(f"OSError: {several}", several, HERE) == "OSError"
    assert error_without_address("OSError: no route", OSError("no route"), HERE) == "OSError: no route"


async def names_itself(seen: Seen, out: Out) -> None:
    """Redirect as uvicorn does, which knows its address from the Host header, and name it everywhere."""
    netloc = seen.header("host") or ""
    await out.answer(
        307,
        b"",
        {
            "Location": f"https://{netloc}{seen.target.rstrip('/')}",
            "Content-Location": f"http://{netloc}/v1/models",
            "Link": f"<//{netloc}/v1/models>",
            "Refresh": f"0; url=https://{netloc}/",
            "Alt-Svc": f'h3="{netloc}"',
            "X-Served-By": netloc,
        },
    )


def test_a_redirect_of_an_engine_is_followed_with_a_lease_of_its_own(user: Make, fleet: FakeFleet) -> None:
    plan(fleet, names_itself)
    response = user(fleet.url).request("GET", "/v1/models/", follow_redirects=True)
    assert response.status_code == 200
    assert {seen.target for seen in fleet.requests} == {"/v1/models/", "/v1/models"}
    assert len(fleet.loadbalancer.given) == 2
    assert str(response.url) == "http://fleet/v1/models"
    (redirect,) = response.history
    said = f"{redirect.url} {redirect.headers.raw!r}"
    assert not any(port_of(instance.address) in said for instance in fleet.instances)
    assert redirect.headers["location"] == "/v1/models"


Trouble = Callable[[FakeFleet], None]


def refuses(fleet: FakeFleet) -> None:
    fleet.loadbalancer.wrong = {n: {"address": f"https://127.0.0.1:{free_port()}"} for n in (1, 2)}


def impostor(fleet: FakeFleet) -> None:
    fleet.loadbalancer.wrong = {n: {"certificate": make_certificate()[0]} for n in (1, 2)}


def in_the_clear(fleet: FakeFleet) -> None:
    fleet.loadbalancer.wrong = {n: {"address": "http://203.0.113.7:41234"} for n in (1, 2)}


def no_address(fleet: FakeFleet) -> None:
    fleet.loadbalancer.wrong = {n: {"address": f"{fleet.instances[0].address}/v1"} for n in (1, 2)}


def no_tls(fleet: FakeFleet) -> None:
    address = fleet.loadbalancer.address.replace("http:", "https:")
    fleet.loadbalancer.wrong = {n: {"address": address} for n in (1, 2)}


def bad_tokens(fleet: FakeFleet) -> None:
    fleet.loadbalancer.wrong = {n: {"token": "wrong"} for n in (1, 2)}


TROUBLES: dict[str, Trouble] = {
    "refuses": refuses,
    "impostor": impostor,
    "in-the-clear": in_the_clear,
    "no-address": no_address,
    "no-tls": no_tls,
    "bad-tokens": bad_tokens,
    "hangs-up": lambda fleet: plan(fleet, *[hang_up] * 4),
    "breaks-off": lambda fleet: plan(fleet, *[break_off] * 4),
    "stalls": lambda fleet: plan(fleet, *[stall] * 4),
    "full": lambda fleet: plan(fleet, *[says(503)] * 4),
    "no-http": lambda fleet: plan(fleet, *[says(200, b"", **{"Content-Length": "x"})] * 4),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_no_error_names_the_address_of_an_instance(user: Make, fleet: FakeFleet, trouble: str) -> None:
    addresses = ["203.0.113.7", *(port_of(instance.address) for instance in fleet.instances)]
    TROUBLES[trouble](fleet)
    addresses += [port_of(str(wrong.get("address", "-:-"))) for wrong in fleet.loadbalancer.wrong.values()]
    one = user(fleet.url, wait_s=0.2, max_tries=2)
    with pytest.raises((openai.APIError, httpx2.HTTPError)) as e:
        one.stream(timeout=0.5)
    shown = [line for line in traceback.format_exception(e.value) if not line.lstrip().startswith("File ")]
    said = "".join(shown)
    if isinstance(e.value, openai.APIStatusError):
        said += f"{e.value.response.headers.raw!r} {e.value.response.text}"
    lb = port_of(fleet.url)
    assert not [one for one in addresses if one not in ("-", lb) and one in said], said
