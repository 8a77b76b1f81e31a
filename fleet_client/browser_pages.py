"""Tells requests of pages in somebody's browser from those of programs.

A browser says where a request comes from, and a page cannot keep it from that:

    Origin of another server                            403
    Sec-Fetch-Site: cross-site or same-site             403, but for going to the page at /
    a body that is not JSON, sent by a browser          415: a form of a foreign page can send text, not JSON

A program such as curl sends none of these headers and is not touched.
"""

from collections.abc import Mapping, Sequence

from fleet_client.connection_pool import Header

FOREIGN_SITES = frozenset((b"cross-site", b"same-site"))
"""What a browser says of a request that a page of another server caused."""


def by_name(headers: Sequence[Header]) -> dict[bytes, bytes]:
    """Return headers by name, in lower case; values of the same name are joined with commas."""
    said = dict(headers)
    if len(said) != len(headers):
        said = {}
        for name, value in headers:
            said[name] = said[name] + b"," + value if name in said else value
    return said


def page_refusal(method: str, path: str, said: Mapping[bytes, bytes]) -> tuple[int, str, str] | None:
    """Return (status, code, message) that refuses a request which a foreign page may have caused, or None.

    said: the request's headers by name.
    """
    origin, site, host = said.get(b"origin"), said.get(b"sec-fetch-site"), said.get(b"host", b"")
    if b"," in host:
        return 403, "wrong_origin", "two headers host"
    if origin is None and site is None:
        return None
    if origin is not None and origin.partition(b"://")[2].lower() != host.lower():
        return 403, "wrong_origin", f"pages of {origin[:100].decode('latin-1')} may not ask this server"
    goes_there = method == "GET" and path == "/" and origin is None
    sites = {one.strip().lower() for one in (site or b"").split(b",")}
    if sites & FOREIGN_SITES and not goes_there:
        return 403, "wrong_origin", "pages of other sites may not ask this server"
    kind = said.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if method not in ("GET", "HEAD", "OPTIONS") and kind != b"application/json":
        return 415, "unsupported_media_type", "from a browser a body is Content-Type: application/json"
    return None
