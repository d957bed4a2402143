"""Run a command that the kernel kills as soon as the process that started it is gone.

A test run may be killed with SIGKILL at any moment, and nothing of it may stay behind. Run as
`python -I -S die_with_parent.py PARENT_PID COMMAND…`; it becomes the command, so the pid stays.

The kernel ties this to the *thread* that started the command: start from one that lives on.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def wrap(command: list[str]) -> list[str]:
    """The command line that runs `command` tied to the calling process."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def main(arguments: list[str]) -> None:
    """Ask for SIGKILL at the parent's death, then become the command."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(arguments[0]):  # it died before we asked
        os._exit(1)
    os.execvp(arguments[1], arguments[1:])  # noqa: S606 - that is what it is for


if __name__ == "__main__":
    main(sys.argv[1:])
