"""A private containerd, and containers under a real containerd-shim, without any Kubernetes.

It runs in a node of its own (node.py): own root, state and socket, cgroups below the node's, gone
with all its containers when the node goes. Containers can stand in cgroups of the shapes that
kubelets make, and have the links in /var/log/containers from which names are read without an API.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from deploy.local.cache import print_progress
from deploy.local.debian import binary
from tests.cluster import lifetime
from tests.cluster.images import Image, archive, workload_image
from tests.cluster.node import Node, NodeError, inner_pid, start_node
from tests.cluster.node_init import Service

CONFIG = "/etc/containerd/config.toml"
PROGRAMS = ("containerd", "containerd-shim-runc-v2", "ctr", "runc")
CONTAINERD = Service("containerd", ["containerd", "--config", CONFIG], needs=CONFIG)

Shape = Literal["cgroupfs", "systemd"]
Qos = Literal["guaranteed", "burstable", "besteffort"]


def containerd_config(sandbox_image: str) -> str:
    """containerd's configuration in a node.

    A sandbox wants an oom_score_adj of -998, which takes CAP_SYS_RESOURCE. Where the machine lacks
    that, every sandbox would fail ("can't get final child's PID from pipe: EOF").
    """
    return f"""version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{sandbox_image}"
  restrict_oom_score_adj = {str(not _can_lower_oom_score()).lower()}
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/opt/cni/bin"
  conf_dir = "/etc/cni/net.d"
"""


def _can_lower_oom_score() -> bool:
    sys_resource = 24
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) >> sys_resource & 1)


def programs() -> dict[str, Path]:
    """What a node with containerd needs on its PATH."""
    return {name: binary(name) for name in PROGRAMS}


@dataclass(frozen=True)
class Pod:
    """The pod that a container pretends to be of."""

    name: str = "web-5d4f8c7b9-abcde"
    namespace: str = "tenant"
    qos: Qos = "besteffort"
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    pids_max: int | None = None
    """pids.max of the pod's cgroup; None leaves it unlimited."""

    def cgroup(self, shape: Shape) -> str:
        """Where kubelets put this pod."""
        if shape == "systemd":
            parts = ["kubepods", *([] if self.qos == "guaranteed" else [self.qos])]
            parts.append("pod" + self.uid.replace("-", "_"))
            slices = ["-".join(parts[: end + 1]) for end in range(len(parts))]
            return "".join(f"/{name}.slice" for name in slices)
        qos = "" if self.qos == "guaranteed" else f"/{self.qos}"
        return f"/kubepods{qos}/pod{self.uid}"


@dataclass(frozen=True)
class Container:
    """A container that was started; it may have ended since."""

    host: ContainerdHost
    id: str
    name: str
    pod: Pod | None
    cgroup: str
    """Path as seen in the node; on the machine the node's own cgroup stands in front."""
    pid: int
    """Its PID 1, as the machine counts."""

    def exec(self, argv: Sequence[str], *, check: bool = True) -> str:
        """Run a program in it to its end; what it printed."""
        execution = ["task", "exec", "--exec-id", secrets.token_hex(4), self.id, *argv]
        return self.host.ctr(*execution, namespace="k8s.io", check=check)

    def stop(self) -> None:
        """Kill and delete it."""
        self.host.ctr("task", "delete", "--force", self.id, check=False)  # gives the task's status
        self.host.ctr("container", "delete", self.id)


@dataclass(frozen=True)
class ContainerdHost:
    """A running containerd in its node."""

    node: Node

    def ctr(
        self, *arguments: str, namespace: str = "k8s.io", check: bool = True, timeout: float = 120
    ) -> str:
        """Run containerd's own client; what it printed. Raises NodeError if it fails."""
        argv = ["ctr", "--namespace", namespace, *arguments]
        return self.node.run(argv, check=check, timeout=timeout).stdout

    def load(self, image: Image) -> None:
        """Import an image."""
        self.ctr("images", "import", str(archive(image)))

    def run(
        self,
        image: str,
        argv: Sequence[str],
        *,
        pod: Pod | None = None,
        name: str = "main",
        shape: Shape = "cgroupfs",
        cgroup: str | None = None,
        network: bool = False,
    ) -> Container:
        """Start a container; it runs when this returns.

        With `pod` it stands in that pod's cgroup and has its log and link below /var/log, as a
        kubelet makes them. `cgroup` is put in the place of that path (nested containers, other
        runtimes' shapes). `network`: share the node's.
        """
        identity = secrets.token_hex(32)
        if cgroup is None:
            cgroup = f"/{name}-{identity}" if pod is None else pod.cgroup(shape)
            if pod is not None:
                prefix, suffix = ("cri-containerd-", ".scope") if shape == "systemd" else ("", "")
                self._limit_pids(cgroup, pod)
                cgroup = f"{cgroup}/{prefix}{identity}{suffix}"
        log = self._log(identity, name, pod)
        flags = ["--detach", "--cgroup", cgroup, "--log-uri", f"file://{log}"]
        if network:
            flags.append("--net-host")
        self.ctr("run", *flags, image, identity, *argv)
        tasks = self.ctr("task", "list").splitlines()
        inner = next(int(line.split()[1]) for line in tasks if line.startswith(identity))
        pid = next((pid for pid in self.node.pids if inner_pid(pid) == inner), 0)
        if not pid:
            raise NodeError(f"container {name} ended at once; its log: {self.node.root}{log}")
        return Container(self, identity, name, pod, cgroup, pid)

    def _limit_pids(self, cgroup: str, pod: Pod) -> None:
        if pod.pids_max is None:
            return
        mounts = [self.node.root / "sys/fs/cgroup" / part for part in ("pids", "")]
        folder = next(m for m in mounts if (m / "cgroup.procs").exists()) / cgroup.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pids.max").write_text(str(pod.pids_max))

    def _log(self, identity: str, name: str, pod: Pod | None) -> str:
        """The path of the container's log in the node."""
        logs = Path(self.node.state.directory, "var/log")
        if pod is None:
            folder = Path("containers-without-pod", identity)
            (logs / folder).mkdir(parents=True)
            return f"/var/log/{folder}/0.log"
        folder = Path("pods", f"{pod.namespace}_{pod.name}_{pod.uid}", name)
        (logs / folder).mkdir(parents=True, exist_ok=True)
        (logs / "containers").mkdir(exist_ok=True)
        link = logs / "containers" / f"{pod.name}_{pod.namespace}_{name}-{identity}.log"
        link.symlink_to(f"/var/log/{folder}/0.log")
        return f"/var/log/{folder}/0.log"


@contextmanager
def containerd_host(
    workdir: Path, *, progress: Callable[[str], None] = print_progress
) -> Iterator[ContainerdHost]:
    """A containerd with the workload image, gone without a trace afterwards but for its logs in
    `workdir`. Raises NodeError with its log's last lines if it doesn't come up."""
    for name in lifetime.sweep():
        progress(f"removed {name}, which an earlier run left")
    state = lifetime.reserve(workdir, detached=False, keep_logs=True)
    node = start_node(state, services=[CONTAINERD], programs=programs())
    try:
        host = ContainerdHost(node)
        configure(node, "")
        wait_for_containerd(node)
        host.load(workload_image())
        yield host
    finally:
        node.remove()


def configure(node: Node, sandbox_image: str) -> None:
    """Write containerd's configuration, upon which it starts."""
    path = node.root / CONFIG.lstrip("/")
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".new").write_text(containerd_config(sandbox_image))
    path.with_suffix(".new").rename(path)


def wait_for_containerd(node: Node, *, timeout: float = 60) -> None:
    """Until it answers."""
    deadline = time.monotonic() + timeout
    while node.run(["ctr", "version"], check=False).returncode != 0:
        if time.monotonic() > deadline:
            raise NodeError(
                f"{node.name}: containerd isn't up after {timeout} s\n"
                + node.last_lines("containerd")
            )
        time.sleep(0.2)
