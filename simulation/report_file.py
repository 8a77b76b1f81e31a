"""The files that a run of sim.py writes: checked before the run begins, written when it has ended."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from process.errors import ConfigError
from simulation.report_words import WORDS
from web.page_bundle import self_contained


def check_output(flag: str, path: Path | None) -> None:
    """Raise ConfigError if this file, named by a flag, cannot be written because of its directory."""
    if path is not None:
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"{flag} {path}: there is no directory {path.absolute().parent}")
        if path.is_dir():
            raise ConfigError(f"{flag} {path}: wanted a file, that is a directory")


def write_report(found: Mapping[str, Any], path: Path | None) -> None:
    """Write a run's report to a file as JSON; do nothing if the path is None. Raises ConfigError."""
    if path is not None:
        _write("--json", path, json.dumps(found, indent=1, default=str) + "\n")


def write_page(found: Mapping[str, Any], path: Path | None) -> None:
    """Write a run's report to a file as a page for a browser that needs no other file and no server.

    Do nothing if the path is None. Raises ConfigError.
    """
    if path is not None:
        title = f"{found['model']}: {outcome(found)}"
        page = self_contained("report.html", "report.js", title, {**found, "words": WORDS})
        _write("--html", path, page)
        print(f"the report as a page: {path.absolute().as_uri()}", file=sys.stderr, flush=True)


def outcome(found: Mapping[str, Any]) -> str:
    """Return what came of a run in a few words."""
    met, usd = found["objective"]["met_share"], found["cost_usd"]["total"]
    said = [] if met is None else [f"{met:.{2 if met > 0.999 else 1}%} of requests in time"]
    return ", ".join([*said, *([] if usd is None else [f"${usd:,.2f}"])]) or "nothing was measured"


def _write(flag: str, path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as e:
        raise ConfigError(f"{flag} {path} cannot be written: {e.strerror}") from e
