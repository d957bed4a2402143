"""What a node of the tests owns on the machine, written down, so that nothing is ever left.

Each node has one file in STATE from before it starts until after it is gone. Its keeper (see
keeper.py) removes all of it when the node ends, however it ends. If even the keeper was killed, or
the machine went down, the next run finds the file and does the same (`sweep`).
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.cluster import cgroups

STATE = Path("/run/upkeep-tests")
NETWORKS = 64


@dataclass(frozen=True)
class NodeState:
    """One node's belongings. Everything but the logs goes when the node goes."""

    name: str
    """Unique on the machine; also the name of its cgroup and of its network device."""
    cluster: str
    index: int
    """1 for the first node of a cluster."""
    network: int
    """Number of the cluster's network (see netns.py)."""
    directory: str
    """Absolute. Its folder on disk."""
    keep_logs: bool
    """Whether `directory`/logs stays when the node goes."""
    boot_id: str
    keeper_pid: int = 0
    """0 until the keeper runs."""
    keeper_start: int = 0
    """Start time of that process in clock ticks after boot, since a pid alone is reused."""
    detached: bool = False
    """Whether it is meant to outlive the process that started it (`up`)."""

    @property
    def file(self) -> Path:
        """Where this is written."""
        return STATE / f"{self.name}.json"

    def write(self) -> None:
        """Put it in its place, whole or not at all."""
        STATE.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self.file.with_suffix(f".{os.getpid()}.new")
        temporary.write_text(json.dumps(asdict(self)))
        temporary.rename(self.file)

    def keeper_lives(self) -> bool:
        """Whether the keeper that was started for this node still runs."""
        return (
            self.boot_id == boot_id()
            and self.keeper_pid > 0
            and start_time(self.keeper_pid) == self.keeper_start
        )


def boot_id() -> str:
    """Changes with every boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_time(pid: int) -> int | None:
    """Start of a process in clock ticks after boot; None if there is none, or only a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in {b"Z", b"X"} else int(fields[19])


@contextmanager
def registry() -> Iterator[None]:
    """Hold the lock that two runs meet at when they pick names and networks."""
    STATE.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (STATE / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def states() -> list[NodeState]:
    """All nodes that are written down, dead ones too."""
    found = []
    for path in sorted(STATE.glob("*.json")):
        with suppress(FileNotFoundError):  # its keeper was faster
            found.append(NodeState(**json.loads(path.read_text())))
    return found


def reserve(
    directory: Path, *, cluster: str = "", index: int = 1, detached: bool, keep_logs: bool
) -> NodeState:
    """Write down a new node, with a name and a network that nobody else has.

    With `cluster` the node joins that cluster's network as number `index`.
    Raises RuntimeError when all networks are taken.
    """
    with registry():
        known = states()
        networks = {state.cluster: state.network for state in known}
        free = sorted(set(range(NETWORKS)) - set(networks.values()))
        if cluster not in networks and not free:
            raise RuntimeError(f"{NETWORKS} clusters run already: `make cluster-down` some")
        cluster = cluster or f"upkeep-{secrets.token_hex(3)}"
        state = NodeState(
            name=f"{cluster}-{index}",  # 15 characters: a network device has no more
            cluster=cluster,
            index=index,
            network=networks[cluster] if cluster in networks else free[0],
            directory=str(directory / f"{cluster}-{index}"),
            keep_logs=keep_logs,
            boot_id=boot_id(),
            keeper_pid=os.getpid(),  # until the keeper has taken over
            keeper_start=start_time(os.getpid()) or 0,
            detached=detached,
        )
        if state.file.exists():
            raise RuntimeError(f"a node {state.name} exists already")
        state.write()
    return state


def dispose(state: NodeState) -> None:
    """Remove all that a dead node owned. Its namespaces, and with them its mounts, went with its
    processes. Raises if something stays, and then the file stays too."""
    cgroups.remove(state.name)
    if Path(f"/sys/class/net/{state.name}").exists():
        # The kernel drops it too, but may take half a minute while connections linger; its routes
        # would meet those of the next cluster of that number.
        subprocess.run(["ip", "link", "delete", state.name], check=False, capture_output=True)
    directory = Path(state.directory)
    if directory.exists():
        for path in directory.iterdir():
            if not (state.keep_logs and path.name == "logs"):
                remove_tree(path)
        if not state.keep_logs:
            remove_tree(directory)
    state.file.unlink(missing_ok=True)


def sweep() -> list[str]:
    """Remove what dead runs left; the names of their nodes."""
    with registry():
        dead = [state for state in states() if not state.keeper_lives()]
        for state in dead:
            dispose(state)
    return [state.name for state in dead]


def remove_tree(path: Path) -> None:
    """Remove a file or folder, unless something is mounted in it: that would be removed too."""
    mounts = [line.split()[4] for line in cgroups.MOUNTINFO.read_text().splitlines()]
    inside = [mount for mount in mounts if Path(mount).is_relative_to(path)]
    if inside:
        raise RuntimeError(f"{inside[0]} is mounted: not removing {path}")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
