"""Reads cgroups: whose container a process is in, and which tasks are alive, without any API.

The kubelet names its cgroups after pods and containers, in a shape of its own for every driver and
runtime. Tenants can make cgroups too, but only below their container's: the first pod and the first
container in a path are the kubelet's.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from exporter.checks.procfs import read_file

# A pod's uid, or for a static pod the hash of its manifest. systemd's names can't hold a dash.
_UID = r"(?P<pod>[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})"
_ID = r"(?P<id>[0-9a-f]{64})"
_RUNTIME = r"(?:cri-containerd|containerd|crio|docker)"
_POD = re.compile(rf"(?:[a-z0-9-]+-)?pod{_UID}(?:\.slice)?")
_CONTAINER = re.compile(rf"(?:{_RUNTIME}-)?{_ID}(?:\.scope)?")
_ANY_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
# A kubelet with the systemd driver before a runtime without it: one literal name for both.
_BOTH = re.compile(rf"(?:[a-z0-9-]+-)?pod{_UID}\.slice:{_RUNTIME}:{_ID}")


class ContainerRef(NamedTuple):
    """A container of a pod, as the kubelet and the runtime know it."""

    pod_uid: str
    """With dashes; for a static pod the 32 digits of its manifest's hash."""
    container_id: str
    """64 hexadecimal digits."""


def container_in_path(path: str) -> ContainerRef | None:
    """The outermost pod and container that a cgroup path names; None where it names none."""
    pod = ""
    for segment in path.removesuffix(" (deleted)").split("/"):
        if both := _BOTH.fullmatch(segment):
            return ContainerRef(both["pod"].replace("_", "-"), both["id"])
        if not pod:
            if found := _POD.fullmatch(segment):
                pod = found["pod"].replace("_", "-")
        elif found := _CONTAINER.fullmatch(segment):
            return ContainerRef(pod, found["id"])
    return None


class Membership(NamedTuple):
    """What /proc/PID/cgroup tells."""

    container: ContainerRef | None
    """None for a host process."""
    inner: bool
    """True in a container that runs inside of `container`."""
    forgotten: bool
    """True where a v1 hierarchy shows `/`, as it does for every zombie: ask its parent."""


def parse_membership(raw: bytes) -> Membership:
    """Parse one /proc/PID/cgroup. Lines that aren't understood count as no container."""
    container = None
    inner = forgotten = False
    for line in raw.decode("utf-8", "surrogateescape").split("\n"):
        hierarchy, _, rest = line.partition(":")
        path = rest.partition(":")[2]
        if hierarchy not in ("", "0") and path == "/":
            forgotten = True
        found = container_in_path(path)
        if found is not None:
            container = container or found
            inner = inner or bool(_ANY_ID.search(path.rpartition(found.container_id)[2]))
    return Membership(container, inner, forgotten)


class LiveTasks(NamedTuple):
    """What is alive, as the cgroups tell it."""

    lists: list[bytes]
    """For each cgroup the ids of its live tasks, a line each."""
    complete: bool
    """False where a cgroup came or went meanwhile, so that some of its tasks may be missing."""

    def total(self) -> int:
        return sum(ids.count(b"\n") for ids in self.lists)


class CgroupError(OSError):
    """The cgroup file system can't be read as needed; the sentence says why."""


class CgroupTree:
    """The cgroups of one hierarchy, v2 or v1.

    Remembers which cgroups have which children. A change can't escape it: a child that went away is
    missed when it is read, and one that came alone changes the link count of its parent's folder.
    """

    def __init__(self, cgroupfs: Path = Path("/sys/fs/cgroup")) -> None:
        self._children: dict[str, tuple[int, list[str]]] = {}
        if (cgroupfs / "cgroup.controllers").exists():
            self.root, self._tasks = str(cgroupfs), "/cgroup.threads"
        elif (cgroupfs / "pids" / "tasks").exists():
            self.root, self._tasks = str(cgroupfs / "pids"), "/tasks"
        else:
            raise CgroupError(
                f"{cgroupfs} has neither cgroup v2 nor the pids controller of v1; "
                "name the host's cgroup file system with --path.cgroupfs"
            )

    def live_tasks(self) -> LiveTasks:
        """Every task that is alive, by cgroup. `CgroupError` where the root can't be read."""
        lists: list[bytes] = []
        complete = self._walk(lambda path: lists.append(read_file(path + self._tasks)))
        return LiveTasks(lists, complete)

    def refresh(self) -> None:
        """Look which cgroups there are. `CgroupError` where the root can't be read."""
        self._walk(lambda _path: None)

    def container_ids(self) -> set[str]:
        """Ids of the containers that had a cgroup at the last look, of others some nonsense."""
        names = (path.rpartition("/")[2].removesuffix(".scope") for path in self._children)
        return {name[-64:] for name in names}

    def pods(self) -> dict[str, str]:
        """The cgroup of each pod at the last look, by the pod's uid."""
        found: dict[str, str] = {}
        for path in self._children:
            name = path.rpartition("/")[2]
            if "pod" in name and (pod := _POD.fullmatch(name)):
                found.setdefault(pod["pod"].replace("_", "-"), path)
        return found

    def pids(self, cgroup: str) -> tuple[int, int] | None:
        """Tasks in a cgroup and below it, and its limit; None where it has none or is gone."""
        try:
            limit = read_file(f"{cgroup}/pids.max").strip()
            return (
                None if limit == b"max" else (int(read_file(f"{cgroup}/pids.current")), int(limit))
            )
        except (OSError, ValueError):
            return None

    def _walk(self, visit: Callable[[str], None]) -> bool:
        """Visit every cgroup; False where one went away meanwhile."""
        seen: dict[str, tuple[int, list[str]]] = {}
        complete = True
        pending = [self.root]
        while pending:
            path = pending.pop()
            try:
                seen[path] = self._children_of(path)
                visit(path)
            except OSError as error:
                if path == self.root:
                    raise CgroupError(
                        error.errno, f"the cgroups in {path} can't be read: {error.strerror}"
                    ) from error
                seen.pop(path, None)
                seen.pop(path.rpartition("/")[0], None)  # its list is out of date
                complete = False
            else:
                pending.extend(seen[path][1])
        self._children = seen
        return complete

    def _children_of(self, path: str) -> tuple[int, list[str]]:
        links = os.stat(path).st_nlink  # noqa: PTH116 - many at every scrape
        known = self._children.get(path)
        # Folders of a cgroup file system have two links and one for each child. Other file systems
        # (a test's copy on btrfs) may count 1 always: those are listed every time.
        if known is not None and known[0] == links and links >= 2:
            return known
        children: list[str] = []
        if links != 2:
            with os.scandir(path) as entries:
                children = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        return links, children
