"""Finds zombie processes, whose they are, and since when they have been seen.

A death has no timestamp: a zombie's age counts from when it was first seen as one, by pid and start
time, so it is never too high. The same watch serves the metric, the remediator's second look before
it acts, and its verification.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from exporter.checks.cgroups import ContainerRef, Membership, parse_membership
from exporter.checks.containers import ContainerNames, LogFolders
from exporter.checks.procfs import ProcessGoneError, Procfs, ProcfsError, Stat
from exporter.checks.zombies_scan import Scan

_DEEPEST = 100  # ancestors: what comes and goes meanwhile can't make a circle endless


class Identity(NamedTuple):
    """One process for ever: pids are reused, but not within a tick of the same start."""

    pid: int
    starttime: int

    def __str__(self) -> str:
        return f"{self.pid}:{self.starttime}"


class Zombie(NamedTuple):
    """A dead process that its parent hasn't waited for."""

    identity: Identity
    parent: int
    """Its parent's pid at the time of the look."""
    comm: bytes
    age: float
    """Seconds since it was first seen as a zombie; 0 at first sight."""
    container: ContainerRef | None
    """None for a process of the host."""


class Look(NamedTuple):
    """What one look at the node found."""

    zombies: tuple[Zombie, ...]
    names: dict[ContainerRef, ContainerNames]
    """Names of every container that has a zombie."""
    unreadable: int
    """Processes of which it can't be known whether they are zombies."""


class _Sighting(NamedTuple):
    at: float
    container: ContainerRef | None


class ZombieWatch:
    """Looks at the node, and remembers when each zombie was seen first.

    scan: how zombies are found; clock: seconds that never step back.
    """

    def __init__(
        self,
        procfs: Procfs,
        folders: LogFolders,
        scan: Callable[[], Scan],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._procfs = procfs
        self._folders = folders
        self._scan = scan
        self._clock = clock
        self._first: dict[Identity, _Sighting] = {}

    def look(self) -> Look:
        """All zombies of the node. `ProcfsError` where it can't be known."""
        self._procfs.require_all_visible()
        scan = self._scan()
        now = self._clock()
        parents: dict[int, ContainerRef | None] = {}
        first: dict[Identity, _Sighting] = {}
        zombies = []
        for stat in scan.zombies:
            identity = Identity(stat.pid, stat.starttime)
            seen = self._first.get(identity)
            if seen is None:
                # It keeps its container for good, while its parent and so its only trace in
                # cgroup v1 may change: where it belongs is asked once, at first sight.
                seen = _Sighting(now, self._container(stat, parents))
            first[identity] = seen
            zombies.append(Zombie(identity, stat.ppid, stat.comm, now - seen.at, seen.container))
        self._first = first
        names = self._folders.names({z.container for z in zombies if z.container is not None})
        return Look(tuple(zombies), names, scan.unreadable)

    def _container(
        self, stat: Stat, parents: dict[int, ContainerRef | None]
    ) -> ContainerRef | None:
        try:
            own = membership(self._procfs, stat.pid)
            if own.container is None and own.forgotten:
                if stat.ppid not in parents:
                    parents[stat.ppid] = membership(self._procfs, stat.ppid).container
                return parents[stat.ppid]
        except (ProcessGoneError, ProcfsError):
            return None  # reaped meanwhile, or not to be told: nobody's, so nothing acts on it
        return own.container


def ancestors(procfs: Procfs, pid: int) -> list[Stat]:
    """A process and those above it, as far as they can be seen. `ProcfsError`."""
    chain: list[Stat] = []
    while pid > 0 and len(chain) < _DEEPEST:
        try:
            chain.append(procfs.stat(pid))
        except ProcessGoneError:
            break
        pid = chain[-1].ppid
    return chain


def membership(procfs: Procfs, pid: int) -> Membership:
    """The container of a process. `ProcessGoneError`, `ProcfsError`."""
    return parse_membership(procfs.read(pid, "cgroup"))
