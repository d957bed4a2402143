"""Runs a program that the kernel kills when the process which wanted it dies.

`make run` may end by kill -9, and must not leave a Prometheus behind. The kernel's parent-death
signal survives exec, so this sets it and becomes the program. Usage: `python bound.py PARENT_PID
PROGRAM [ARGUMENT…]`; the standard library alone, so that it starts at once.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Never returns."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606 - an argument list and no shell: just that


if __name__ == "__main__":
    main()
