"""Replay protection: a message of an instance counts only the first time. No I/O, no clock."""

OLD_BOOTS = 64
"""Boots of an instance that are remembered to be over."""


class ReplayGuard:
    """What was heard of one instance: its boot, the number of its last message, and the boots before."""

    def __init__(self) -> None:
        """Make a guard for an instance of which nothing was heard yet."""
        self._boot_id: str | None = None
        self._number = -1
        self._old: dict[str, None] = {}

    def accept(self, boot_id: str, number: int) -> bool:
        """Return whether a message is new, judged by its boot and number, and remember it as heard."""
        if boot_id in self._old or (boot_id == self._boot_id and number <= self._number):
            return False
        if boot_id != self._boot_id and self._boot_id is not None:
            self._old[self._boot_id] = None
            if len(self._old) > OLD_BOOTS:
                del self._old[next(iter(self._old))]
        self._boot_id, self._number = boot_id, number
        return True
