"""The commands of the first hour, read out of docs/vast-ai.md: what stands there is what is run."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "vast-ai.md"
CHAPTER = "## The first hour"


@dataclass(frozen=True)
class DocumentedStep:
    """One step of the first hour. shell: its commands, one a line; python: a program, if there is one."""

    title: str
    shell: tuple[str, ...] = ()
    python: str = ""


def documented_steps(page: Path = PAGE) -> Mapping[str, DocumentedStep]:
    """Return the steps of the first hour by their title, in the page's order; LookupError without any."""
    _, found, after = page.read_text().partition(f"{CHAPTER}\n")
    chapter = re.split(r"^## ", after, maxsplit=1, flags=re.MULTILINE)[0]
    steps = {}
    for part in re.split(r"^### \d+\. ", chapter, flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        shell = [line for kind, block in blocks if kind == "sh" for line in _commands(block)]
        python = "\n".join(block for kind, block in blocks if kind == "python")
        steps[title] = DocumentedStep(title, tuple(shell), python)
    if not found or not steps:
        raise LookupError(f"{page}: no step below {CHAPTER!r}")
    return steps


def _commands(block: str) -> list[str]:
    """Return the commands of a shell block, without their comments."""
    lines = (shlex.join(shlex.split(line, comments=True)) for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]
