"""The Linux calls for namespaces and mounts that Python 3.11's `os` lacks.

Each raises OSError with the kernel's errno, like the calls in `os`.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from enum import IntFlag
from pathlib import Path


class Namespace(IntFlag):
    """Kinds of namespaces, for unshare and setns; values from linux/sched.h."""

    MOUNT = 0x00020000
    CGROUP = 0x02000000
    UTS = 0x04000000
    IPC = 0x08000000
    PID = 0x20000000
    NETWORK = 0x40000000


class Mount(IntFlag):
    """Flags of mount(2); values from linux/mount.h."""

    NONE = 0
    READ_ONLY = 1
    NO_SUID = 2
    NO_DEV = 4
    NO_EXEC = 8
    REMOUNT = 32
    BIND = 4096
    RECURSIVE = 16384
    PRIVATE = 1 << 18
    SHARED = 1 << 20


_DETACH = 2
_SET_PARENT_DEATH_SIGNAL = 1
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(kinds: Namespace) -> None:
    """Put this process into new namespaces; with PID, only its next child is in the new one."""
    _check(_libc.unshare(int(kinds)), f"unshare {kinds!r}")


def setns(fd: int, kinds: Namespace) -> None:
    """Join namespaces of the process that the pidfd `fd` names (Linux 5.8)."""
    _check(_libc.setns(fd, int(kinds)), f"setns {kinds!r}")


def mount(
    source: str | Path,
    target: str | Path,
    filesystem: str = "",
    flags: Mount = Mount.NONE,
    options: str = "",
) -> None:
    """Mount `source` on `target`."""
    arguments = [os.fsencode(value) for value in (source, target, filesystem)]
    result = _libc.mount(*arguments, ctypes.c_ulong(flags), options.encode())
    _check(result, f"mount {source} on {target} ({filesystem or flags!r} {options})")


def bind(source: Path, target: Path, *, read_only: bool = False, flags: Mount = Mount.NONE) -> None:
    """Make `source` appear at `target` as well; what is mounted below it only if RECURSIVE."""
    mount(source, target, flags=Mount.BIND | flags)
    if read_only:
        mount("none", target, flags=Mount.BIND | Mount.REMOUNT | Mount.READ_ONLY)


def become_root(new_root: Path) -> None:
    """Make the mount point `new_root` the root of this mount namespace, and let the old one go."""
    number = _PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise OSError(f"pivot_root's number on {platform.machine()} isn't known here: add it")
    os.chdir(new_root)
    _check(_libc.syscall(number, b".", b"."), f"pivot_root to {new_root}")
    _check(_libc.umount2(b".", _DETACH), "umount the old root")
    os.chdir("/")


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to send this process a signal as soon as its parent is gone."""
    result = _libc.prctl(_SET_PARENT_DEATH_SIGNAL, int(number), 0, 0, 0)
    _check(result, "prctl PR_SET_PDEATHSIG")
