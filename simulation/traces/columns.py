"""What the columns of a log are called, by those who publish logs and by those who keep their own."""

import re
from collections.abc import Iterable, Mapping
from hashlib import blake2b

BYTES_PER_TOKEN = 4
"""Bytes of text in a token, where a log has the text and not its length."""

TIMES = (
    *("arrival_s", "arrival_ms", "arrival", "arrived_at", "arrival_time", "arrival_timestamp", "timestamp"),
    *("request_timestamp", "request_time", "request_start", "request_start_time", "start_time", "start"),
    *("time", "ts", "tstamp", "datetime", "date", "created_at", "create_time", "created", "sent_at"),
    *("submitted_at", "request_start_ns", "timestamp_ms", "timestamp_s", "timestamp_ns", "start_ts"),
)
PROMPTS = (
    *("prompt_tokens", "input_tokens", "context_tokens", "contexttokens", "request_tokens", "input_length"),
    *("prompt_length", "input_len", "prompt_len", "isl", "input_sequence_length", "num_prefill_tokens"),
    *("num_prompt_tokens", "num_input_tokens", "prefill_tokens", "context_length", "tokens_in"),
)
OUTPUTS = (
    *("output_tokens", "completion_tokens", "generated_tokens", "generatedtokens", "response_tokens"),
    *("output_length", "response_length", "output_len", "osl", "output_sequence_length"),
    *("num_decode_tokens", "num_output_tokens", "num_generated_tokens", "decode_tokens", "tokens_out"),
)
SESSIONS = (
    *("session", "session_id", "conversation_id", "conversation_hash", "client", "client_id", "user_id"),
)
TEXTS = ("text_input", "prompt", "input", "messages", "text", "question", "request")
ANSWERS = ("text_output", "output", "response", "completion", "answer")
CHATS = ("chat_id", "parent_chat_id", "turn", "turn_id")


def plain(name: str) -> str:
    """Return a column's name in small letters, with _ between words."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def first_of(wanted: Iterable[str], there: Mapping[str, object]) -> str | None:
    """Return the first of these names that is there, and not empty."""
    return next((name for name in wanted if there.get(name) is not None), None)


def named(name: str) -> int:
    """Return the number of a session that has a name: larger than any number that a log gives itself."""
    name = name.strip()
    if name in ("", "-1", "nan", "None"):
        return -1
    return (1 << 60) + int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "big")


def session_of(value: object) -> int:
    """Return the session that a row names, by number or by name."""
    return value if type(value) is int and 0 <= value < 10**12 else named(str(value))


def tokens_in(value: object, depth: int = 0) -> int:
    """Return about how many tokens a text has, or all texts in a list of messages."""
    if isinstance(value, str):
        return -(-len(value.encode(errors="replace")) // BYTES_PER_TOKEN)
    if depth > 9:
        return 0
    if isinstance(value, dict):
        value = [value.get(name) for name in ("content", "value", "text")]
    return sum(tokens_in(one, depth + 1) for one in value) if isinstance(value, list) else 0
