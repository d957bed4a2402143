"""The host's lock files where the disk is full or somebody tidies up."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from remediator.host import LockedError, host_lock


def test_e15_a_lock_file_that_is_removed_as_it_is_taken_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock
    removed: list[bool] = []

    def flock(handle: int, operation: int) -> None:
        real(handle, operation)
        if not removed:
            removed.append(True)
            (tmp_path / "fix.lock").unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    said = pytest.raises(LockedError, match=f"pid {os.getpid()}")
    with host_lock(tmp_path, "fix"), said, host_lock(tmp_path, "fix"):
        pass
    with host_lock(tmp_path, "fix"):
        pass


def test_e15_a_lock_file_that_is_always_removed_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock

    def flock(handle: int, operation: int) -> None:
        real(handle, operation)
        (tmp_path / "fix.lock").unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    handles = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(LockedError, match="find out by whom"), host_lock(tmp_path, "fix"):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == handles


def test_who_holds_a_lock_need_not_be_written_for_it_to_be_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    said = pytest.raises(LockedError, match="pid unknown")
    with host_lock(tmp_path, "fix"), said, host_lock(tmp_path, "fix"):
        pass
