"""A page in the operator's browser cannot use our servers; programs can."""

import pytest

from tests.sample_app import sample_app
from tests.web_server import BEARER, call, served

BODY = b'{"n": 3}'


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Content_Type": "text/plain"}, 200),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 200),
        ({"Origin": "https://evil.example", "Content_Type": "text/plain"}, 403),
        ({"Origin": "https://evil.example", "Content_Type": "application/json"}, 403),
        ({"Origin": "null", "Content_Type": "application/json"}, 403),
        ({"Origin": "", "Content_Type": "application/json"}, 403),
        ({"Origin": "http://localhost:3000", "Content_Type": "application/json"}, 403),
        ({"Origin": "http://localhost", "Host": "localhost", "Content_Type": "application/json"}, 200),
        ({"Origin": "http://localhost", "Host": "localhost", "Content_Type": "text/plain"}, 415),
        ({"Origin": "http://localhost", "Host": "localhost"}, 415),
        ({"Sec_Fetch_Site": "cross-site", "Content_Type": "application/json"}, 403),
        ({"Sec_Fetch_Site": "Same-Site", "Content_Type": "application/json"}, 403),
        ({"Sec_Fetch_Site": "same-origin", "Content_Type": "application/json; charset=utf-8"}, 200),
        ({"Sec_Fetch_Site": "none", "Content_Type": "application/json"}, 200),
    ],
)
@pytest.mark.parametrize("path", ["/echo", "/direct"])
@pytest.mark.parametrize("loopback", [True, False])
def test_what_a_foreign_page_may_have_caused_is_refused(
    path: str, headers: dict[str, str], status: int, loopback: bool
) -> None:
    with served(sample_app(), loopback=loopback) as port:
        assert call(port, "POST", path, BODY, Authorization=BEARER, **headers)[0] == status


def test_a_foreign_page_may_lead_to_the_first_page_and_load_nothing_else() -> None:
    with served(sample_app()) as port:
        assert call(port, "GET", "/", Sec_Fetch_Site="cross-site")[0] == 404  # there is none here
        assert call(port, "GET", "/number", Sec_Fetch_Site="cross-site")[0] == 403
        assert call(port, "GET", "/", Sec_Fetch_Site="cross-site", Origin="https://evil.example")[0] == 403
        assert call(port, "GET", "/number", Sec_Fetch_Site="none")[0] == 200
