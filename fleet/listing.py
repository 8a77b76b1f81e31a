"""Whether a listing of the cloud is believed.

A listing that failed, or that lacks most of the instances that were there, is "unknown", never "no
instances": nothing is decided on it and no deadline passes, because while the cloud is out of reach a dead
machine looks the same as one that merely cannot be seen.
"""

from collections.abc import Iterable, Mapping

from fleet.instance import Instance
from vast.rows import Row


class ListingTrust:
    """Weighs each listing of the cloud against the instances that were expected in it."""

    def __init__(self, disbelief_s: float, short_s: float) -> None:
        """Start before the first listing.

        disbelief_s: listings that lack most of the fleet are believed after so long. short_s: the same where
        all missing instances do not answer our checks, either.
        """
        self.believed = False
        self.read_at: float | None = None  # when one was last read, believed or not
        self.lacking_since: float | None = None  # since when they lack most of the fleet
        self._disbelief_s, self._short_s = disbelief_s, short_s
        self._blind_since: float | None = float("-inf")  # since when none was believed

    def fail(self, now: float) -> None:
        """Note that no listing could be had."""
        self._note(False, now)

    def restore(self, lacking_since: float | None) -> None:
        """Take over since when the last process disbelieved listings: a restart does not begin anew."""
        self.lacking_since = lacking_since

    def weigh(self, found: int, expected: int, now: float, *, dead: bool) -> bool:
        """Decide whether a listing is believed that shows `found` of the `expected` instances.

        dead: the missing ones do not answer our checks. Return whether the listing is the first of a row that
        lacks more than half of the instances.
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
        """Return for how many seconds no listing was believed before this one, which is believed."""
        since, self._blind_since = self._blind_since, None
        return 0.0 if since is None else now - since

    def note_read(self, now: float) -> None:
        """Note that a listing was taken over now."""
        self.read_at = now


def rows_by_label(
    rows: Iterable[Row], prefix: str, known: Mapping[str, Instance]
) -> tuple[dict[str, Row], set[str]]:
    """Return the rows whose label has that prefix, and which of their labels are made up.

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
