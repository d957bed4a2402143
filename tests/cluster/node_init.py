"""What a node of the tests is made of, seen from inside: its file system, and its PID 1.

A node sees the machine's files, so that any program of the machine runs in it, but through
overlays: what it writes is its own. /var, /run, /sys and its cgroups are its own altogether, and
so is whatever a Kubernetes of the machine itself may have left (MASKED). Only the project's folder
and the folder for temporary files are shared with the machine, for tests to hand things over.
PID 1 starts the services and starts them again when they end, as systemd does on a real node.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import stat
import struct
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tests.cluster import cgroups
from tests.cluster.syscalls import Mount, Namespace, become_root, bind, mount, unshare

SERVICES_CGROUP = "system.slice"
"""Where the node's own programs live, so that pods can have cgroups beside it (a rule of v2)."""
OWN = {"proc", "sys", "dev", "run", "var", "tmp", "lost+found"}
MASKED = (
    "etc/kubernetes",
    "etc/cni",
    "etc/containerd",
    "etc/ssl/etcd",
    "opt/cni",
    "root/.kube",
    "usr/libexec/kubernetes",
)
OWN_SYSCTLS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
"""Settings of the whole machine that a kubelet changes unless it finds these values."""
RESTART_SECONDS = 1.0
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


@dataclass(frozen=True)
class Service:
    """A program that PID 1 keeps running."""

    name: str
    argv: list[str]
    needs: str = ""
    """Path of a file in the node without which it isn't started; empty: at once."""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeSpec:
    """All that PID 1 is told."""

    name: str
    """Host name of the node, and its cgroup on the machine."""
    directory: str
    """Its folder on disk: `var` and `logs` are in there."""
    shared: list[str]
    """Absolute paths that are the same in the node and on the machine."""
    read_only: list[str]
    """Likewise, not to be changed from within (the Python that runs this, the cache)."""
    programs: dict[str, str]
    """Name in the node's /usr/local/bin -> program on the machine."""
    services: list[Service]

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> NodeSpec:
        """What `write` wrote."""
        raw: dict[str, Any] = json.loads(path.read_text())
        return cls(**{**raw, "services": [Service(**service) for service in raw["services"]]})


def become_node(spec: NodeSpec) -> None:
    """Put this process, the first of a new pid namespace, into a new node, which can then be
    entered; `supervise` has to follow."""
    cgroups.join(spec.name)
    unshare(Namespace.MOUNT | Namespace.CGROUP | Namespace.UTS | Namespace.IPC | Namespace.NETWORK)
    socket.sethostname(spec.name)
    _bring_up_loopback()
    _make_file_system(spec)
    cgroups.create(SERVICES_CGROUP)
    cgroups.join(SERVICES_CGROUP)
    cgroups.hand_down_controllers()
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def _make_file_system(spec: NodeSpec) -> None:
    mount("none", "/", flags=Mount.PRIVATE | Mount.RECURSIVE)
    root = Path(spec.directory) / "root"
    for folder in (root, Path(spec.directory) / "var", Path(spec.directory) / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    mount("tmpfs", root, "tmpfs", options="mode=755")
    _take_over_top_level(root)
    for name in ("proc", "sys", "dev", "run", "var", "tmp"):
        (root / name).mkdir()
    (root / "tmp").chmod(0o1777)
    _mount_kernel_file_systems(root)
    mount("tmpfs", root / "run", "tmpfs", options="mode=755")
    bind(Path(spec.directory) / "var", root / "var")
    for name in ("lib", "log/services", "tmp", "cache"):
        (root / "var" / name).mkdir(parents=True, exist_ok=True)
    bind(Path(spec.directory) / "logs", root / "var/log/services")
    if not (root / "var/run").is_symlink():
        (root / "var/run").symlink_to("/run")
    for path in sorted([*spec.shared, *spec.read_only]):
        source, target = Path(path), root / path.lstrip("/")
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            bind(source, target, read_only=path in spec.read_only)
    for name, program in spec.programs.items():
        link = root / "usr/local/bin" / name
        link.unlink(missing_ok=True)
        link.symlink_to(program)
    become_root(root)
    mount("none", "/", flags=Mount.SHARED | Mount.RECURSIVE)  # as systemd does; pods need it


def _take_over_top_level(root: Path) -> None:
    """/usr, /etc and the rest of the machine's folders, each as the lower half of an overlay."""
    for entry in sorted(Path("/").iterdir()):
        if entry.name in OWN:
            continue
        if entry.is_symlink():
            (root / entry.name).symlink_to(entry.readlink())
        elif entry.is_dir():
            upper, work = (root / f".{half}" / entry.name for half in ("upper", "work"))
            for folder in (root / entry.name, upper, work):
                folder.mkdir(parents=True)
            upper.chmod(stat.S_IMODE(entry.stat().st_mode))
            _mask(entry.name, root / ".upper")
            options = f"lowerdir={entry},upperdir={upper},workdir={work}"
            mount("overlay", root / entry.name, "overlay", options=options)


def _mask(top: str, upper: Path) -> None:
    """Put an empty folder in the place of each of the machine's own that a node must not see."""
    for path in MASKED:
        if path.startswith(f"{top}/") and Path("/", path).is_dir():
            (upper / path).mkdir(parents=True)
            os.setxattr(upper / path, "trusted.overlay.opaque", b"y")


def _mount_kernel_file_systems(root: Path) -> None:
    plain = Mount.NO_SUID | Mount.NO_DEV | Mount.NO_EXEC
    bind(Path("/dev"), root / "dev", flags=Mount.RECURSIVE)
    mount("proc", root / "proc", "proc", plain)
    _protect_sysctls(root)
    mount("sysfs", root / "sys", "sysfs", plain)
    unified = Path("/sys/fs/cgroup")
    machine = cgroups.hierarchies()
    if all(hierarchy.mount != unified for hierarchy in machine):  # v1, with or without v2
        mount("tmpfs", root / "sys/fs/cgroup", "tmpfs", plain, "mode=755")
        for entry in unified.iterdir():
            if entry.is_symlink():
                (root / "sys/fs/cgroup" / entry.name).symlink_to(entry.readlink())
    for hierarchy in machine:
        target = root / str(hierarchy.mount).lstrip("/")
        target.mkdir(exist_ok=True)
        mount("cgroup", target, hierarchy.filesystem, plain, hierarchy.options)


def _protect_sysctls(root: Path) -> None:
    """Only the network's settings are the node's own; the rest can't be written from it."""
    sysctls = root / "proc/sys"
    values = root / ".sysctls"
    values.mkdir()
    bind(sysctls, sysctls, read_only=True)
    bind(root / "proc/sys/net", root / "proc/sys/net")
    mount("none", root / "proc/sys/net", flags=Mount.BIND | Mount.REMOUNT)
    for name, value in OWN_SYSCTLS.items():
        file = values / name.replace("/", ".")
        file.write_text(f"{value}\n")
        if (sysctls / name).exists():
            bind(file, sysctls / name)


def supervise(services: list[Service]) -> NoReturn:
    """PID 1's life. A service with a file /run/services/NAME.down is left alone (Node.stop)."""
    marks = Path("/run/services")
    marks.mkdir()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    pids: dict[str, int] = {}
    not_before: dict[str, float] = {}
    while True:
        for service in services:
            if (
                service.name not in pids
                and not (marks / f"{service.name}.down").exists()
                and time.monotonic() >= not_before.get(service.name, 0)
                and (not service.needs or Path(service.needs).exists())
            ):
                pids[service.name] = _spawn(service)
                (marks / f"{service.name}.pid").write_text(str(pids[service.name]))
        signal.sigtimedwait({signal.SIGCHLD}, 0.2)
        for pid in _reap():
            for name in [name for name, running in pids.items() if running == pid]:
                del pids[name]
                (marks / f"{name}.pid").unlink()
                not_before[name] = time.monotonic() + RESTART_SECONDS


def _spawn(service: Service) -> int:
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.posix_spawnp(
        service.argv[0],
        service.argv,
        {**os.environ, **service.environment},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, f"/var/log/services/{service.name}.log", append, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigmask=[],
        setsigdef=[signal.SIGPIPE, signal.SIGTERM, signal.SIGINT, signal.SIGHUP],
    )


def _reap() -> list[int]:
    """All children that ended, adopted ones too."""
    ended = []
    with suppress(ChildProcessError):
        while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            ended.append(pid)
    return ended
