"""Says of a zombie's parent what it is, whether it may be signalled, and whether killing it helps.

When a parent dies its zombies go to the first process of the pid namespace. If that one doesn't
wait for children they stay, and the killed parent joins them: that is told beforehand here.
"""

import os
import platform
import signal
from collections.abc import Iterable, Iterator, Mapping, Set
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from exporter.checks.cgroups import ContainerRef
from exporter.checks.procfs import ProcessGoneError, Procfs, ProcfsError, Stat, Status
from exporter.checks.zombies import Identity, membership

_SHIMS = (b"containerd-shim", b"conmon")
_RUNTIMES = (
    *_SHIMS,
    b"runc",
    b"crun",
    b"containerd",
    b"dockerd",
    b"docker-init",
    b"crio",
    b"kubelet",
)
_CHLD = 1 << (signal.SIGCHLD - 1)
_CAUGHT_BY_GO = 40
"""Go's runtime catches nearly every signal, whether or not the program waits for children."""
_CALLS = {  # machine: (wait4, waitid, rt_sigtimedwait)
    "x86_64": (61, 247, 128),
    "aarch64": (260, 95, 137),
}
_MINUS_ONE = (0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)


class Role(Enum):
    """What a zombie's parent is. Only ORDINARY ones are ever terminated."""

    ORDINARY = "an ordinary process of the container"
    FIRST = "the container's first process"
    INNER = "in a container inside of the container"
    RUNTIME = "part of a container runtime"
    HOST = "a process of the host"


class Reaps(Enum):
    """Whether a process waits for children that it is given."""

    YES = "reaps"
    NO = "doesn't reap"
    UNKNOWN = "may reap"


class Parent(NamedTuple):
    """A zombie's parent, as it was when looked at."""

    identity: Identity
    comm: bytes
    role: Role
    adopter: Identity | None
    """Who gets its zombies when it dies; None where nobody of the container does."""
    chain: tuple[bytes, ...]
    """Names from the parent up to the shim, that one included."""


class Processes:
    """The processes of the node at one moment, with what is asked of each read when asked."""

    def __init__(self, procfs: Procfs, own: Set[int] = frozenset()) -> None:
        self._procfs = procfs
        self._own = own | {os.getpid()}
        self._stats: dict[int, Stat] = {}
        self._children: dict[int, list[Stat]] = {}
        self._firsts: dict[tuple[int, ContainerRef], tuple[Stat, Status] | None] = {}
        for name in procfs.names():
            if name.isdigit():
                try:
                    stat = procfs.stat(int(name))
                except ProcessGoneError:
                    continue
                self._stats[stat.pid] = stat
                self._children.setdefault(stat.ppid, []).append(stat)

    def parent(self, pid: int, container: ContainerRef) -> Parent:
        """What a zombie's parent is. `ProcessGoneError`, `ProcfsError`."""
        stat = self._stats.get(pid) or self._procfs.stat(pid)
        chain, entry = self._up_to_shim(stat)
        role, adopter = self._role(stat, container, chain, entry)
        names = tuple(above.comm for above in chain)
        return Parent(Identity(pid, stat.starttime), stat.comm, role, adopter, names)

    def first_process(self, container: ContainerRef) -> Identity | None:
        """The container's first process, where it is pid 1 of a namespace of its own."""
        for stat in self._stats.values():
            if self._is_real_shim(stat) and (first := self._first(stat, container)):
                return Identity(first[0].pid, first[0].starttime)
        return None

    def _role(
        self, stat: Stat, container: ContainerRef, chain: list[Stat], entry: Stat | None
    ) -> tuple[Role, Identity | None]:
        if stat.pid in self._own or stat.kernel_thread or _is_runtime(stat):
            return Role.RUNTIME, None
        own = membership(self._procfs, stat.pid)
        if own.container != container or entry is None:
            return Role.HOST, None
        status = self._procfs.status(stat.pid)
        first = self._first(chain[-1], container)
        if first is None:
            # The container shares a pid namespace, with its pod or with the host: its first
            # process can't be told from one started in it by exec. Either is left alone.
            if entry == stat or status.namespace_pids[-1:] == (1,):
                return Role.FIRST, None
            return Role.ORDINARY, self._first_of_pod(container.pod_uid)
        if stat.pid == first[0].pid:
            return Role.FIRST, None
        inner = own.inner or len(status.namespace_pids) > len(first[1].namespace_pids)
        role = Role.INNER if inner else Role.ORDINARY
        return role, Identity(first[0].pid, first[0].starttime)

    def _up_to_shim(self, stat: Stat) -> tuple[list[Stat], Stat | None]:
        """The chain from a process to the shim above it, and the shim's child in it."""
        chain = [stat]
        while len(chain) <= len(self._stats):
            above = self._stats.get(chain[-1].ppid)
            if above is None:
                break
            chain.append(above)
            if self._is_real_shim(above):
                return chain, chain[-2]
        return chain, None

    def _is_real_shim(self, stat: Stat) -> bool:
        """A tenant may name his process like a shim; he can't take it out of his container."""
        return _is_shim(stat) and self._member_of(stat) is None

    def _first(self, shim: Stat, container: ContainerRef) -> tuple[Stat, Status] | None:
        key = (shim.pid, container)
        if key not in self._firsts:
            ones = self._pid_ones(shim)
            mine = (one for one in ones if self._member_of(one[0]) == container)
            self._firsts[key] = next(mine, None)
        return self._firsts[key]

    def _first_of_pod(self, pod_uid: str) -> Identity | None:
        """Pid 1 of a namespace that containers of a pod share; None where they share the host's."""
        for shim in self._stats.values():
            if self._is_real_shim(shim):
                for stat, _ in self._pid_ones(shim):
                    member = self._member_of(stat)
                    if member is not None and member.pod_uid == pod_uid:
                        return Identity(stat.pid, stat.starttime)
        return None

    def _pid_ones(self, shim: Stat) -> Iterator[tuple[Stat, Status]]:
        """Children of a shim that are pid 1 in a namespace of their own."""
        for stat in self._children.get(shim.pid, ()):
            try:
                status = self._procfs.status(stat.pid)
            except ProcessGoneError:
                continue
            if len(status.namespace_pids) > 1 and status.namespace_pids[-1] == 1:
                yield stat, status

    def _member_of(self, stat: Stat) -> ContainerRef | None:
        try:
            return membership(self._procfs, stat.pid).container
        except ProcessGoneError:
            return None


def _is_shim(stat: Stat) -> bool:
    return stat.comm.startswith(_SHIMS)


def _is_runtime(stat: Stat) -> bool:
    return stat.comm.startswith(_RUNTIMES)


def reaps(procfs: Procfs, pid: int, stale: Set[int]) -> Reaps:
    """Whether a process waits for children that it is given. `ProcfsError`.

    stale: parents of zombies that have been seen for long; whoever is one of them doesn't reap.
    """
    if pid in stale:
        return Reaps.NO
    try:
        status = procfs.status(pid)
        if (status.ignored | status.blocked) & _CHLD or _waits_for_children(procfs, pid):
            # Ignored: the kernel reaps. Blocked: taken by a signalfd, or by sigwait.
            return Reaps.YES
    except ProcessGoneError:
        return Reaps.UNKNOWN
    if status.caught & _CHLD and status.caught.bit_count() < _CAUGHT_BY_GO:
        return Reaps.UNKNOWN
    return Reaps.NO


class Group(NamedTuple):
    """One parent with its zombies."""

    parent: Parent
    zombies: tuple[Identity, ...]
    reaps: Reaps
    """Whether who would adopt them waits for children."""

    @property
    def worth_killing(self) -> bool:
        """Whether its end would free the zombies rather than add one."""
        return self.parent.role is Role.ORDINARY and self.reaps is not Reaps.NO


def groups_of(
    procfs: Procfs,
    container: ContainerRef,
    zombies: Iterable[Identity],
    known: Mapping[Identity, Reaps] = MappingProxyType({}),
) -> tuple[Group, ...]:
    """Zombies that are still there, by what their parent is now. `ProcfsError`.

    known: what was seen of adopters already.
    """
    by_parent: dict[int, list[Identity]] = {}
    for identity in zombies:
        stat = stat_of(procfs, identity)
        if stat is not None and stat.zombie:
            by_parent.setdefault(stat.ppid, []).append(identity)
    processes = Processes(procfs)
    groups = []
    for pid, children in by_parent.items():
        try:
            parent = processes.parent(pid, container)
        except ProcessGoneError:
            continue  # its zombies have gone to somebody else since: the next look sees it
        answer = Reaps.YES  # the shim, where nobody of the container adopts
        if parent.adopter is not None:
            answer = known.get(parent.adopter) or reaps(procfs, parent.adopter.pid, {*by_parent})
        groups.append(Group(parent, tuple(children), answer))
    return tuple(groups)


def unchanged(procfs: Procfs, group: Group, container: ContainerRef) -> bool:
    """Whether a parent still is what its group says. `ProcessGoneError`, `ProcfsError`."""
    pid = group.parent.identity.pid
    if stat_of(procfs, group.parent.identity) is None or _is_runtime(procfs.stat(pid)):
        return False
    if membership(procfs, pid).container != container:
        return False
    children = (stat_of(procfs, zombie) for zombie in group.zombies)
    return any(stat is not None and stat.zombie and stat.ppid == pid for stat in children)


def stat_of(procfs: Procfs, identity: Identity) -> Stat | None:
    """The process of that identity, dead or alive; None where it is gone. `ProcfsError`."""
    try:
        stat = procfs.stat(identity.pid)
    except ProcessGoneError:
        return None
    return stat if stat.starttime == identity.starttime else None


def _waits_for_children(procfs: Procfs, pid: int) -> bool:
    """Whether the process is in a wait for any child, or for SIGCHLD, right now.

    While it is in sigwait the kernel shows the awaited signals as not blocked (tini and its like
    look as if they had nothing to do with children): so the set is read where the call has it.
    """
    try:
        wait4, waitid, sigtimedwait = _CALLS[platform.machine()]
        fields = procfs.read(pid, "syscall").split()  # proc_pid_syscall(5)
        number, first = int(fields[0]), int(fields[1], 16)
        if number == sigtimedwait:
            return bool(procfs.memory(pid, first, 8) & _CHLD)
    except (KeyError, ValueError, IndexError, ProcfsError):  # running, or not to be told
        return False
    return (number == wait4 and first in _MINUS_ONE) or (number == waitid and first == 0)
