"""TODO: say what this is."""

import json
import secrets
from collections.abc import Sequence

from localcloud.paced.completion_request import PIECES, Ask, Model

# -- answers ---------------------------------------------------------------------------------------------


def compact(said: object) -> bytes:
    """JSON as vLLM writes it, without spaces, in UTF-8."""
    return json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The usage object."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "total_tokens": total, "completion_tokens": completion_tokens}


class Answer:
    """The bytes of one answer, whole or as stream events. What all its events share is made once."""

    def __init__(self, ask: Ask, model: Model, created: int) -> None:
        """Nothing has been said yet."""
        self._ask = ask
        self.id = ("chatcmpl-" if ask.chat else "cmpl-") + secrets.token_hex(16)
        kind = "chat.completion" if ask.chat else "text_completion"
        self._head = {"id": self.id, "object": kind, "created": created, "model": model.names[0]}
        chunk = self._head | ({"object": "chat.completion.chunk"} if ask.chat else {})
        self._start = b"data: " + compact(chunk)[:-1] + b',"choices":['
        # vLLM leaves out of a chat's events what was not set, and writes a completion's in full.
        self._rest = b'"}' if ask.chat else b'"'
        self._stop = b"" if ask.chat else b',"stop_reason":null'
        self._usage = b"" if ask.chat else b',"usage":null'

    def role(self, index: int) -> bytes:
        """The first event of a choice of a chat."""
        return self._event(
            b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
            % index,
            0,
        )

    def token(self, index: int, at: int, finish: str | None, made: int) -> bytes:
        """The event of the at-th token (from 0) of a choice. made: tokens of the whole answer up to it."""
        field = b'"delta":{"content":"' if self._ask.chat else b'"text":"'
        piece = PIECES[at % len(PIECES)]
        if self._ask.echo and at == 0:
            piece = compact(self._begin(index))[1:-1] + (piece if self._ask.max_tokens else b"")
        ends = b"null%s}" % self._stop if finish is None else b'"%s","stop_reason":null}' % finish.encode()
        return self._event(
            b'{"index":%d,%s%s%s,"logprobs":null,"finish_reason":%s'
            % (index, field, piece, self._rest, ends),
            made,
        )

    def _begin(self, index: int) -> str:
        """What stands before the first token of a choice: with echo its prompt."""
        return self._ask.prompts[index // self._ask.n].text if self._ask.echo else ""

    def _event(self, choice: bytes, made: int) -> bytes:
        used = self._usage
        if self._ask.continuous_usage:
            used = b',"usage":' + compact(usage(self._ask.prompt_tokens, made))
        return b"%s%s]%s}\n\n" % (self._start, choice, used)

    def last(self, made: int) -> bytes:
        """What ends the stream."""
        if not self._ask.include_usage:
            return b"data: [DONE]\n\n"
        used = compact(usage(self._ask.prompt_tokens, made))
        return b'%s],"usage":%s}\n\ndata: [DONE]\n\n' % (self._start, used)

    def whole(self, lengths: Sequence[tuple[int, str]]) -> bytes:
        """An answer that is not streamed. lengths: (tokens, finish reason) of each choice."""
        choices = []
        for index, (tokens, finish) in enumerate(lengths):
            shown = 0 if self._ask.max_tokens == 0 else tokens
            text = b"".join(PIECES[at % len(PIECES)] for at in range(shown)).decode()
            text = self._begin(index) + text
            content = (
                {"message": {"role": "assistant", "content": text}} if self._ask.chat else {"text": text}
            )
            ends = {"logprobs": None, "finish_reason": finish, "stop_reason": None}
            choices.append({"index": index} | content | ends)
        made = sum(tokens for tokens, _ in lengths)
        return compact(self._head | {"choices": choices, "usage": usage(self._ask.prompt_tokens, made)})
