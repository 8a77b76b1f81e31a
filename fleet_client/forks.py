"""Lets objects with connections, leases and threads start anew in a process that is a fork of another.

After os.fork (gunicorn --preload, multiprocessing, Celery, a daemon) both processes have the same open
connections, the same leases and, in the child, threads that do not run and locks that nobody will release.
All of it is the parent's: a child that used a connection would mix two TLS streams, and one that shut it down
would cut the parent's answer off.
"""

import os
import weakref
from typing import Protocol


class StartsAnew(Protocol):
    """The protocol of objects that hold something which a child process must not share with its parent."""

    def start_anew(self) -> None:
        """Drop what is the parent's without touching it; called in the child, before anything else."""


_SHARED: "weakref.WeakSet[StartsAnew]" = weakref.WeakSet()


def start_anew_in_forks(one: StartsAnew) -> None:
    """Call the object's `start_anew` in each fork of this process, as long as the object lives."""
    _SHARED.add(one)


def _start_all_anew() -> None:
    for one in list(_SHARED):
        one.start_anew()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_start_all_anew)
