"""Two ways to find every zombie of a node: the full one, and a cheap one that must prove itself.

The full way reads each process. The cheap one asks the cgroups for what is alive. Their lists
leave out the dead, the task count of /proc/loadavg doesn't: where the two agree but for the dead
known already there is nothing new, and where they differ only what /proc lists and no cgroup does
is read. That takes about a tenth of the time, and finds exactly the same.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

from exporter.checks.cgroups import CgroupError, CgroupTree
from exporter.checks.procfs import Procfs, ProcfsError, Stat, parse_stat, read_file


class Scan(NamedTuple):
    """The zombies of a node at one time."""

    zombies: list[Stat]
    unreadable: int = 0
    """Processes whose state couldn't be read."""


def full_scan(procfs: Procfs) -> Scan:
    """Read every process. `ProcfsError` where /proc itself can't be listed."""
    return _scan_of(procfs, procfs.names())[0]


def _scan_of(procfs: Procfs, names: set[bytes]) -> tuple[Scan, set[int]]:
    """The zombies among `names`, and every dead one among them, half-dead leaders included."""
    zombies = []
    dead = set()
    unreadable = 0
    root, dead_state = procfs.root, ord("Z")  # this loop is the cost of a scan: no calls in vain
    for name in names:
        if not name.isdigit():
            continue
        try:
            raw = read_file(f"{root}/{int(name)}/stat")
            if raw[raw.rfind(b")") + 2] != dead_state:
                continue
            stat = parse_stat(raw)
        except (FileNotFoundError, ProcessLookupError):
            continue
        except (OSError, ValueError, IndexError):
            unreadable += 1
            continue
        dead.add(stat.pid)
        if stat.zombie:
            zombies.append(stat)
    return Scan(zombies, unreadable), dead


class CheapScan:
    """Finds zombies by asking the cgroups what is alive.

    Exact at every call, also while processes come and go: whatever is dead stands in /proc's list
    and in no cgroup's. The list is left out only where nobody was born during the reading (the
    last pid given is the same) and the count of dead tasks is what the known dead explain.
    """

    def __init__(self, procfs: Procfs, cgroups: CgroupTree) -> None:
        self._procfs = procfs
        self._cgroups = cgroups
        self._dead: set[int] = set()
        # Births show in the last pid only within the pid namespace whose /proc this is.
        self._sees_births = _own_pid(procfs) == os.getpid()
        self.listed = 0
        """How often the list of processes was needed."""

    def __call__(self) -> Scan:
        """`ProcfsError`, `CgroupError` where /proc or the cgroups can't be read."""
        before = self._procfs.load()
        live = self._cgroups.live_tasks()
        if live.complete and self._sees_births and self._procfs.load() == before:
            known, dead = _scan_of(self._procfs, {b"%d" % pid for pid in self._dead})
            if before.tasks - live.total() == len(dead) and self._procfs.load() == before:
                self._dead = dead
                return known
        self.listed += 1
        names = self._procfs.names()
        for ids in live.lists:  # one after the other: a set of all would double the memory
            names.difference_update(ids.split())
        scan, self._dead = _scan_of(self._procfs, names)
        return scan


def _own_pid(procfs: Procfs) -> int:
    try:
        return procfs.own_pid()
    except ProcfsError:
        return 0


FALLBACKS = ("cgroups", "proof", "mismatch")
"""Why the cheap way isn't used: no cgroup files, it missed a zombie made for it, or another one."""


class ProvenScan:
    """Takes the cheap way for as long as it proves itself, else the full one.

    The cheap way must see a zombie made for that purpose before it is trusted, and is compared
    with the full one every `compare_every` seconds. One mismatch and it's never used again.
    """

    def __init__(
        self,
        procfs: Procfs,
        cheap: CheapScan | None,
        *,
        compare_every: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
        make_zombie: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self._procfs = procfs
        self._cheap = cheap
        self._compare_every = compare_every
        self._clock = clock
        self._make_zombie = make_zombie or own_zombie
        self._compare_at = clock()
        self._proven = False
        self.fallbacks = dict.fromkeys(FALLBACKS, 0)
        """How often each reason put the full way in the cheap one's place."""
        if cheap is None:
            self.fallbacks["cgroups"] = 1

    @property
    def cheap(self) -> bool:
        """Whether the next look takes the cheap way."""
        return self._cheap is not None and self._proven

    def __call__(self) -> Scan:
        """`ProcfsError` where /proc can't be listed."""
        if self._cheap is None:
            return full_scan(self._procfs)
        try:
            if self._clock() >= self._compare_at:
                self._compare_at = self._clock() + self._compare_every
                return self._compared(self._cheap)
            if self._proven:
                return self._cheap()
        except CgroupError:
            self._fall_back("cgroups")
        return full_scan(self._procfs)

    def _compared(self, cheap: CheapScan) -> Scan:
        full = full_scan(self._procfs)
        missed = {(stat.pid, stat.starttime) for stat in full.zombies}
        for _ in range(3):  # one that died and was reaped between the two is no mismatch
            missed -= {(stat.pid, stat.starttime) for stat in cheap().zombies}
            if not missed:
                break
            again = full_scan(self._procfs)
            missed &= {(stat.pid, stat.starttime) for stat in again.zombies}
        else:
            self._fall_back("mismatch")
            return full
        if not self._proven:
            self._prove(cheap)
        return full

    def _prove(self, cheap: CheapScan) -> None:
        own = _own_pid(self._procfs)
        try:
            with self._make_zombie():
                self._proven = any(stat.ppid == own for stat in cheap().zombies)
        except OSError:  # no process can be made now: unproven, tried again at the next comparison
            return
        if not self._proven:
            self._fall_back("proof")

    def _fall_back(self, reason: str) -> None:
        self._cheap = None
        self.fallbacks[reason] += 1


@contextmanager
def own_zombie() -> Iterator[None]:
    """A zombie of this process's own, for as long as the body runs. `OSError` where none is to be.

    A bare fork that ends at once: it needs no program, and so no file system.
    """
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        yield
    finally:
        os.waitpid(pid, 0)
