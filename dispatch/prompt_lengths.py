"""How many tokens the prompts of other loadbalancers' requests have, by the bytes that their instance saw.

An instance says how long each request was that started there. Our own clients said how many tokens theirs
had, so what a token takes here, of these languages and in these envelopes, is the bytes of our own over
their tokens, of about the last MEMORY. No request is taken to be longer than the longest of our own: a
picture is many bytes and few tokens.
"""

MEMORY = 500.0
"""Requests."""


class Sizes:
    """Learns what a token takes."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._bytes = self._tokens = self._longest = 0.0

    def own(self, body_bytes: int, prompt_tokens: float) -> None:
        """One of our own was so long; 0 bytes: nobody knows."""
        if body_bytes and prompt_tokens:
            self._bytes += body_bytes - self._bytes / MEMORY
            self._tokens += prompt_tokens - self._tokens / MEMORY
            self._longest = max(self._longest, prompt_tokens)

    def prompt_tokens(self, body_bytes: int) -> float | None:
        """Of a request of that length, or None: not known."""
        if not body_bytes or not self._tokens:
            return None
        return min(self._longest, max(1.0, body_bytes * self._tokens / self._bytes))
