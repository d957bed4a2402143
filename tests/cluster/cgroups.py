"""A cgroup of one's own in every hierarchy of the machine: v1, v2, and both at once.

What runs in a node of the tests lives below one such cgroup. A real kubelet on the machine never
looks there, and whatever is left over can be found, killed and removed by that one name.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")
_V1_OPTIONS_OF_THE_MOUNT = {"rw", "ro"}


@dataclass(frozen=True)
class Hierarchy:
    """One mounted cgroup hierarchy."""

    mount: Path
    filesystem: str
    """"cgroup" (v1) or "cgroup2"."""
    options: str
    """What mounts it once more, such as "cpu,cpuacct" or "name=systemd"; empty for v2."""

    @property
    def is_v2(self) -> bool:
        """Whether this is the unified hierarchy."""
        return self.filesystem == "cgroup2"


def hierarchies(mountinfo: Path = MOUNTINFO) -> list[Hierarchy]:
    """The machine's hierarchies, in the order in which they were mounted."""
    found = []
    for line in mountinfo.read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        filesystem, _, superblock = rest.split(" ", 2)
        if filesystem not in {"cgroup", "cgroup2"}:
            continue
        names = [name for name in superblock.split(",") if name not in _V1_OPTIONS_OF_THE_MOUNT]
        options = ",".join(n for n in names if not n.startswith(("release_agent=", "xattr")))
        where = Path(fields.split()[4])
        found.append(Hierarchy(where, filesystem, "" if filesystem == "cgroup2" else options))
    return found


def create(name: str) -> None:
    """Make the cgroup `name` (no slash in front) in every hierarchy, fit to hold others."""
    for hierarchy in hierarchies():
        path = hierarchy.mount / name
        path.mkdir(exist_ok=True)
        for file in ("cpuset.cpus", "cpuset.mems"):  # v1: empty at first, and then no process fits
            if not hierarchy.is_v2 and (path / file).exists():
                (path / file).write_text((path.parent / file).read_text())


def hand_down_controllers() -> None:
    """v2: let the cgroups right below the root have every controller; nothing to do for v1.

    In a cgroup namespace no process may be left in its root then, other than in the real one.
    """
    for hierarchy in hierarchies():
        if hierarchy.is_v2:
            handed = hierarchy.mount / "cgroup.subtree_control"
            wanted = (hierarchy.mount / "cgroup.controllers").read_text().split()
            for controller in set(wanted) - set(handed.read_text().split()):
                with suppress(OSError):  # not to be had here, as cpu with realtime processes
                    handed.write_text(f"+{controller}")


def join(name: str) -> None:
    """Move the calling process into the cgroup `name` of every hierarchy."""
    for hierarchy in hierarchies():
        (hierarchy.mount / name / "cgroup.procs").write_text("0")


def processes(name: str) -> list[int]:
    """The pids of all processes at or below the cgroup `name`, zombies too where the kernel
    lists them (v1 forgets a zombie's cgroup)."""
    found: set[int] = set()
    for path in _below(name):
        with suppress(OSError):  # gone meanwhile
            found.update(int(pid) for pid in (path / "cgroup.procs").read_text().split())
    return sorted(found - {0})


def remove(name: str, *, timeout: float = 20) -> None:
    """Kill what runs at or below the cgroup `name` and remove it everywhere; fine if it is gone.

    Raises TimeoutError naming what is left after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while _remove_once(name):
        if time.monotonic() > deadline:
            left = ", ".join(str(path) for path in _below(name))
            raise TimeoutError(f"cgroups that can't be removed after {timeout} s: {left}")
        time.sleep(0.05)


def _remove_once(name: str) -> bool:
    """Whether something is left of the cgroup."""
    for pid in processes(name):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    left = False
    for path in _below(name):
        try:
            path.rmdir()
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in {errno.EBUSY, errno.ENOTEMPTY}:
                raise
            left = True
    return left


def _below(name: str) -> Iterator[Path]:
    """Every directory of the cgroup in every hierarchy, children before their parents."""
    if not name.strip("/"):
        raise ValueError("the root cgroup isn't ours to touch")
    for hierarchy in hierarchies():
        for path, _, _ in os.walk(hierarchy.mount / name, topdown=False):
            yield Path(path)
