"""Containers of real processes for tests: pid namespaces below a shim, in pod-shaped cgroups.

The shim is util-linux's `unshare` under the real shim's name: it makes the namespace, waits for the
first process and takes it along when it dies. Everything else is the kernel's own. The tests with a
real containerd and its real shim stand in test_containers.py.
"""

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from exporter.checks.cgroups import CgroupTree, ContainerRef
from exporter.checks.containers import ContainerNames
from exporter.checks.procfs import ProcessGoneError, Procfs, Stat

SOURCE = Path(__file__).parents[1] / "cluster/workloads/zombies.c"
PROCFS = Procfs()
NAMES = ContainerNames("shop", "web-0", "app")


def compile_workload(folder: Path) -> Path:
    """The program that leaves zombies, as the containers of the cluster tests run it."""
    program = folder / "zombies"
    subprocess.run(
        ["gcc", "-O2", "-static", "-pthread", "-o", str(program), str(SOURCE)], check=True
    )
    return program


def until(what: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until `what()` is true; fail after a generous time."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@dataclass
class Container:
    """A running container of the test's node."""

    ref: ContainerRef
    names: ContainerNames
    shim: "subprocess.Popen[bytes]"
    cgroup: Path
    link: Path
    first: int = 0

    def zombies(self) -> list[int]:
        """Pids of the zombies below the shim, read the plain way."""
        return [stat.pid for stat in self._stats() if stat.zombie]

    def parents(self) -> set[int]:
        """Parents of its zombies."""
        return {stat.ppid for stat in self._stats() if stat.zombie}

    def processes(self) -> list[int]:
        """Every process below the shim."""
        return [stat.pid for stat in self._stats()]

    def _stats(self) -> list[Stat]:
        """Each read once: what is reaped in between is simply not there."""
        children: dict[int, list[Stat]] = {}
        for name in PROCFS.names():
            if name.isdigit():
                with suppress(ProcessGoneError):
                    stat = PROCFS.stat(int(name))
                    children.setdefault(stat.ppid, []).append(stat)
        found: list[Stat] = []
        pending = [self.shim.pid]
        while pending:
            more = children.get(pending.pop(), [])
            found += more
            pending += [stat.pid for stat in more]
        return found

    @property
    def running(self) -> bool:
        """Whether the first process is the one it was, and alive."""
        return self.shim.poll() is None and bool(PROCFS.stat(self.first))

    def kill(self) -> None:
        """End the container as a crash does."""
        with suppress(ProcessLookupError):
            os.kill(self.first, signal.SIGKILL)
        self.shim.wait(20)


@dataclass
class Node:
    """A root file system, a part of the cgroup tree and a shim, for one test."""

    folder: Path
    program: Path
    containers: list[Container] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rootfs = self.folder / "root"
        (self.rootfs / "var/log/containers").mkdir(parents=True)
        self.shim = self.folder / "containerd-shim-runc-v2"
        found = shutil.which("unshare")
        assert found, "util-linux's unshare is needed"
        shutil.copy(found, self.shim)
        self.top = Path(CgroupTree().root)
        self.cgroup = self.top / f"upkeep-test-{uuid.uuid4().hex[:12]}"
        self.cgroup.mkdir()

    def container(
        self,
        *arguments: str,
        names: ContainerNames = NAMES,
        program: Sequence[str] | None = None,
        pod_uid: str = "",
        wait: bool = True,
        unshare: Sequence[str] = ("--pid",),
    ) -> Container:
        """Start a container whose first process is the zombie maker (or `program`)."""
        ref = ContainerRef(pod_uid or str(uuid.uuid4()), uuid.uuid4().hex * 2)
        cgroup = self.cgroup / f"kubepods/besteffort/pod{ref.pod_uid}" / ref.container_id
        cgroup.mkdir(parents=True)
        file = f"{names.pod}_{names.namespace}_{names.container}-{ref.container_id}.log"
        link = self.rootfs / "var/log/containers" / file
        link.symlink_to("/nonexistent")
        ready = self.folder / f"ready-{ref.container_id[:12]}"
        command = program or [str(self.program), "--ready-file", str(ready), *arguments]
        procs = str(cgroup / "cgroup.procs")
        shim = subprocess.Popen(
            [str(self.shim), *unshare, "--fork", "--kill-child", *command],
            preexec_fn=lambda: Path(procs).write_text("0") and None,  # noqa: PLW1509 - no threads
            stdout=subprocess.DEVNULL,
        )
        container = Container(ref, names, shim, cgroup, link)
        self.containers.append(container)
        until(lambda: self._children(shim.pid))
        container.first = self._children(shim.pid)[0]
        (self.top / "cgroup.procs").write_text(str(shim.pid))  # the shim itself isn't in it
        if wait and program is None:
            until(ready.exists)
        return container

    def _children(self, pid: int) -> list[int]:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def close(self) -> None:
        """End everything and remove the cgroups."""
        for container in self.containers:
            container.shim.kill()
            container.shim.wait(20)
        end = time.monotonic() + 20
        while self.cgroup.exists() and time.monotonic() < end:
            for folder, _, _ in os.walk(self.cgroup, topdown=False):
                with suppress(OSError):
                    for pid in Path(folder, "cgroup.procs").read_text().split():
                        os.kill(int(pid), signal.SIGKILL)
                    Path(folder).rmdir()
            time.sleep(0.05)
        assert not self.cgroup.exists(), f"{self.cgroup} still holds processes"
