"""Text from outside, made safe where it enters: what a host, the cloud, ssh or a client says.

Such a text ends in the log, in the ledger, in JSON and on terminals. A lone surrogate cannot be encoded, a
control character can move a terminal's cursor or fake a line of a log, and its length is whatever its author
likes.
"""

MAX_WHY = 300
"""Characters of a reason; what instances say is cut to it at home."""

_FORBIDDEN = dict.fromkeys(
    [*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], " "
)
_FORBIDDEN |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


def safe_text(text: str, most: int = MAX_WHY) -> str:
    """Return the text made safe for logs and terminals: one line, at most `most` characters.

    Control characters and those that turn the direction of writing become spaces, lone surrogates U+FFFD.
    """
    # What cannot be kept is not looked at: a text may have many megabytes.
    kept = text[: most + 1].translate(_FORBIDDEN)
    return kept if len(kept) <= most else kept[: most - 1] + "…"
