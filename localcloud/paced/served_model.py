"""What a paced engine serves."""

from dataclasses import dataclass

NATURAL_TOKENS = 180.0
"""Mean natural length of an answer, in tokens, where the profile says no other."""


@dataclass(frozen=True)
class ServedModel:
    """What is served: its names, of which answers carry the first, and its limits.

    natural_tokens: mean length of an answer that nothing cuts off. auto_tools, tool_parser, reasoning_parser:
    as vLLM's flags; pooling: it makes no text, but "embed" (embeddings) or "classify" (rerank and score).
    chat_template: without one chats are refused.
    """

    names: tuple[str, ...]
    root: str
    max_model_len: int
    natural_tokens: float = NATURAL_TOKENS
    auto_tools: bool = False
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    pooling: str | None = None
    chat_template: bool = True
