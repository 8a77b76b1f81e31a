"""Text files that a person edits: they are read in one way, and errors name the line."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from fleet_client.errors import ConfigError

MOST_BYTES = 16 * 2**20
"""Of such a file; what is longer is some other file."""

_NOT_UTF_8 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path, what: str) -> str:
    """Return the text of a file in UTF-8, without a byte order mark (Windows' editors write one).

    what: a name of the file for the text of ConfigError, which is raised when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"{what} {path} cannot be read: {e.strerror}") from e
    if len(raw) > MOST_BYTES:
        raise ConfigError(f"{what} {path} has over {MOST_BYTES} bytes")
    if raw.startswith(_NOT_UTF_8):
        raise ConfigError(f"{what} {path}, line 1: it is UTF-16 or UTF-32: save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise ConfigError(f"{what} {path}, line {line}: not text in UTF-8") from None


def said_in(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) of a text with one item a line, without blank lines and comments (# …)."""
    for number, line in enumerate(text.split("\n"), start=1):
        found = line.strip(" \t\r")
        if found and not found.startswith("#"):
            yield number, found
