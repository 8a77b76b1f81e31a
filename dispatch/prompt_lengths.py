"""How many tokens the prompts of other loadbalancers' requests have, by the bytes that their instance saw.

An instance says how many bytes the text of each request had that started there; one of before 0.3.0 how many
the request had, pictures and all. Our own clients said how many tokens their prompts have, so the bytes of a
token here, of these languages and in these envelopes, are the bytes of our own requests over their tokens, of
about the last MEMORY requests. No request is taken to be longer than the longest of our own.
"""

MEMORY = 500.0
"""Requests that make up what is learned."""


class PromptLengths:
    """How many bytes a prompt token takes, learned from our own requests."""

    def __init__(self) -> None:
        """Start before any request was seen: the bytes of a token are not known."""
        self._bytes = self._tokens = self._longest = 0.0

    def learn(self, body_bytes: int, prompt_tokens: float) -> None:
        """Learn from the bytes and prompt tokens of one of our own requests; 0: that length is not known."""
        if body_bytes and prompt_tokens:
            self._bytes += body_bytes - self._bytes / MEMORY
            self._tokens += prompt_tokens - self._tokens / MEMORY
            self._longest = max(self._longest, prompt_tokens)

    def prompt_tokens(self, body_bytes: int) -> float | None:
        """Return the prompt tokens expected in a request of so many bytes; None: nothing is learned yet."""
        if not body_bytes or not self._tokens:
            return None
        return min(self._longest, max(1.0, body_bytes * self._tokens / self._bytes))
