"""What is expected of a request before it runs: its work, its row in the prediction; the usual request."""

import math
from dataclasses import replace

from dispatch.agreement import Agreement
from dispatch.output_lengths import OutputLengths
from dispatch.predicted_load import request_row
from dispatch.prompt_lengths import PromptLengths
from dispatch.route_request import RouteRequest
from engine.forward import LEFT, PROMPT, UNREAD, Floats
from web.messages.hot_set import HotSetHead

PROMPT_RANGE = 2
"""Most that the true length of a prompt is shorter than what its client believed, as a ratio: clients count
bytes, 4 a token, and text of 8 bytes a token is hardly ever met. What may fit is left to the engine."""

ANSWER_RANGE = 32.0
"""Most that an answer counts, as a ratio to the mean of its kind or the told one: no such answer was met in
the traces, and one number must not change what is believed of all."""

BYTES_RANGE = 0.5, 64.0
"""Bytes of a token that are believed: from dense scripts to long words."""

MIX_MEMORY = 500.0
"""Requests that make up what is usual: prompt and work."""

EXPECTED_OUTPUT_TOKENS, PREFILL_WEIGHT = 200.0, 0.1
"""Tokens of an answer, and work to read a prompt token, until a hot set says what they are for its model."""


class RequestEstimates:
    """Learns the lengths of answers and prompts, and what the usual request is.

    Work is in output-token equivalents: prompt tokens times prefill_weight, and the tokens of the answer.
    """

    def __init__(self) -> None:
        """Start with the lengths and weights of a usual model, until a hot set says others."""
        self.prefill_weight = PREFILL_WEIGHT
        self.max_model_len: int | None = None  # tokens of a prompt with its answer; None: not told
        self.output_lengths = OutputLengths(EXPECTED_OUTPUT_TOKENS)
        self.mean_work = EXPECTED_OUTPUT_TOKENS
        self.mean_prompt = 0.0  # tokens
        self.mean_prompt_squares = 0.0
        self.usual = request_row(1.0, EXPECTED_OUTPUT_TOKENS, math.inf, 0)
        self._prompt_lengths = PromptLengths()
        self._answers: Agreement[tuple[int, int]] = Agreement()  # tokens, kind
        self._prompts_said: Agreement[tuple[int, float]] = Agreement()  # bytes, tokens
        self._given = 0  # leases, in all
        self._prompts, self._prompt_sum, self._square_sum = 0, 0.0, 0.0  # of those since the last tick

    def update(self, hot_set: HotSetHead) -> None:
        """Take over the figures of the model that a hot set gives: weight, context length, mean answer."""
        self.prefill_weight = hot_set.prefill_weight
        self.max_model_len = hot_set.max_model_len
        expected = hot_set.expected_output_tokens
        if not self.output_lengths.completions:
            self.mean_work = expected
        if expected != self.output_lengths.told:
            self.output_lengths.tell(expected)

    # -- one request --

    def possible_prompt(self, prompt_tokens: int, prompts: int) -> int | None:
        """Return the prompt tokens that a client believes to send, bounded by the context of the model.

        prompts: how many prompts they are in. None: the model can certainly not take them.
        """
        if self.max_model_len is None:
            return prompt_tokens
        most = prompts * self.max_model_len
        return min(prompt_tokens, most) if prompt_tokens <= PROMPT_RANGE * most else None

    def usable(self, ask: RouteRequest, most_work: float) -> RouteRequest:
        """Return a request as far as one instance, which may hold most_work, can work on it at once.

        A request runs on one instance, whatever work its client says that it is: it is given an idle one, and
        is demand for no more than one.
        """
        if ask.work <= most_work:
            return ask
        most_prompt = int(most_work / max(self.prefill_weight, 1e-6))
        return replace(ask, work=most_work, prompt_tokens=min(ask.prompt_tokens, most_prompt))

    def work_of(self, prompt_tokens: int, max_tokens: int | None) -> float:
        """Return the work expected of a request with such lengths, in output-token equivalents."""
        output = self.expected_output(prompt_tokens, max_tokens)
        return max(1.0, prompt_tokens * self.prefill_weight + output)

    def expected_output(self, prompt_tokens: int, max_tokens: int | None) -> float:
        """Return the mean tokens that requests with such lengths were answered with."""
        return self.output_lengths.mean(self.output_lengths.kind(prompt_tokens, max_tokens), max_tokens)

    def row(self, ask: RouteRequest) -> Floats:
        """Return the table row of a request, as for an instance that has served no prefix of its prompt."""
        max_tokens, prompt_tokens = ask.max_tokens, ask.prompt_tokens
        kind = self.output_lengths.kind(prompt_tokens, max_tokens)
        expected = self.output_lengths.mean(kind, max_tokens)
        prompt = float(prompt_tokens)
        if not prompt_tokens:  # only its work was told
            prompt = max(0.0, ask.work - expected) / max(self.prefill_weight, 1e-3)
        return request_row(prompt, expected, math.inf if max_tokens is None else float(max_tokens), kind)

    def row_of_other(self, body_bytes: int) -> Floats:
        """Return the table row of another loadbalancer's request, by its bytes; 0 bytes: as is usual."""
        prompt = self._prompt_lengths.prompt_tokens(body_bytes)
        if prompt is None:
            return self.usual
        kind = self.output_lengths.kind(round(prompt), None)
        return request_row(prompt, self.output_lengths.mean(kind, None), math.inf, kind)

    # -- learning --

    def given(self, work: float, row: Floats) -> None:
        """Count a request that is given a lease into what is usual. row: its table row."""
        self._given += 1
        self.mean_work += (work - self.mean_work) / MIX_MEMORY
        prompt = float(row[PROMPT])
        self._prompts += 1
        self._prompt_sum += prompt
        self._square_sum += prompt * prompt

    def started(self, row: Floats, body_bytes: int, instance_id: int, hot: int) -> None:
        """Learn the bytes of a token from one of our own requests; body_bytes 0: not known.

        instance_id: which says so, of `hot` that serve.
        """
        prompt = row.item(PROMPT)
        if body_bytes and prompt:
            said = math.log(min(BYTES_RANGE[1], max(BYTES_RANGE[0], body_bytes / prompt)))
            for told, tokens in self._prompts_said.note(instance_id, said, (body_bytes, prompt), hot):
                self._prompt_lengths.learn(round(min(told, BYTES_RANGE[1] * tokens)), tokens)

    def finished(self, kind: int, output_tokens: int, most: float, instance_id: int, hot: int) -> None:
        """Learn from a request that was answered in full. most: tokens that the answer may have had.

        What an instance says counts as far as it can be: no longer than was allowed and than the model's
        context, and no more than ANSWER_RANGE times what is usual; and if it says what most others say
        (dispatch/agreement.py). instance_id: which says so, of `hot` that serve.
        """
        if self.max_model_len is not None and math.isinf(most):  # else it may be of several answers
            most = self.max_model_len
        lengths = self.output_lengths
        usual = ANSWER_RANGE * lengths.told
        if output_tokens > usual:  # hardly ever: what is usual of its kind need not be looked up before
            usual = max(usual, ANSWER_RANGE * lengths.mean(kind))
        tokens = min(output_tokens, int(min(most, usual)))
        said = math.log(max(1, tokens) / max(1.0, lengths.mean(kind)))
        for told, of in self._answers.note(instance_id, said, (tokens, kind), hot):
            lengths.ended(told, of)

    def tick(self) -> None:
        """Update the usual request by the leases given since the last tick."""
        if self._prompts:
            share = self._prompts / min(MIX_MEMORY + self._prompts, self._given)
            self.mean_prompt += share * (self._prompt_sum / self._prompts - self.mean_prompt)
            self.mean_prompt_squares += share * (self._square_sum / self._prompts - self.mean_prompt_squares)
            self._prompts, self._prompt_sum, self._square_sum = 0, 0.0, 0.0
        self.usual[PROMPT] = self.usual[UNREAD] = max(1.0, self.mean_prompt)
        self.usual[LEFT] = self.output_lengths.mean(0)
