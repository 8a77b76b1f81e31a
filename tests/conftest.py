"""For all tests, before any."""

import signal

# A shell that starts a job in the background has it ignore SIGINT, and so would all that the tests start and
# interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
