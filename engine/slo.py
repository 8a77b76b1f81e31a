"""The latency objective (service level objective): when a request counts as served in time.

    first token   at most first_token_s + prompt_token_s * prompt tokens after it was sent
    the others    at most output_token_s each, on average over the request

The defaults are the objective of all our comparisons: two seconds and a millisecond for each prompt token,
because a long prompt takes long to read; and ten tokens a second, twice as fast as people read.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slo:
    """The limits of the latency objective, in seconds, on the first token and on each later one.

    prompt_token_s: what each prompt token adds to the time allowed for the first token.
    """

    first_token_s: float = 2.0
    prompt_token_s: float = 0.001
    output_token_s: float = 0.1

    def __post_init__(self) -> None:
        """Refuse limits of the latency objective that no server could keep, with a ValueError."""
        for name in ("first_token_s", "output_token_s"):
            if not 0.0 < getattr(self, name) <= 3600.0:
                raise ValueError(f"{name}: wanted over 0 to 3600, got {getattr(self, name)!r}")
        if not 0.0 <= self.prompt_token_s <= 1.0:
            raise ValueError(f"prompt_token_s: wanted 0 to 1, got {self.prompt_token_s!r}")

    def first_token_limit_s(self, prompt_tokens: float) -> float:
        """Return within how many seconds the first token must come, for a prompt of this length."""
        return self.first_token_s + self.prompt_token_s * prompt_tokens

    def met(self, prompt_tokens: int, output_tokens: int, first_token_s: float, end_s: float) -> bool:
        """Return whether a request was served in time: its first token, and the later ones on average.

        first_token_s, end_s: seconds after it was sent. Of an answer of one token only the first limit
        counts. 1 µs is forgiven.
        """
        if first_token_s > self.first_token_limit_s(prompt_tokens) + 1e-6:
            return False
        others = output_tokens - 1
        return others < 1 or end_s - first_token_s <= self.output_token_s * others + 1e-6
