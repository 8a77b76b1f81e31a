"""Which requests the gateway serves: it tells the user's programs from pages in the user's browser.

On loopback the gateway asks for no key, so it must tell the user's programs from pages in the user's browser,
which can reach loopback, too. A page cannot keep its browser from saying where it comes from:

    under a name of its own (DNS rebinding)      Host is not this machine          403
    from its own site, in a script or a form     Origin is not this machine        403
    from its own site, a picture or a link       Sec-Fetch-Site: cross-, same-site 403

With keys (--key-file) the key is the proof, and none of this is looked at: as a bearer, or in x-api-key or
api-key. Off loopback it wants keys.
"""

from collections.abc import Collection, Sequence

from fleet_client.bearer import bearer_is
from fleet_client.browser_pages import FOREIGN_SITES
from fleet_client.connection_pool import Header
from fleet_client.loopback import names_loopback
from fleet_client.reply import HttpReply, error_reply

KEYS_PROVE = "give the gateway --key-file: then its keys are the proof"
"""What its operator can do for those that are refused for where they come from."""

CORS_AGE_S = 600
"""Seconds for which a browser may remember that a page of this machine may ask."""


def refusal(headers: Sequence[Header], keys: Collection[str], *, loopback: bool) -> HttpReply | None:
    """Return the answer that refuses a request, or None when the gateway serves it.

    keys: each request must carry one of them, if there are any. loopback: whether the server listens on
    loopback only.
    """
    if keys:
        # Given twice they are joined, so two Authorization headers match no key.
        given = b",".join(values_of(headers, b"authorization"))
        if not given:  # as programs for Anthropic's API and Azure's say it
            given = b"Bearer " + b",".join(
                [*values_of(headers, b"x-api-key"), *values_of(headers, b"api-key")]
            )
        if bearer_is(given.decode("latin-1"), keys):
            return None
        return error_reply(
            401,
            "invalid_api_key",
            "this gateway wants its own key: Authorization: Bearer <key>, or x-api-key: <key>",
            headers=[(b"WWW-Authenticate", b"Bearer")],
        )
    if loopback:
        for host in values_of(headers, b"host"):
            if not names_loopback(host):
                return error_reply(
                    403,
                    "wrong_host",
                    f"Host: {_shown(host)} is not this machine, so a page in a browser may have sent it. "
                    f"Behind a reverse proxy {KEYS_PROVE}",
                )
    origins = values_of(headers, b"origin")
    for origin in origins:
        if not from_loopback(origin):
            return error_reply(
                403,
                "wrong_origin",
                f"pages of {_shown(origin)} may not use this gateway; {KEYS_PROVE}",
            )
    sites = {value.strip().lower() for value in values_of(headers, b"sec-fetch-site")}
    if not origins and sites & FOREIGN_SITES:
        return error_reply(
            403,
            "wrong_origin",
            f"pages of other sites may not use this gateway; {KEYS_PROVE}",
        )
    return None


def from_loopback(origin: bytes) -> bool:
    """Return whether an Origin header names a server of this machine."""
    scheme, found, host = origin.partition(b"://")
    return bool(found) and scheme in (b"http", b"https") and names_loopback(host)


def values_of(headers: Sequence[Header], name: bytes) -> list[bytes]:
    """Return the values of all headers of that name."""
    return [value for one, value in headers if one == name]


def _shown(value: bytes) -> str:
    return value[:100].decode("latin-1")


def preflight(headers: Sequence[Header]) -> HttpReply | None:
    """Return the answer to a browser that asks whether a page of this machine may ask (OPTIONS), or None."""
    origin = values_of(headers, b"origin")
    method = values_of(headers, b"access-control-request-method")
    if len(origin) != 1 or not method or not from_loopback(origin[0]):
        return None
    asked = b", ".join(values_of(headers, b"access-control-request-headers"))
    allow = [
        (b"Access-Control-Allow-Origin", origin[0]),
        (b"Access-Control-Allow-Methods", method[0]),
        (b"Access-Control-Max-Age", b"%d" % CORS_AGE_S),
        (b"Vary", b"Origin"),
    ]
    if asked:
        allow.append((b"Access-Control-Allow-Headers", asked))
    return HttpReply(204, allow, body=b"")


def readable_by(origin: Sequence[bytes], headers: Sequence[Header]) -> Sequence[Header]:
    """Return an answer's headers with those that let a page of this machine (origin) read the answer."""
    if len(origin) != 1 or any(name.lower() == b"access-control-allow-origin" for name, _ in headers):
        return headers
    return [*headers, (b"Access-Control-Allow-Origin", origin[0]), (b"Vary", b"Origin")]
