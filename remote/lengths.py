"""Estimates how long a request and its answer are, without a tokenizer.

    request   bytes of the text in it, 4 a token; a token id counts 4, a picture, sound or file _MEDIA
    answer    tokens: as its usage says, else one for each event, else its text

A client tells the loadbalancer the same of its request (fleet_client/token_estimate.py); a test compares.
"""

import json
import re
from typing import Any

_TOKEN = 4
"""Bytes of text that count as a token."""

_MEDIA = 1000 * _TOKEN
"""What a picture, a sound, a file or a body that is no JSON counts: their bytes say nothing."""

_DEEPEST = 64
"""Deepest level of a body that is looked into."""

_ALONE = (
    *("prompt", "messages", "input", "inputs", "texts", "instructions", "system", "tools", "suffix"),
    "token_ids",
)
_ONE, _MANY = ("query", "queries", "text_1", "data_1"), ("documents", "items", "text_2", "data_2")
"""What a prompt is made of; of the last two each has one of the first beside it."""

_LONG_EVENT = 6
"""Bytes of text an event, on average, above which an event is several tokens: a token has 3 to 5."""

_LONGEST_REST = 1 << 20
"""Bytes of an answer without a line end that are kept together."""

_USAGE = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,9})')
_FAILED = b"\nevent: error", b"\nevent: response.failed", b'\ndata: {"error"'
_KEYS = b"content text reasoning reasoning_content arguments thinking partial_json".split()
"""Where an answer has its text; in all events of /v1/responses that do not repeat others it is delta."""


def request_size(body: bytes) -> int:
    """Return how many bytes of text a request's body counts as; 0 without a body."""
    if not body:
        return 0
    try:
        said = json.loads(body)
        one, many = (max((said.get(name) or () for name in names), key=_weigh) for names in (_ONE, _MANY))
        again = max(1, _count(many)) if _count(one) == 1 else 1
        return _weigh([said.get(name) for name in _ALONE]) + _weigh(one) * again + _weigh(many)
    except (AttributeError, RecursionError, ValueError):
        return _MEDIA


def _count(value: Any) -> int:
    return len(value) if isinstance(value, list) else 1


def _weigh(value: Any, depth: int = 0) -> int:
    """Return how many bytes of text a JSON value counts as."""
    if isinstance(value, str):
        return _MEDIA if ";base64," in value[:99] else len(value.encode(errors="surrogatepass"))
    if depth > _DEEPEST:
        return 0
    if isinstance(value, list):
        if value and isinstance(value[0], int):
            return len(value) * _TOKEN
        return sum(_weigh(one, depth + 1) for one in value)
    if isinstance(value, dict):
        kind, source = value.get("type"), value.get("source")
        plain = isinstance(source, dict) and source.get("type") in ("text", "content")
        if isinstance(kind, str) and re.search("image|audio|video|file$|^document$", kind) and not plain:
            return _MEDIA
        return sum(len(key) + _weigh(one, depth + 1) for key, one in value.items())
    return 0


class AnswerLength:
    """Counts the output tokens of one answer from its pieces. failed: the answer tells of an error."""

    def __init__(self) -> None:
        """Start before the first piece of the answer."""
        self.failed = False
        self._usage = -1
        self._events = self._bytes = 0
        self._rest = b"\n"

    def look(self, text: bytes, stream: bool, last: bool) -> None:
        """Count the tokens in the next piece of the answer. stream: it is an event stream; last: it ends."""
        text = self._rest + text
        self._rest = b""
        if not last and len(text) < _LONGEST_REST:
            text, end, rest = text.rpartition(b"\n")
            self._rest = end + rest
        # Quotes and line ends inside a text, which may be the client's own (echo), are escaped: what is found
        # is the engine's own. Searches like these take a tenth of the time of a pattern.
        at = text.rfind(b'"usage":')
        if at >= 0 and (found := _USAGE.findall(text, at)):
            self._usage = int(found[-1])
        if stream:
            self.failed |= any(said in text for said in _FAILED)
        if stream or at < 0:  # whole, with the usage of another kind, it made no text
            self._add(text.replace(b'": ', b'":'))

    def _add(self, text: bytes) -> None:
        if b"\\" in text:
            text = text.replace(b"\\\\", b"..").replace(b'\\"', b"..")
        self._events -= text.count(b'"role":"a')  # it comes with an empty text
        left = text.count(b"\ndata:") or len(_KEYS)
        for key in (b"delta",) if b'"type":"response.' in text else _KEYS:
            _, *texts = text.split(b'"%b":"' % key)
            if key == _KEYS[3] and b'"reasoning":"' in text:
                continue  # the same again under its older name
            self._events += len(texts)
            for one in texts:
                self._bytes += one.find(b'"')
            left -= len(texts)
            if left <= 0:
                break

    def tokens(self, complete: bool) -> int:
        """Return the output tokens so far. complete: the answer is, so the usage in it counts all."""
        many = self._bytes > _LONG_EVENT * self._events
        counted = self._bytes // _TOKEN if many else self._events
        if complete and self._usage >= 0:
            return self._usage
        return max(counted, self._usage)
