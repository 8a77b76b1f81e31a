"""Whether a listing of the cloud is believed.

A listing that failed, or that lacks most of what was there, is "unknown", never "no instances": nothing is
decided on it and no deadline passes, because with the cloud away a dead machine looks like a dead view of it.
"""

from collections.abc import Iterable, Mapping

from fleet.instance import Instance
from vast.rows import Row


class ListingTrust:
    """Weighs each listing against what was expected in it."""

    def __init__(self, disbelief_s: float, short_s: float) -> None:
        """disbelief_s: a listing that lacks most of the fleet for so long is believed.

        short_s: the same where all that it lacks does not answer our checks, either.
        """
        self.believed = False
        self.read_at: float | None = None  # when one was last read, believed or not
        self.lacking_since: float | None = None  # since when they lack most of the fleet
        self._disbelief_s, self._short_s = disbelief_s, short_s
        self._blind_since: float | None = float("-inf")  # since when none was believed

    def fail(self, now: float) -> None:
        """Note that there is no listing."""
        self._note(False, now)

    def restore(self, lacking_since: float | None) -> None:
        """Go on from the disbelief of the last process: it must not begin anew with each restart."""
        self.lacking_since = lacking_since

    def weigh(self, found: int, expected: int, now: float, *, dead: bool) -> bool:
        """Say whether the listing is believed that shows so many of the expected instances.

        dead: what it lacks does not answer our checks. Return whether it is the first of a row that lacks
        more than half of them.
        """
        lacks = 2 * found < expected
        first = lacks and self.lacking_since is None
        if not lacks:
            self.lacking_since = None
        elif first:
            self.lacking_since = now
        patience_s = self._short_s if dead else self._disbelief_s
        self._note(self.lacking_since is None or now - self.lacking_since >= patience_s, now)
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
