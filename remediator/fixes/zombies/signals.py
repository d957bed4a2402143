"""Sends a signal to one process and to no other: pids are reused, process descriptors aren't.

The descriptor is opened first, then everything known of the process is read again, then the signal
goes through the descriptor. Whatever took the pid's place in between can't be hit.
"""

import errno
import os
import signal
from collections.abc import Callable
from enum import Enum

from exporter.checks.procfs import ProcessGoneError, Procfs
from exporter.checks.zombies import Identity


class Sent(Enum):
    """How an attempt to signal came out."""

    SENT = "sent"
    GONE = "gone"
    """The process ended, or another one has its pid now: nothing was sent."""
    CHANGED = "changed"
    """It's there, but isn't what it was at the check: nothing was sent."""


class Pidfds:
    """Signals by process descriptor. `open` and `send` are the two system calls."""

    def __init__(
        self,
        procfs: Procfs,
        open: Callable[[int], int] = os.pidfd_open,  # noqa: A002 - as the system call is called
        send: Callable[[int, int], None] = signal.pidfd_send_signal,
    ) -> None:
        self._procfs = procfs
        self._open = open
        self._send = send

    def supported(self) -> bool:
        """Whether this kernel has process descriptors (5.3 and later)."""
        try:
            os.close(self._open(os.getpid()))
        except OSError as error:
            return error.errno not in (errno.ENOSYS, errno.EPERM)
        return True

    def send(self, identity: Identity, number: signal.Signals, still: Callable[[], bool]) -> Sent:
        """Signal the process, if `still()` says that it is what it was.

        `OSError` where the signal may not be sent; `ProcfsError` where the process can't be read.
        """
        try:
            handle = self._open(identity.pid)
        except ProcessLookupError:
            return Sent.GONE
        try:
            stat = self._procfs.stat(identity.pid)
            if stat.starttime != identity.starttime or stat.state == "Z":
                return Sent.GONE
            if not still():
                return Sent.CHANGED
            self._send(handle, number)
        except (ProcessGoneError, ProcessLookupError):
            return Sent.GONE
        finally:
            os.close(handle)
        return Sent.SENT
