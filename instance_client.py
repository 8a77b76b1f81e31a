"""Every HTTP call that is made *to an instance*: tokens, load reports, the test prompt, completions.

An instance has two addresses. Its auth_server answers `POST /tokens` and `GET /load` to whoever has the
master token; its model server answers vLLM's own routes to whoever has a single-use token, which travels as
the API key. Nothing of an answer but its length is looked at here, and no token is ever part of a message.

All calls are made under TLS to the certificate that is known of the machine, and in the clear on loopback
only.

What can go wrong with a completion has names, because they differ in what the client may assume:

    NotStarted         the engine never saw the prompt: no connection, token refused, 429, 503
    WrongCertificate   the same: somebody else answered
    BrokenOff          it may have seen it: the connection broke, or the answer has no proper end
"""

import hashlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Annotated, Any, Self, TypeVar

import aiohttp
import msgspec
from msgspec import Meta, Struct

from fleet_client.bounded_answers import BoundedConnector
from fleet_client.tls_pins import BadAddress, context_for
from process.errors import InstanceError
from web.messages.decoding import BadField, decode
from web.messages.reports import LoadReport, TokenBatch, TokenOrder, read_report

T = TypeVar("T")

MODEL_KEEP_ALIVE_S, AUTH_KEEP_ALIVE_S = 3.0, 60.0
"""An idle connection is not used again after so long: vLLM's uvicorn closes them after 5 s, the auth_server
after 120, and a request on a connection that is just being closed would be lost."""

MAX_ANSWER = 4 * 2**20
"""Bytes of an answer that is read whole: 2,000 tokens and 65,536 events are under 4 MiB."""

CONNECT_SHARE = 0.3
"""Share of a test prompt's time that connecting may take: who has taken it and says nothing has stalled."""

TAIL = 4096
"""Bytes of a stream that are kept: usage and [DONE] are its last events."""


PATHS = {"messages": "/v1/chat/completions", "input": "/v1/embeddings"}
"""Where a request goes that has that field; one with neither is a completion."""


class PromptRefused(InstanceError):
    """The engine does not take a request of that kind, such as a chat of a model without a chat template."""


class NotStarted(InstanceError):
    """The instance did not take the request, so another one may serve it; only time was lost."""


class WrongCertificate(NotStarted):
    """What answers at the address is not the machine whose certificate is known; it was sent nothing."""


class BrokenOff(InstanceError):
    """An answer broke off. The engine may have worked on it, and tokens may have been delivered."""


def request_id(token: str) -> str:
    """Return the name of the request that a token admits: 16 hex digits of its SHA-256, safe to log.

    The instance computes the same (remote/tokens.py), so reports and leases meet without the token itself.
    """
    return hashlib.sha256(token.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Completion:
    """The answer of a model server to one request. Times are of time.perf_counter().

    Tokens are as the server counted them. error: what an answer other than 200, or an error inside the
    stream, says. first_token_s is 0 when no token came or nothing was streamed.
    """

    status: int
    error: str | None
    prompt_tokens: int
    completion_tokens: int
    first_token_s: float
    end_s: float


# -- what answers say --------------------------------------------------------------------------------------


class TokenUsage(Struct, frozen=True):
    """Tokens of one completion, as the model server counted them."""

    prompt_tokens: Annotated[int, Meta(ge=0)]
    completion_tokens: Annotated[int, Meta(ge=0)]


class WithUsage(Struct, frozen=True):
    """The part of a completion, or of the last event of its stream, that says how many tokens it has."""

    usage: TokenUsage


def error_message(raw: bytes) -> str:
    """Return what an error answer says, in vLLM's shape or our own; at most 300 characters."""
    try:
        said = json.loads(raw)
        inner = said.get("error", said)
        text = inner.get("message") if isinstance(inner, dict) else said.get("message") or inner
        return str(text)[:300]
    except (ValueError, AttributeError):
        return repr(raw[:100])


class Stream:
    """Reads the server-sent events of one completion, as far as they must be understood.

    Events are parsed until one holds a token; after that only the tail is kept, so that a thousand streams at
    fifty events a second cost a driver little. Feed it bytes as they come.
    """

    def __init__(self) -> None:
        """Start before the first byte."""
        self.begun = False  # a token came
        self.error: str | None = None
        self._suspect = False
        self._tail = b""

    def feed(self, chunk: bytes) -> None:
        """Take in a chunk of bytes that was received."""
        self._tail += chunk
        if not self.begun:
            # Whole lines only; what is left of them waits for the rest.
            self.begun = any(_holds_token(line) for line in self._tail.split(b"\n")[:-1])
        # Inside a text the quotes would be escaped, so this is a key, or a word that stands alone.
        self._suspect = self._suspect or b'"error"' in self._tail[-len(chunk) - 8 :]
        if self._suspect and self.error is None:
            self._find_error()
        if len(self._tail) > 4 * TAIL:
            self._tail = self._tail[-TAIL:]

    def _find_error(self) -> None:
        for line in self._tail.split(b"\n"):
            said = _event(line)
            if isinstance(said, dict) and "error" in said:
                self.error = error_message(line[5:].strip())

    def end(self) -> TokenUsage:
        """Return the token counts of the whole stream; raise BadField when it has no proper end."""
        lines = [line.strip() for line in self._tail.split(b"\n") if line.startswith(b"data:")]
        if not lines or lines[-1] != b"data: [DONE]":
            raise BadField("stream", "it has no [DONE]")
        for line in reversed(lines[:-1]):
            said = _event(line)
            if isinstance(said, dict) and said.get("usage"):
                return decode(line[5:], WithUsage).usage
        raise BadField("stream", "it has no usage")


def _event(line: bytes) -> object:
    """Return the JSON of a stream's data line; None for any other line."""
    if not line.startswith(b"data:"):
        return None
    try:
        return msgspec.json.decode(line[5:])
    except (ValueError, RecursionError):
        return None


def _holds_token(line: bytes) -> bool:
    """Return whether a line is an event with a token: any text of a completion, content of a chat."""
    said = _event(line)
    choices = said.get("choices") if isinstance(said, dict) else None
    for choice in choices if isinstance(choices, list) else ():
        delta = choice.get("delta")
        if "text" in choice or (isinstance(delta, dict) and any(v for k, v in delta.items() if k != "role")):
            return True
    return False


# --- outside world ---------------------------------------------------------------------------------


class InstanceClient:
    """Calls to any number of instances over kept-alive connections; an async context manager."""

    def __init__(self) -> None:
        """Open no connection yet: that needs the context to be entered."""
        self._auth: aiohttp.ClientSession | None = None
        self._model: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Open the client, which belongs to the running event loop from here on."""
        self._auth, self._model = _session(AUTH_KEEP_ALIVE_S), _session(MODEL_KEEP_ALIVE_S)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections of the client."""
        for session in (self._auth, self._model):
            if session is not None:
                await session.close()
        self._auth = self._model = None

    async def fetch_tokens(
        self,
        auth_url: str,
        master_token: str,
        count: int,
        timeout_s: float,
        certificate: str | None = None,
        report_to: str | None = None,
    ) -> TokenBatch:
        """Fetch count single-use tokens from an auth_server; raise InstanceError.

        report_to: the URL to which the instance is to push its reports.
        """
        order = TokenOrder(count, report_to)
        return await self._ask(
            "POST", f"{auth_url}/tokens", master_token, order, timeout_s, certificate, TokenBatch
        )

    async def fetch_load(
        self, auth_url: str, master_token: str, after: int, timeout_s: float, certificate: str | None = None
    ) -> LoadReport:
        """Return an instance's load report, with its events numbered above `after`; raise InstanceError."""
        url = f"{auth_url}/load?after={after}"
        return await self._ask(
            "GET", url, master_token, None, timeout_s, certificate, LoadReport, read_report
        )

    async def check_address(self, address: str, timeout_s: float, certificate: str | None = None) -> None:
        """Raise InstanceError unless a model server answers at that address that it is well.

        certificate: the only one that it may show.
        """
        assert self._model is not None, "used outside its context"  # noqa: S101 a mistake of ours
        try:
            async with self._model.get(
                f"{address}/health",
                timeout=aiohttp.ClientTimeout(total=timeout_s),
                ssl=_context(address, certificate),
                allow_redirects=False,
            ) as reply:
                status = reply.status
        except (aiohttp.ClientSSLError, ssl.SSLError) as e:
            raise _wrong(address, e) from e
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise InstanceError(f"{address}: {_named(e)}") from e
        if status != 200:
            raise InstanceError(f"{address}: health: wanted 200, got {status}")

    async def test_prompt(
        self,
        address: str,
        token: str,
        body: Mapping[str, Any],
        timeout_s: float,
        certificate: str | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> int:
        """Send a short prompt; return how many tokens came back, at least one, or raise InstanceError.

        Of a text to be embedded they are those that were read.

        Raises PromptRefused where the engine does not take such a request at all.
        """
        timeouts = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_SHARE * timeout_s)
        answer = await self.stream(address, token, body, timeouts, certificate, headers)
        if answer.status != 200:
            kind = PromptRefused if answer.status in (400, 404, 405, 422) else InstanceError
            raise kind(f"{address}: test prompt: wanted 200, got {answer.status}: {answer.error}")
        tokens = answer.prompt_tokens if "input" in body else answer.completion_tokens
        if tokens < 1:
            raise InstanceError(f"{address}: test prompt: wanted a token, got none")
        return tokens

    async def stream(
        self,
        address: str,
        token: str,
        body: Mapping[str, Any],
        timeouts: aiohttp.ClientTimeout,
        certificate: str | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Completion:
        """Send a completion request and read its answer to the end, streamed or not as the body says.

        An answer of 4xx or 5xx is returned as it is, except those that mean "not taken": 401, 429 and 503.
        Raises NotStarted, BrokenOff.
        """
        assert self._model is not None, "used outside its context"  # noqa: S101 a mistake of ours
        path = next((path for part, path in PATHS.items() if part in body), "/v1/completions")
        sent = False
        try:
            async with self._model.post(
                f"{address}{path}",
                json=body,
                headers={**headers, "Authorization": f"Bearer {token}"},
                timeout=timeouts,
                ssl=_context(address, certificate),
                allow_redirects=False,
            ) as reply:
                sent = True
                if reply.status != 200:
                    return _refused(address, reply.status, await _read_whole(reply))
                if body.get("stream"):
                    return await read_stream(address, reply.content.iter_any())
                return read_answer(address, await _read_whole(reply))
        except (aiohttp.ClientSSLError, ssl.SSLError) as e:
            raise _wrong(address, e) from e
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as e:
            raise NotStarted(f"{address}: no connection: {_named(e)}") from e
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            what = "the answer broke off" if sent else "no answer"
            raise BrokenOff(f"{address}: {what}: {_named(e)}") from e

    async def _ask(
        self,
        method: str,
        url: str,
        master_token: str,
        body: Struct | None,
        timeout_s: float,
        certificate: str | None,
        kind: type[T],
        read: Callable[[bytes, type[T]], T] = decode,
    ) -> T:
        """Call an auth_server; return its answer, decoded as `kind` by `read`, or raise InstanceError."""
        assert self._auth is not None, "used outside its context"  # noqa: S101 a mistake of ours
        shown = url.partition("?")[0]
        try:
            async with self._auth.request(
                method,
                url,
                data=None if body is None else msgspec.json.encode(body),
                headers={"Authorization": f"Bearer {master_token}", "Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=timeout_s),
                ssl=_context(shown, certificate),
                allow_redirects=False,
            ) as reply:
                raw = await _read_whole(reply)
                status = reply.status
        except (aiohttp.ClientSSLError, ssl.SSLError) as e:
            raise _wrong(shown, e) from e
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise InstanceError(f"{shown}: {_named(e)}") from e
        if status != 200:
            raise InstanceError(f"{shown}: wanted 200, got {status}: {error_message(raw)}")
        try:
            return read(raw, kind)
        except BadField as e:
            raise InstanceError(f"{shown}: {e}") from None


def _session(keep_alive_s: float) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=BoundedConnector(limit=0, keepalive_timeout=keep_alive_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,  # a proxy from the environment must not see tokens or prompts
    )


def _context(url: str, certificate: str | None) -> ssl.SSLContext | bool:
    """Return aiohttp's `ssl` argument for a URL; raise InstanceError where nothing may be sent to it."""
    try:
        return context_for(url, certificate) or True
    except BadAddress as e:
        raise NotStarted(f"{url}: {e}") from None
    except ValueError as e:
        raise WrongCertificate(f"{url}: {e}") from None


def _wrong(url: str, error: Exception) -> WrongCertificate:
    return WrongCertificate(f"{url}: it does not have the certificate that is known of it: {_named(error)}")


def _named(error: BaseException) -> str:
    """Return an error's type and text, or only its type, because the text of a timeout is empty."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _refused(address: str, status: int, raw: bytes) -> Completion:
    message = error_message(raw)
    if status in (401, 429, 503):
        raise NotStarted(f"{address}: {status}: {message}")
    return Completion(status, message, 0, 0, 0.0, time.perf_counter())


def read_answer(address: str, raw: bytes) -> Completion:
    """Return the completion in an answer that was not streamed; raise InstanceError if it is not valid.

    address: of the instance, for messages.
    """
    now = time.perf_counter()
    try:
        usage = decode(raw, WithUsage).usage
    except BadField as e:
        raise InstanceError(f"{address}: a completion without usage: {e}") from None
    return Completion(200, None, usage.prompt_tokens, usage.completion_tokens, 0.0, now)


async def read_stream(
    address: str, chunks: AsyncIterator[bytes], gaps_s: list[float] | None = None
) -> Completion:
    """Read a streamed answer to its end and return the completion; raise BrokenOff.

    address: of the instance, for messages. gaps_s: gets the seconds between two events of a completion, one
    value for each after the first; several that come together are 0 s apart.
    """
    stream, first_token_s, last_s = Stream(), 0.0, 0.0
    async for chunk in chunks:
        was_begun = stream.begun
        stream.feed(chunk)
        if stream.begun and not was_begun:
            first_token_s = last_s = time.perf_counter()
        if gaps_s is not None and stream.begun and (events := chunk.count(b'"text"')):
            if was_begun:
                now = time.perf_counter()
                gaps_s.append(now - last_s)
                last_s = now
            gaps_s.extend([0.0] * (events - 1))
    end_s = time.perf_counter()
    if stream.error is not None:
        return Completion(200, stream.error, 0, 0, first_token_s, end_s)
    try:
        usage = stream.end()
    except BadField as e:
        raise BrokenOff(f"{address}: {e}") from None
    return Completion(200, None, usage.prompt_tokens, usage.completion_tokens, first_token_s, end_s)


async def _read_whole(reply: aiohttp.ClientResponse) -> bytes:
    """Return the body of an answer; raise ClientPayloadError when it is over MAX_ANSWER bytes."""
    parts: list[bytes] = []
    size = 0
    async for chunk in reply.content.iter_any():
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER:
            raise aiohttp.ClientPayloadError(f"an answer of over {MAX_ANSWER} bytes")
    return b"".join(parts)
