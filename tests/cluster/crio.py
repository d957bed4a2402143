"""Containers as CRI-O makes them, without CRI-O: real conmon, real runc, CRI-O's cgroups.

Debian has no CRI-O, but it has what CRI-O starts: conmon, in a cgroup of its own beside that of the
container it watches. What starts the container anew when it ends, CRI-O and the kubelet, is played
by a thread: new container, same pod.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from deploy.local.debian import binary, unpack
from tests.cluster import cgroups
from tests.cluster.containerd import Pod, Shape

_SECONDS = 30.0


@dataclass(frozen=True)
class Container:
    """One that was started; it may have ended since."""

    id: str
    pid: int
    conmon: int
    """The process that watches it, outside of it."""


@dataclass
class Crio:
    """Where containers can be started; made by crio()."""

    directory: Path
    group: str
    """The cgroup on this machine below which they all are."""
    _closing: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, pod: Pod, program: str, *, shape: Shape, nested: bool = False) -> Container:
        """A container of the pod, whose process is called `program` and ends by SIGTERM.

        nested: in a cgroup `container` below its own, as CRI-O does for crun.
        """
        identity = secrets.token_hex(32)
        above = f"/{self.group}{pod.cgroup(shape)}"
        name = f"crio-{identity}.scope" if shape == "systemd" else f"crio-{identity}"
        watcher = name.replace("crio-", "crio-conmon-", 1)
        bundle = self._bundle(identity, program, f"{above}/{name}" + "/container" * nested)
        folder = self.directory / identity
        files = {n: folder / n for n in ("exits", "persist", "log", "pidfile", "conmon-pidfile")}
        for each in ("exits", "persist"):
            files[each].mkdir()
        command: list[str | Path] = [
            unpack("conmon") / "usr/bin/conmon",
            *("-c", identity, "-u", identity, "-n", program, "-b", bundle),
            *("-r", binary("runc"), "--runtime-arg", f"--root={self.directory}/runc"),
            *("-p", files["pidfile"], "-P", files["conmon-pidfile"]),
            *("--exit-dir", files["exits"], "--persist-dir", files["persist"]),
            *("--socket-dir-path", folder, "-l", f"k8s-file:{files['log']}"),
        ]
        subprocess.run(command, check=True, timeout=_SECONDS)
        conmon = _pid(files["conmon-pidfile"])
        pid = _pid(files["pidfile"])
        cgroups.create(f"{above}/{watcher}".lstrip("/"))
        for hierarchy in cgroups.hierarchies():
            procs = hierarchy.mount / f"{above}/{watcher}".lstrip("/") / "cgroup.procs"
            procs.write_text(str(conmon))
        self._runc("start", identity)
        return Container(identity, pid, conmon)

    def keep_running(self, pod: Pod, program: str, first: Container, *, shape: Shape) -> None:
        """Start a new container of the pod whenever one ends, as the kubelet would."""

        def keep() -> None:
            current = first
            while not self._closing.wait(0.1):
                if (self.directory / current.id / "exits" / current.id).exists():
                    self._runc("delete", current.id)
                    current = self.start(pod, program, shape=shape)

        thread = threading.Thread(target=keep)
        thread.start()
        self._threads.append(thread)

    def exec(self, container: Container, program: str) -> None:
        """Run one more program in a container; it runs on when this returns."""
        self._runc("exec", "--detach", "--cwd=/", container.id, program)

    def close(self) -> None:
        """End everything."""
        self._closing.set()
        for thread in self._threads:
            thread.join(_SECONDS)
        cgroups.remove(self.group)

    def _runc(self, *words: str) -> None:
        command: list[str | Path] = [binary("runc"), f"--root={self.directory}/runc", *words]
        with (self.directory / "runc.log").open("a") as log:  # a pipe would be the program's too
            subprocess.run(command, check=True, timeout=_SECONDS, stdout=log, stderr=log)

    def _bundle(self, identity: str, program: str, cgroup: str) -> Path:
        bundle = self.directory / identity
        root = bundle / "rootfs"
        for folder in ("bin", "proc", "dev"):
            (root / folder).mkdir(parents=True)
        shutil.copy(binary("busybox"), root / "bin/busybox")
        script = root / program  # the kernel calls a process after its script, not its interpreter
        script.write_text(
            "#!/bin/busybox sh\ntrap 'exit 0' TERM\nwhile :; do sleep 1 & wait; done\n"
        )
        script.chmod(0o755)
        (root / "bin/sleep").symlink_to("busybox")
        config = {
            "ociVersion": "1.0.2",
            "process": {
                "args": [f"/{program}"],
                "cwd": "/",
                "env": ["PATH=/bin"],
                "user": {"uid": 0, "gid": 0},
            },
            "root": {"path": "rootfs"},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {
                "cgroupsPath": cgroup,
                "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")],
            },
        }
        (bundle / "config.json").write_text(json.dumps(config))
        return bundle


@contextmanager
def crio(directory: Path) -> Iterator[Crio]:
    """For as long as the context; all that was started is gone afterwards."""
    group = f"upkeep-crio-{secrets.token_hex(3)}"
    cgroups.create(group)
    crio = Crio(directory, group)
    try:
        yield crio
    finally:
        crio.close()


def _pid(path: Path) -> int:
    """The process that a file names, once it does."""
    ends = time.monotonic() + _SECONDS
    while True:
        with suppress(OSError, ValueError):
            return int(path.read_text())
        if time.monotonic() > ends:
            raise TimeoutError(f"{path} was not written in {_SECONDS:g} s")
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it's no zombie."""
    try:
        return os.readlink(f"/proc/{pid}/exe") != ""  # noqa: PTH115 - of a zombie it can't be read
    except OSError:
        return False
