"""Whether a listing of the cloud is believed.

A listing that failed, or that lacks most of what was there, is "unknown", never "no instances": nothing is
decided on it and no deadline passes, because with the cloud away a dead machine looks like a dead view of it.
"""

from collections.abc import Iterable, Mapping

from fleet.instance import Instance
from vast.rows import Row


class ListingTrust:
    """Weighs each listing against what was expected in it."""

    def __init__(self, disbelief_s: float) -> None:
        """disbelief_s: a listing that lacks most of the fleet for so long is believed."""
        self.believed = False
        self.read_at: float | None = None  # when one was last read, believed or not
        self._disbelief_s = disbelief_s
        self._lacking_since: float | None = None
        self._blind_since: float | None = float("-inf")  # since when none was believed

    def fail(self, now: float) -> None:
        """Note that there is no listing."""
        self._note(False, now)

    def weigh(self, found: int, expected: int, now: float) -> bool:
        """Say whether the listing is believed that shows so many of the expected instances.

        Return whether it is the first of a row that lacks more than half of them.
        """
        lacks = 2 * found < expected
        first = lacks and self._lacking_since is None
        if not lacks:
            self._lacking_since = None
        elif first:
            self._lacking_since = now
        self._note(self._lacking_since is None or now - self._lacking_since >= self._disbelief_s, now)
        return first

    def _note(self, believed: bool, now: float) -> None:
        self.believed = believed
        if not believed and self._blind_since is None:
            self._blind_since = now

    def end_outage(self, now: float) -> float:
        """Return for how many seconds no listing was believed before this one, which is."""
        since, self._blind_since = self._blind_since, None
        return 0.0 if since is None else now - since

    def note_read(self, now: float) -> None:
        """Note that the listing was taken over."""
        self.read_at = now


def rows_by_label(
    rows: Iterable[Row], prefix: str, known: Mapping[str, Instance]
) -> tuple[dict[str, Row], set[str]]:
    """Return the rows whose label has that prefix, and the labels among them that are made up.

    A second row of one label, or one with another id than is known, gets a label of its own: `<label>#<id>`.
    """
    ours: dict[str, Row] = {}
    twins: set[str] = set()
    for row in rows:
        if row.label is None or not row.label.startswith(prefix):
            continue
        label, i = row.label, known.get(row.label)
        if label in ours or (i and i.id is not None and i.id != row.id):
            label = f"{label}#{row.id}"
            twins.add(label)
        ours[label] = row
    return ours, twins
