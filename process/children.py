"""Children that do not outlive their parent, whatever ends it.

prctl(PR_SET_PDEATHSIG) makes the kernel send a signal when the *thread* that started the child ends
(prctl(2)), also after `kill -9`. It holds through exec, so a small Python sets it and becomes the program;
doing it between fork and exec in a process with threads would not be safe. The starting thread must therefore
live as long as the child shall.
"""

import os
import sys
from collections.abc import Sequence

_PROGRAM = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):  # else it died before the line above
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def dying_with_parent(command: Sequence[str]) -> tuple[str, ...]:
    """The command for Popen that runs that command and ends with the calling process."""
    return (sys.executable, "-I", "-S", "-c", _PROGRAM, str(os.getpid()), *command)
