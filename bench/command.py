"""What the commands of the benchmarks have in common: flags, the machine they ran on, figures as JSON."""

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.children import ROOT
from fleet_client.flags import Parser
from process.errors import ConfigError

TRACES = ROOT.parent / "shared" / "traces"
"""Directory of the logs."""


def bench_parser(name: str, doc: str | None) -> Parser:
    """Return a parser with --json for `python -m bench.NAME`, described by the first line of its doc."""
    parser = Parser(prog=f"bench.{name}", description=(doc or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there (default: none)")
    return parser


def add_traces(parser: Parser) -> None:
    """Add --traces."""
    parser.add_argument(
        "--traces", type=Path, default=TRACES, metavar="DIR", help="the logs (default %(default)s)"
    )


def add_counts(parser: Parser, *counts: tuple[str, int, str]) -> None:
    """Add flags with a whole number: (flag, default, meaning) each."""
    for flag, default, meaning in counts:
        shown = f"{meaning} (default %(default)d)"
        parser.add_argument(flag, type=int, default=default, metavar="N", help=shown)


def names_in(flag: str, text: str, known: Iterable[str]) -> list[str]:
    """Return the names of a list with commas; ConfigError for one that is not known."""
    names = [part for part in text.split(",") if part]
    for name in names:
        if name not in known:
            raise ConfigError(f"{flag} {name!r}: known are {', '.join(known)}")
    return names


def numbers_in(flag: str, text: str) -> list[float]:
    """Return the numbers of a list with commas; ConfigError for what is none."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} {text}: wanted numbers with commas") from None


def machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_1_min": os.getloadavg()[0],
    }


def write_json(path: Path | None, figures: Any) -> None:
    """Write the figures there; nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")
