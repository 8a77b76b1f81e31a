"""Write the table of request sizes in docs/clients.md: `python -m tests.sizes_page`, or `make sizes`."""

import json
from dataclasses import dataclass
from typing import Any

from fleet_client.token_estimate import BYTES_PER_TOKEN, estimate_request
from remote.lengths import request_size
from tests.paths import ROOT

PAGE = ROOT / "docs" / "clients.md"

BEGIN, END = "<!-- sizes: made by `make sizes`; a test compares -->\n", "<!-- end of sizes -->\n"

TEXT = "Rented machines are cheap by the second, and what is missing is a small program between them. "
FILE = "A" * 1_333_336
"""A file of 1 MB in base64."""

SEARCH = {
    "name": "search",
    "description": "Search the web and return the most relevant pages with a short summary of each.",
    "parameters": {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "What to look for"},
            "limit": {"type": "integer", "minimum": 1, "maximum": 50},
            "language": {"type": "string", "enum": ["en", "de", "fr", "zh"]},
        },
        "required": ["query"],
        "additionalProperties": False,
    },
}
ANTHROPIC_TOOL = {
    "name": SEARCH["name"],
    "description": SEARCH["description"],
    "input_schema": SEARCH["parameters"],
}


@dataclass(frozen=True)
class Case:
    """A request of a kind; ascii: its other characters are escaped, as some programs do."""

    what: str
    path: str
    said: dict[str, Any]
    ascii: bool = False

    @property
    def body(self) -> bytes:
        """What is sent."""
        return json.dumps({"model": "m", **self.said}, ensure_ascii=self.ascii).encode()


def _chat(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    text = {"type": "text", "text": TEXT}
    return {"messages": [{"role": "user", "content": [text, *parts]}], **more}


CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"

CASES = (
    Case("a text of 9,400 characters", "/v1/completions", {"prompt": TEXT * 100, "max_tokens": 9}),
    Case("the same 20 times, n=3", "/v1/completions", {"prompt": [TEXT * 100] * 20, "n": 3}),
    Case("2,000 token ids", "/v1/completions", {"prompt": [7] * 2000}),
    Case(
        "40 messages of a chat",
        CHAT,
        {"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}] * 20},
    ),
    Case("600 Chinese characters", CHAT, {"messages": [{"role": "user", "content": "机器按秒出租" * 100}]}),
    Case(
        "the same, escaped as \\uXXXX",
        CHAT,
        {"messages": [{"role": "user", "content": "机器按秒出租" * 100}]},
        ascii=True,
    ),
    Case("20 tools", CHAT, _chat(tools=[{"type": "function", "function": SEARCH}] * 20)),
    Case(
        "20 tools",
        RESPONSES,
        {"input": TEXT, "tools": [{"type": "function", **SEARCH}] * 20, "instructions": TEXT},
    ),
    Case("20 tools", MESSAGES, _chat(tools=[ANTHROPIC_TOOL] * 20, system=TEXT, max_tokens=9)),
    Case(
        "a picture of 1 MB",
        CHAT,
        _chat({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{FILE}"}}),
    ),
    Case(
        "a picture of 1 MB",
        RESPONSES,
        {
            "input": [
                {
                    "role": "user",
                    "content": [{"type": "input_image", "image_url": f"data:image/png;base64,{FILE}"}],
                }
            ]
        },
    ),
    Case(
        "a picture of 1 MB",
        MESSAGES,
        _chat({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": FILE}}),
    ),
    Case(
        "a picture by its address",
        CHAT,
        _chat({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}),
    ),
    Case(
        "a sound of 1 MB",
        CHAT,
        _chat({"type": "input_audio", "input_audio": {"data": FILE, "format": "wav"}}),
    ),
    Case(
        "a file of 1 MB",
        CHAT,
        _chat({"type": "file", "file": {"file_data": f"data:application/pdf;base64,{FILE}"}}),
    ),
    Case(
        "a file of 1 MB (`input_file`)",
        RESPONSES,
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_data": FILE}]}]},
    ),
    Case(
        "a document of 1 MB",
        MESSAGES,
        _chat(
            {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": FILE}}
        ),
    ),
    Case(
        "a document in plain text, 9,400 characters",
        MESSAGES,
        _chat(
            {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": TEXT * 100}}
        ),
    ),
    Case("50 texts", "/v1/embeddings", {"input": [TEXT * 4] * 50}),
    Case("50 documents", "/v1/rerank", {"query": TEXT, "documents": [TEXT * 4] * 50}),
    Case("50 texts", "/v1/score", {"text_1": TEXT, "text_2": [TEXT * 4] * 50}),
)


@dataclass(frozen=True)
class Sizes:
    """Tokens of a request's prompts: as its client tells, and as its instance counts."""

    told: int
    counted: float

    @property
    def difference(self) -> float:
        """What the instance counts more, as a share."""
        return self.counted / self.told - 1.0


def sizes(case: Case) -> Sizes:
    """Return what both sides say of that request."""
    told = estimate_request("POST", case.path, case.body).prompt_tokens
    return Sizes(told, request_size(case.body) / BYTES_PER_TOKEN)


def table() -> str:
    """Return the table."""
    head = "request", "route", "bytes", "client tells", "instance counts", "difference"
    rows = [f"| {' | '.join(head)} |\n", "|---|---|--:|--:|--:|--:|\n"]
    for case in CASES:
        found = sizes(case)
        rows.append(
            f"| {case.what} | `{case.path}` | {len(case.body):,} | {found.told:,} | {found.counted:,.0f} "
            f"| {found.difference:+.1%} |\n"
        )
    return "".join(rows)


def main() -> None:
    """Write the table into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
