"""Containers that leave zombies, in each of the ways that Upkeep has to tell apart.

The program in them is workloads/zombies.c. Counting here goes by parents, from a container's PID 1
down, and knows nothing of cgroups: it is the second opinion on what Upkeep counts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.containerd import Container, ContainerdHost, Pod
from tests.cluster.images import WORKLOAD
from tests.cluster.node import NodeError

READY_FILE = "/tmp/ready"
IMITATION = b"x Z 4567 y"
"""A name after which a reader that splits /proc/PID/stat on spaces sees a zombie of parent 4567."""
ODD_NAMES = (b"tmux: server", b"a) Z (b", b"new\nline", b"\xff\xfe\x80", b") ) 1 (")
"""Names that break careless readers of /proc/PID/stat."""


@dataclass(frozen=True)
class ZombieMaker:
    """What runs in a container, and what it leaves."""

    argv: tuple[str, ...]
    zombies: int = 0
    """Dead processes that nobody waited for."""
    lookalikes: int = 0
    """Processes in state Z that live: their first thread has ended, others have not."""
    executed: tuple[str, ...] = ()
    """What is run in the container afterwards, as `kubectl exec` does; empty: nothing."""


def zombie_maker(
    kind: str, zombies: int = 5, *, parents: int = 1, name: bytes = b""
) -> ZombieMaker:
    """The maker of a kind (KINDS says which there are) that leaves that many zombies.

    `parents` is how many processes in the middle share them, `name` what the dead are called.
    """
    options = KINDS[kind]
    argv = ["/zombies", f"--ready-file={READY_FILE}", *options]
    if name:
        argv.append(f"--name={name.hex()}")
    middle = "--first=never" not in options or kind == "daemon"
    if middle:
        argv.append(f"--parents={parents}")
    if kind == "exec":
        executed = ("/zombies", f"--orphans={zombies}", *argv[-1:] * bool(name))
        return ZombieMaker(tuple(argv), zombies, executed=executed)
    if kind == "leader":
        return ZombieMaker((*argv, f"--leaders={zombies}"), lookalikes=zombies)
    if kind == "imitation":
        return ZombieMaker((*argv, f"--live={zombies}"))
    return ZombieMaker((*argv, f"--zombies={zombies}"), zombies)


KINDS: Mapping[str, tuple[str, ...]] = {
    # killing the parent in the middle helps: PID 1 reaps what it is given
    "parent": (),
    # the parent is the container's PID 1, which never waits
    "pid1": ("--first=never",),
    # left by a program that was run in the container; given to a PID 1 that never waits
    "exec": ("--first=never",),
    # nothing is dead: first threads have ended, others live
    "leader": (),
    # nothing is dead: living processes are named like a zombie's line in /proc/PID/stat
    "imitation": (f"--name={IMITATION.hex()}",),
    # SIGCHLD helps: the parent has a handler that missed these
    "sigchld": ("--chld=handler",),
    # TERM doesn't help, KILL does
    "ignores-term": ("--term=ignore",),
    # killing the parent only gives them to a PID 1 that never waits, and adds one
    "daemon": ("--first=never",),
}


@dataclass(frozen=True)
class Process:
    """One line of /proc/PID/stat."""

    pid: int
    parent: int
    name: bytes
    state: str
    threads: int

    @property
    def is_zombie(self) -> bool:
        """Dead and not waited for. With threads left it is a leader that ended before them."""
        return self.state == "Z" and self.threads == 1

    @property
    def is_lookalike(self) -> bool:
        """In state Z, but alive."""
        return self.state == "Z" and self.threads > 1


def descendants(pid: int) -> list[Process]:
    """All below a process, as the machine counts."""
    children: dict[int, list[Process]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with suppress(FileNotFoundError, ProcessLookupError):
                process = _parse((path / "stat").read_bytes())
                children.setdefault(process.parent, []).append(process)
    found, todo = [], [pid]
    while todo:
        for process in children.get(todo.pop(), []):
            found.append(process)
            todo.append(process.pid)
    return sorted(found, key=_pid)


def zombies(pid: int) -> list[Process]:
    """The zombies below a container's PID 1."""
    return [process for process in descendants(pid) if process.is_zombie]


def _pid(process: Process) -> int:
    return process.pid


def _parse(stat: bytes) -> Process:
    pid, _, rest = stat.partition(b" (")
    name, _, after = rest.rpartition(b") ")
    fields = after.split()
    return Process(int(pid), int(fields[1]), name, fields[0].decode(), int(fields[17]))


def start_maker(
    host: ContainerdHost, maker: ZombieMaker, *, pod: Pod | None = None, timeout: float = 60
) -> Container:
    """Run a maker in a container; returns when it has left what it leaves.

    Raises NodeError with its log if that isn't seen within `timeout` s.
    """
    container = host.run(WORKLOAD, maker.argv, pod=pod)
    deadline = time.monotonic() + timeout
    ready = Path(f"/proc/{container.pid}/root{READY_FILE}")
    executed = not maker.executed
    while True:
        if ready.exists() and not executed:
            container.exec(maker.executed)
            executed = True
        below = descendants(container.pid)
        dead = sum(process.is_zombie for process in below)
        alike = sum(process.is_lookalike for process in below)
        if ready.exists() and (dead, alike) == (maker.zombies, maker.lookalikes):
            return container
        if time.monotonic() > deadline:
            raise NodeError(
                f"{' '.join(maker.argv)}: {dead} zombies and {alike} lookalikes after {timeout} s"
            )
        time.sleep(0.05)
