"""Answers of the paced engine in vLLM's shapes: whole, or as the events of a stream."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localcloud.paced.completion_request import (
    PIECES,
    CompletionRequest,
    token_at,
    tokens_of,
)
from localcloud.paced.served_model import ServedModel


def compact(said: object) -> bytes:
    """Return JSON as vLLM writes it, without spaces, in UTF-8."""
    return json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")


def event(said: object) -> bytes:
    """Return one event of a stream (server-sent events) with that JSON."""
    return b"data: " + compact(said) + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the object `usage` of an answer, which counts its tokens."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "total_tokens": total, "completion_tokens": completion_tokens}


TEXT = "\0"
"""Stands for the text of an event in a frame; no name of a model and no word of an answer has it."""


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """What an answer is made of.

    lengths: (tokens, finish reason) of each choice; created: epoch seconds; said: the body of the request;
    token: what the ids of the answer are made of.
    """

    request: CompletionRequest
    model: ServedModel
    lengths: Sequence[tuple[int, str]]
    created: int
    said: Mapping[str, Any]
    token: str


class CompletionAnswer:
    """Makes the bytes of one answer, whole or as stream events. A choice is one of the texts asked for.

    Most events of a choice differ in their text only. So json writes one of them, and the texts of the others
    are put between its two ends: 0.4 µs an event, 9 with json for each (2026-11).
    """

    def __init__(self, plan: AnswerPlan) -> None:
        """Make the answer that is planned."""
        request, lengths = plan.request, plan.lengths
        self._request = request
        self._lengths = lengths
        self._sent = [0] * len(lengths)
        self._made = 0
        self._wanted = sum(tokens for tokens, _ in lengths)
        self.id = ("chatcmpl-" if request.chat else "cmpl-") + plan.token
        kind = "chat.completion" if request.chat else "text_completion"
        self._head = {"id": self.id, "object": kind, "created": plan.created, "model": plan.model.names[0]}
        self._chunk = self._head | ({"object": "chat.completion.chunk"} if request.chat else {})
        self._frames: dict[int, tuple[bytes, bytes]] = {}  # choice -> what is around its text
        self._plain = request.shape.pieces is None and request.logprobs is None and not request.reasoning

    @property
    def done(self) -> bool:
        """Whether `events` has returned the whole answer."""
        return self._made == self._wanted

    def events(self, came: Iterable[tuple[int, int]]) -> bytes:
        """Return the stream events of tokens that were just made: (choice, tokens), in that order."""
        events = []
        for index, tokens in came:
            if self._request.chat and not self._sent[index]:
                events.append(self._role(index))
            for _ in range(tokens):
                self._made += 1
                events.append(self._token(index, self._sent[index]))
                self._sent[index] += 1
        if self.done:
            events.append(self._last())
        return b"".join(events)

    def _role(self, index: int) -> bytes:
        """Return the first event of a chat's choice, which holds the role "assistant"."""
        return self._event(index, {"delta": {"role": "assistant", "content": ""}}, None, 0)

    def _token(self, index: int, at: int) -> bytes:
        """Return the event with token number `at` (from 0) of a choice."""
        whole, reason = self._lengths[index]
        if not self._plain:
            return self._shaped(index, at, whole, reason)
        piece = PIECES[at % len(PIECES)]
        first, last = self._request.echo and at == 0, at + 1 == whole
        if first or last or self._request.continuous_usage:
            text = piece.decode()
            if first:
                text = self._begin(index) + (text if self._request.max_tokens else "")
            return self._event(index, self._text(text), reason if last else None, self._made)
        if index not in self._frames:
            before, _, after = self._event(index, self._text(TEXT), None, 0).rpartition(compact(TEXT)[1:-1])
            self._frames[index] = before, after
        before, after = self._frames[index]
        return before + piece + after

    def _shaped(self, index: int, at: int, whole: int, reason: str) -> bytes:
        """Return the event of a token that is not just placeholder text; with the last one the end."""
        of, text = token_at(self._request, whole, at)
        last = at + 1 == whole
        ends = reason if last and of in ("content", "reasoning") else None
        if not self._request.chat:
            content = self._text((self._begin(index) if self._request.echo and at == 0 else "") + text)
        elif of == "content":
            content = self._text(text)
        elif of == "reasoning":
            content = {"delta": {"reasoning": text, "reasoning_content": text}}
        else:
            call: dict[str, Any] = {"index": 0, "function": {of: text}}
            if of == "name":
                call = {"id": f"chatcmpl-tool-{self.id[-16:]}", "type": "function"} | call
            content = {"delta": {"content": None, "tool_calls": [call]}}
        made = self._event(index, content, ends, self._made, self._logprobs([text]))
        if last and ends is None:
            made += self._event(index, {"delta": {}}, reason, self._made)
        return made

    def _logprobs(self, texts: Sequence[str]) -> dict[str, Any] | None:
        """Return made-up logprobs of tokens, where they were asked for: each is the likeliest itself."""
        top = self._request.logprobs
        if top is None:
            return None
        others = [piece.decode() for piece in PIECES]
        ranked = [[text, *(o for o in others if o != text)][: max(1, top)] for text in texts]
        if self._request.chat:

            def entry(text: str, rank: int) -> dict[str, Any]:
                return {"token": text, "logprob": -0.25 - rank, "bytes": list(text.encode())}

            content = [
                entry(text, 0)
                | {"top_logprobs": [entry(o, rank) for rank, o in enumerate(row)] if top else []}
                for text, row in zip(texts, ranked, strict=True)
            ]
            return {"content": content}
        offsets = [sum(map(len, texts[:n])) for n in range(len(texts))]
        return {
            "text_offset": offsets,
            "token_logprobs": [-0.25] * len(texts),
            "tokens": list(texts),
            "top_logprobs": [{o: -0.25 - rank for rank, o in enumerate(row)} for row in ranked],
        }

    def _text(self, text: str) -> dict[str, Any]:
        """Return the fields of an event that hold this text of a choice."""
        return {"delta": {"content": text}} if self._request.chat else {"text": text}

    def _begin(self, index: int) -> str:
        """Return the text before a choice's first token: the prompt if echo was asked for, else nothing."""
        return self._request.prompts[index // self._request.n].text if self._request.echo else ""

    def _event(
        self,
        index: int,
        content: Mapping[str, Any],
        reason: str | None,
        made: int,
        logprobs: Mapping[str, Any] | None = None,
    ) -> bytes:
        """Return a stream event of a choice.

        reason: why the choice ends with it, or None; made: tokens so far, of all choices.
        """
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        chunk: dict[str, Any] = self._chunk | {"choices": [choice]}
        # vLLM leaves out of a chat's events what was not set, and writes a completion's in full.
        if reason is not None or not self._request.chat:
            choice["stop_reason"] = None
        if self._request.continuous_usage:
            chunk["usage"] = usage(self._request.prompt_tokens, made)
        elif not self._request.chat:
            chunk["usage"] = None
        return event(chunk)

    def _last(self) -> bytes:
        """Return the end of the stream: usage if it was asked for, and [DONE]."""
        done = b"data: [DONE]\n\n"
        if not self._request.include_usage:
            return done
        used = usage(self._request.prompt_tokens, self._made)
        return event(self._chunk | {"choices": [], "usage": used}) + done

    def _texts(self, tokens: int) -> dict[str, str]:
        """Return the texts of a choice of so many tokens, by what they are of."""
        if not self._plain:
            return tokens_of(self._request, tokens)
        return {"content": b"".join(PIECES[at % len(PIECES)] for at in range(tokens)).decode()}

    def _message(self, texts: Mapping[str, str]) -> dict[str, Any]:
        """Return the field of a choice that holds the whole message of a chat."""
        message: dict[str, Any] = {"role": "assistant", "content": texts.get("content")}
        if "name" in texts:
            function = {"name": texts["name"], "arguments": texts.get("arguments", "")}
            call = {"id": f"chatcmpl-tool-{self.id[-16:]}", "type": "function", "function": function}
            message["tool_calls"] = [call]
        elif message["content"] is None:
            message["content"] = ""
        if "reasoning" in texts:
            message |= {"reasoning": texts["reasoning"], "reasoning_content": texts["reasoning"]}
        return {"message": message}

    def whole(self) -> bytes:
        """Return the whole answer as one JSON object, not streamed."""
        choices = []
        for index, (tokens, finish) in enumerate(self._lengths):
            shown = 0 if self._request.max_tokens == 0 else tokens
            texts = self._texts(shown)
            content = (
                self._message(texts)
                if self._request.chat
                else self._text(self._begin(index) + texts.get("content", ""))
            )
            pieces = [] if self._plain else [token_at(self._request, shown, at)[1] for at in range(shown)]
            ends = {"logprobs": self._logprobs(pieces), "finish_reason": finish, "stop_reason": None}
            choices.append({"index": index} | content | ends)
        used = usage(self._request.prompt_tokens, self._wanted)
        return compact(self._head | {"choices": choices, "usage": used})
