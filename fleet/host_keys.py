"""The ssh host keys of instances: the first one that an instance shows, and when another is believed.

A host key lives on the instance's disk. It stays through stop and start, and is a new one after the host has
made the container anew ("recycle"). Another key than the last is believed once, if since that one was shown

    the instance itself has said so     a signed word of a boot that is a newer one than then
    the cloud has said so               a container that is younger, and whose start we have not ordered

and never otherwise: right after a stop and a start of ours another machine may be answering. What rests on it
is the log only: the certificate of an instance that signs its words comes with them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fleet.instance import Instance

ROUNDED_S = 60.0
"""By so much the age of a container may be too small: it is listed in minutes."""


@dataclass(frozen=True)
class SeenKey:
    """A host key, when it was shown last, and the boot of the instance's last word then ("": none known)."""

    key: str
    at: float = float("-inf")
    boot_id: str = ""


class HostKeys:
    """The host key that is believed of each instance, by label."""

    def __init__(self) -> None:
        """Begin without any."""
        self._seen: dict[str, SeenKey] = {}

    def restore(self, saved: Mapping[str, str]) -> None:
        """Take over the keys that the last process saved."""
        self._seen.update({label: SeenKey(key) for label, key in saved.items()})

    def get(self, label: str) -> str | None:
        """Return the key of an instance; None before it has shown one."""
        return self._seen[label].key if label in self._seen else None

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Iterate over pairs (label, key)."""
        return iter((label, seen.key) for label, seen in self._seen.items())

    def show(self, label: str, key: str, i: Instance | None, now: float) -> bool:
        """Take in the key that an instance shows now; return whether it is to be saved, as one not known.

        i: the instance, None if it is not known any more. A key that is not believed changes nothing.
        """
        before = self._seen.get(label)
        known = before is not None and before.key == key
        if before is not None and not known and not (i and _made_anew(i, before)):
            return False
        self._seen[label] = SeenKey(key, now, i.ear.boot_id if i else "")
        return not known


def _made_anew(i: Instance, before: SeenKey) -> bool:
    """Return whether the instance, or the cloud, says that its container is another one than then."""
    if i.ear.certificate and i.ear.boot_id != before.boot_id:
        return True
    began, ordered = i.container_began, i.boot.ordered_at or i.ordered_at
    return began is not None and ordered <= before.at < began - ROUNDED_S
