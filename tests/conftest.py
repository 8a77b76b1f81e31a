"""For all tests, before any."""

import logging
import signal
from collections.abc import Iterator

import pytest

# A shell that starts a job in the background has it ignore SIGINT, and so would all that the tests start and
# interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def levels_of_loggers_stay() -> Iterator[None]:
    """Undo what a command that ran inside a test said of logging: the next test reads the log."""
    known = {
        name: one for name, one in logging.root.manager.loggerDict.items() if isinstance(one, logging.Logger)
    }
    before = {name: one.level for name, one in known.items()}
    yield
    for name, one in logging.root.manager.loggerDict.items():
        if isinstance(one, logging.Logger) and one.level != before.get(name, one.level):
            one.setLevel(before[name])
