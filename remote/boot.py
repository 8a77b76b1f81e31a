"""What a boot begins with, and what a dead model server leaves behind.

    python3 -m remote.boot begin        fleet/boot is new
    python3 -m remote.boot fail_open    requests that were under way have failed

A program of its own, so that what it imports does not stay in the supervisor's memory.
"""

import os
import shutil
import sys

from remote import events, tokens


def begin(fleet: str) -> str:
    """fleet/boot is new: another boot id, other keys, no token issued, no event. Gives the directory."""
    boot = os.path.join(fleet, "boot")
    shutil.rmtree(boot, ignore_errors=True)
    os.mkdir(boot, 0o700)
    for name in ("boot_id", "local.key"):
        fd = os.open(os.path.join(boot, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as f:
            f.write(os.urandom(16).hex())
    tokens.make_store(boot)
    events.make_ring(boot)
    return boot


def fail_open(fleet: str) -> int:
    """Each request that has started and not ended has failed: its model server is gone. How many."""
    return events.Events(os.path.join(fleet, "boot")).fail_open()


if __name__ == "__main__":
    {"begin": begin, "fail_open": fail_open}[sys.argv[1]](os.path.expanduser("~/fleet"))
