"""What ties a remediation to this host: its clocks, the identity of a process, its lock files.

Wall clocks step and process ids are reused. So spans of time within one boot are measured on the
boot clock, an executor is named by boot id, pid and start time, and two processes on one host are
kept apart by a kernel lock that dies with its holder.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from remediator.model import Claim


class Clock(Protocol):
    """The two clocks in use; tests bring their own."""

    boot_id: str

    def now(self) -> datetime:
        """The wall clock, UTC."""

    def boottime(self) -> float:
        """Seconds since boot, sleep included; no step of the wall clock moves it."""


class HostClock:
    """The kernel's clocks."""

    def __init__(self, procfs: Path = Path("/proc")) -> None:
        self.boot_id = (procfs / "sys/kernel/random/boot_id").read_text().strip()

    def now(self) -> datetime:
        return datetime.now(UTC)

    def boottime(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)


def start_time(pid: int, procfs: Path = Path("/proc")) -> int | None:
    """Start time of a process in ticks since boot; None where there is none, or only its zombie.

    The comm may hold spaces and parentheses: fields are counted after the last `)`.
    """
    try:
        stat = (procfs / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):
        return None
    return int(fields[19])


def own_claim(clock: Clock, procfs: Path = Path("/proc")) -> Claim:
    """The claim of the calling process."""
    pid = os.getpid()
    started = start_time(pid, procfs)
    if started is None:
        raise OSError(
            f"{procfs}/{pid}/stat doesn't show this process; is /proc of another PID namespace?"
        )
    return Claim(boot_id=clock.boot_id, pid=pid, start_time=started)


def owner_alive(claim: Claim, boot_id: str, procfs: Path = Path("/proc")) -> bool:
    """Whether the process that claimed is still there. What can't be read counts as alive."""
    if claim.boot_id != boot_id:
        return False
    try:
        return start_time(claim.pid, procfs) == claim.start_time
    except (OSError, ValueError, IndexError):
        return True


class LockedError(Exception):
    """Another process of this host holds the lock; the sentence names it."""


@contextmanager
def host_lock(directory: Path, name: str) -> Iterator[None]:
    """Hold `<directory>/<name>.lock` without waiting; the kernel frees it when the holder dies."""
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    handle = _locked(directory / f"{name}.lock")
    try:
        with suppress(OSError):  # on a full disk: it's held all the same, only not by whom
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _locked(path: Path) -> int:
    """The file's descriptor, locked. One that is no longer found by its name locks nobody out."""
    for _ in range(10):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), path.lstat()):
                return handle
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            raise LockedError(f"another process (pid {holder}) holds {path}; wait for it") from None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    raise LockedError(f"{path} is removed as often as it's made; find out by whom")
