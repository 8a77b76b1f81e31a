"""Hostile inputs from a seeded generator: messages that are nearly right, and requests that are no HTTP.

A message is made of the struct that its reader decodes (web/messages/), as JSON text: most values fit, at the
ends of their ranges, and now and then one cannot be. A request is the right one with some bytes changed, or
one of the old tricks.
"""

import random
from collections.abc import Callable
from typing import Any

from msgspec import inspect

ODD = (
    *("null", "true", "-1", "0", "-0.0", "1.5", "1e308", "-1e309", "1e999", "NaN", "-Infinity", "[]", "{}"),
    *("9223372036854775807", "18446744073709551616", "1" + "0" * 400, "0." + "1" * 400, "1e-400"),
    *('""', '"x"', '"\\ud800"', '"\\u0000"', '"\\u202e"', '"' + "a" * 5000 + '"', "[" * 2000 + "]" * 2000),
    *(
        '{"a": 1, "a": 2}',
        '{"": {"": {"": null}}}',
        "[[], {}, null]",
        '"../../etc/passwd"',
        "'x'",
        "",
        ",",
        "\\",
    ),
)
"""JSON that is of no use nearly everywhere, and what is no JSON."""

ODD_SHARE = 0.02
"""Share of the values that cannot be."""

BEYOND_SHARE = 0.02
"""Share of the values of the right type that are out of their range."""

MOST_ITEMS = 6
"""Items of a list that is not to be too long."""


def message(kind: Any, rng: random.Random) -> bytes:
    """Return a message of that kind, or nearly one."""
    text = _text(inspect.type_info(kind), rng)
    raw = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        raw = mutated(raw, rng)
    return raw


def _text(info: inspect.Type, rng: random.Random) -> str:
    if rng.random() < ODD_SHARE:
        return rng.choice(ODD)
    make = _MAKERS.get(type(info))
    return "null" if make is None else make(info, rng)


def _int(info: Any, rng: random.Random) -> str:
    least = info.ge if info.ge is not None else -(2**53)
    most = info.le if info.le is not None else 2**53
    if rng.random() < BEYOND_SHARE:
        return str(rng.choice((least - 1, most + 1)))
    return str(rng.choice((least, most, rng.randint(least, most), min(most, max(least, 7)))))


def _float(info: Any, rng: random.Random) -> str:
    least = info.ge if info.ge is not None else -1e300
    most = info.le if info.le is not None else 1e300
    if rng.random() < BEYOND_SHARE:
        return repr(rng.choice((least - 1.0, most * 2.0)))
    return repr(rng.choice((least, most, rng.uniform(least, min(most, least + 100.0)))))


def _str(info: Any, rng: random.Random) -> str:
    least, most = info.min_length or 0, info.max_length or 40
    size = rng.choice((least, min(most, 40), most, max(least, min(most, 16))))
    letters = ["a"] if rng.random() < 0.5 else list("0123456789abcdef")
    if rng.random() < BEYOND_SHARE:
        size = most + 1
        letters = rng.choice((letters, ["é"], ["\\n"], ["\\u0000"], ["\\ud800"], ["%", "/"], ["\\u202e"]))
    return '"' + "".join(rng.choice(letters) for _ in range(min(size, 400))) + '"'


def _url_or_str(info: Any, rng: random.Random) -> str:
    hosts = ("127.0.0.1:9", "[::1]:9", "localhost", "a" * 300, "127.0.0.1:99999", "\\u0000", "x@y:z", "")
    return (
        f'"http://{rng.choice(hosts)}/"'
        if (info.max_length or 0) > 200 and rng.random() < 0.5
        else _str(info, rng)
    )


def _items(info: Any, rng: random.Random) -> str:
    of = getattr(info, "item_type", None) or inspect.AnyType()
    size = rng.randint(0, MOST_ITEMS) if rng.random() < 0.98 else 300
    return "[" + ", ".join(_text(of, rng) for _ in range(size)) + "]"


def _dict(info: Any, rng: random.Random) -> str:
    size = rng.randint(0, MOST_ITEMS)
    pairs = ((str(rng.choice((7, -1, 2**64, "x", n))), _text(info.value_type, rng)) for n in range(size))
    return "{" + ", ".join(f'"{name}": {value}' for name, value in pairs) + "}"


def _struct(info: Any, rng: random.Random) -> str:
    said = []
    for field in info.fields:
        if rng.random() < (0.97 if field.required else 0.6):
            said.append(f'"{field.encode_name}": {_text(field.type, rng)}')
        if rng.random() < 0.01:
            said.append(f'"{field.encode_name}": {rng.choice(ODD)}')
    if rng.random() < 0.03:
        said.append(f'"unknown": {rng.choice(ODD)}')
    return "{" + ", ".join(said) + "}"


_MAKERS: dict[type, Callable[[Any, random.Random], str]] = {
    inspect.IntType: _int,
    inspect.FloatType: _float,
    inspect.StrType: _url_or_str,
    inspect.BoolType: lambda _, rng: rng.choice(("true", "false")),
    inspect.LiteralType: lambda info, rng: f'"{rng.choice(info.values)}"',
    inspect.ListType: _items,
    inspect.CollectionType: _items,
    inspect.VarTupleType: _items,
    inspect.DictType: _dict,
    inspect.StructType: _struct,
    inspect.UnionType: lambda info, rng: _text(rng.choice(info.types), rng),
    inspect.AnyType: lambda _, rng: rng.choice(ODD),
}


# -- requests -------------------------------------------------------------------------------------------


def request(method: str, target: str, headers: dict[str, str], body: bytes) -> bytes:
    """Return a request as it should be."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """Return it with some bytes changed, left out, doubled or put in."""
    out = bytearray(raw or b"x")
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(out))
        match rng.randrange(4):
            case 0:
                out[at] = rng.randrange(256)
            case 1:
                del out[at : at + rng.randint(1, 8)]
            case 2:
                out[at:at] = out[at : at + rng.randint(1, 30)]
            case _:
                out[at:at] = rng.choice((b"\r\n", b"\0", b"\xff\xfe", b": ", b"%", b"\x80" * 9, b" " * 40))
        out = out or bytearray(b"x")
    return bytes(out)


_POST = b"POST /route HTTP/1.1\r\nHost: localhost\r\n"

TRICKS = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x11" * 80,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /\r\n\r\n",
    b"GET http://[::1/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://user:pass@localhost:99999/x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /%ff%00%2e%2e/%zz?%ff=%00&a[b=1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /\xc3\xa9\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET //evil.example/..;/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /status HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    b"GET /status HTTP/1.1\r\nHost: \xff\xfe\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
    b"GET /status HTTP/1.0\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: \xff;q=a,,;;\r\n\r\n",
    b"HEAD /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    _POST + b"Content-Length: -1\r\n\r\n",
    _POST + b"Content-Length: 99999999999999999999\r\n\r\n",
    _POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    _POST + b"Content-Length: 2 \r\n\r\n{}",
    _POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    _POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}",
    _POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    _POST + b"Transfer-Encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n0\r\nX: y\r\n\r\n",
    _POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    _POST + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    _POST + b"Upgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\n{}",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 300 + b"\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 40,
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close, \xff\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    b"\r\n" * 500,
    b"\0" * 3000,
)
"""What others have tried on servers."""
