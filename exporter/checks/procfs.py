"""Reads processes from the proc file system as they are, whatever a tenant named them.

A process chooses its own name, so nothing here ever splits a line at a name: fields are counted
after the last `)`. Every answer names its process by pid and start time, since pids are reused.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

_KERNEL_THREAD = 0x00200000  # PF_KTHREAD of include/linux/sched.h
_COUNT_AFTER_NAME = 20  # state … starttime, fields 3 to 22 of proc_pid_stat(5)


class ProcfsError(OSError):
    """The proc file system can't be read as needed; the sentence says why and what to do."""


class ProcessGoneError(Exception):
    """There is no such process any more (or there never was)."""


class Stat(NamedTuple):
    """The fields needed of /proc/PID/stat, see proc_pid_stat(5)."""

    pid: int
    comm: bytes
    """At most 15 bytes, chosen by the process: any byte but NUL."""
    state: str
    """One letter: R, S, D, Z, …"""
    ppid: int
    flags: int
    threads: int
    starttime: int
    """Ticks since boot. With the pid it names one process for ever."""

    @property
    def zombie(self) -> bool:
        """Dead, and waiting for its parent. A leader in state Z with live threads isn't."""
        return self.state == "Z" and self.threads <= 1

    @property
    def kernel_thread(self) -> bool:
        return bool(self.flags & _KERNEL_THREAD)


def parse_stat(raw: bytes) -> Stat:
    """Parse one /proc/PID/stat; `ValueError` where it isn't one."""
    opening, closing = raw.find(b"("), raw.rfind(b")")
    if opening < 1 or closing < opening:
        raise ValueError("a stat line has a name in parentheses; this one hasn't")
    fields = raw[closing + 1 :].split(maxsplit=_COUNT_AFTER_NAME)
    if len(fields) < _COUNT_AFTER_NAME:
        raise ValueError(f"a stat line has {_COUNT_AFTER_NAME} fields and more after the name")
    return Stat(
        pid=int(raw[:opening]),
        comm=raw[opening + 1 : closing],
        state=fields[0].decode("ascii"),
        ppid=int(fields[1]),
        flags=int(fields[6]),
        threads=int(fields[17]),
        starttime=int(fields[19]),
    )


class Status(NamedTuple):
    """The fields needed of /proc/PID/status, see proc_pid_status(5)."""

    namespace_pids: tuple[int, ...]
    """The pid in each pid namespace, from the reader's own to the innermost."""
    blocked: int
    """Signal masks; bit n-1 stands for signal n."""
    ignored: int
    caught: int


def parse_status(raw: bytes) -> Status:
    """Parse one /proc/PID/status; `ValueError` where it isn't one.

    The name stands in the first line with newlines escaped by the kernel; it can't add a field.
    """
    fields: dict[bytes, bytes] = {}
    for line in raw.split(b"\n"):
        key, _, value = line.partition(b":")
        fields.setdefault(key, value)
    try:
        return Status(
            namespace_pids=tuple(int(pid) for pid in fields[b"NSpid"].split()),
            blocked=int(fields[b"SigBlk"], 16),
            ignored=int(fields[b"SigIgn"], 16),
            caught=int(fields[b"SigCgt"], 16),
        )
    except KeyError as missing:
        raise ValueError(f"a status file has a field {missing}; this one hasn't") from None


class Load(NamedTuple):
    """The tail of /proc/loadavg."""

    tasks: int
    """Threads that exist on the node, dead ones that nobody reaped included."""
    last_pid: int
    """The pid given last in the reader's pid namespace: unchanged means that none was born."""


def parse_loadavg(raw: bytes) -> Load:
    """Parse /proc/loadavg (`0.1 0.2 0.3 1/234 5678`); `ValueError` where it isn't one."""
    fields = raw.split()
    if len(fields) != 5:
        raise ValueError("a loadavg line has five fields; this one hasn't")
    return Load(tasks=int(fields[3].partition(b"/")[2]), last_pid=int(fields[4]))


def read_file(path: str) -> bytes:
    """The whole of a small kernel file, by plain system calls; `OSError` as they give it."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        first = os.read(handle, 65536)
        if not first:
            return first
        parts = [first]
        while more := os.read(handle, 65536):  # seq files give a page at a time
            parts.append(more)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(handle)


class Procfs:
    """One mounted proc file system."""

    def __init__(self, root: Path = Path("/proc")) -> None:
        self.root = str(root)

    def read(self, pid: int, name: str) -> bytes:
        """A file of a process. `ProcessGoneError`, or `ProcfsError` where it may not be read."""
        try:
            return read_file(f"{self.root}/{pid}/{name}")
        except (FileNotFoundError, ProcessLookupError):
            raise ProcessGoneError(pid) from None
        except OSError as error:
            raise ProcfsError(
                error.errno, f"{self.root}/{pid}/{name} can't be read: {error.strerror}"
            ) from error

    def memory(self, pid: int, address: int, size: int) -> int:
        """`size` bytes of a process's memory as a number. Errors as for `read`."""
        try:
            handle = os.open(f"{self.root}/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            try:
                return int.from_bytes(os.pread(handle, size, address), sys.byteorder)
            finally:
                os.close(handle)
        except (FileNotFoundError, ProcessLookupError):
            raise ProcessGoneError(pid) from None
        except (OSError, OverflowError) as error:
            raise ProcfsError(f"{self.root}/{pid}/mem can't be read: {error}") from error

    def stat(self, pid: int) -> Stat:
        """`ProcessGoneError`, `ProcfsError` as for `read`."""
        raw = self.read(pid, "stat")
        try:
            return parse_stat(raw)
        except ValueError as error:
            raise ProcfsError(f"{self.root}/{pid}/stat is not understood: {error}") from error

    def status(self, pid: int) -> Status:
        """`ProcessGoneError`, `ProcfsError` as for `read`."""
        raw = self.read(pid, "status")
        try:
            return parse_status(raw)
        except ValueError as error:
            raise ProcfsError(f"{self.root}/{pid}/status is not understood: {error}") from error

    def names(self) -> set[bytes]:
        """Every process, zombies included, unparsed, and whatever else stands in /proc."""
        try:
            return set(os.listdir(self.root.encode()))  # noqa: PTH208 - ten thousand a scrape
        except OSError as error:
            raise ProcfsError(
                error.errno, f"{self.root} can't be listed: {error.strerror}; is it a proc mount?"
            ) from error

    def load(self) -> Load:
        """The task count of the node. `ProcfsError` where it can't be had."""
        try:
            return parse_loadavg(read_file(f"{self.root}/loadavg"))
        except (OSError, ValueError) as error:
            raise ProcfsError(
                f"{self.root}/loadavg can't be read ({error}); is it a proc mount?"
            ) from error

    def task_limit(self) -> int:
        """How many tasks the node can have: the lesser of pid_max and threads-max."""
        limits = []
        for name in ("pid_max", "threads-max"):
            path = f"{self.root}/sys/kernel/{name}"
            try:
                limits.append(int(read_file(path)))
            except (OSError, ValueError) as error:
                raise ProcfsError(f"{path} can't be read: {error}") from error
        return min(limits)

    def own_pid(self) -> int:
        """The caller's pid as this proc file system counts. `ProcfsError` where it shows none."""
        try:
            return int(Path(self.root, "self").readlink().name)
        except (OSError, ValueError) as error:
            raise ProcfsError(
                f"{self.root}/self doesn't lead to this process; "
                "share the host's pid namespace (hostPID) or mount the host's /proc"
            ) from error

    def require_all_visible(self) -> None:
        """`ProcfsError` where processes of others are hidden (hidepid) from the caller.

        Process 1 belongs to root and always exists: whoever can't see it doesn't see them all.
        """
        try:
            self.stat(1)
        except (ProcessGoneError, ProcfsError):
            raise ProcfsError(
                f"{self.root} hides processes of others (hidepid, or a kernel security module); "
                "run as root or mount it without hidepid"
            ) from None
