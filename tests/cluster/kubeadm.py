"""A real kubeadm cluster: real kubelet, containerd, and control plane as static pods.

It runs in a node (node.py) with namespaces of its own and is made by the real `kubeadm init`, so
that certificates, manifests and processes are what they are on an operator's machine. `kubectl`
and tests reach the API server from outside at the node's address; programs run in the node
(`cluster.nodes[0].run`) see what they would see on a real one. kube-proxy and CoreDNS are left out:
no Service has an address that works, pods reach the API server at the node's.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.local.cache import print_progress
from deploy.local.debian import binary, cni_plugins
from tests.cluster import lifetime, netns
from tests.cluster.api import Api
from tests.cluster.containerd import CONTAINERD, configure, programs, wait_for_containerd
from tests.cluster.images import archive, control_plane_images, workload_image
from tests.cluster.kubeadm_config import (
    Settings,
    cni_configuration,
    init_configuration,
    kubelet_service,
)
from tests.cluster.kubernetes_build import Binaries, kubernetes_binaries
from tests.cluster.netns import Network
from tests.cluster.node import Node, NodeError, running_nodes, start_node
from tests.cluster.node_init import Service

COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class KubeadmCluster:
    """A cluster that is up."""

    name: str
    nodes: list[Node]
    binaries: Binaries
    static_pods: tuple[str, ...] = COMPONENTS
    """The components that each node runs so."""

    @property
    def kubeconfig(self) -> Path:
        """An administrator's, made when the cluster was: it stays as it is when the node's own
        /etc/kubernetes/admin.conf is renewed or expires."""
        return Path(self.nodes[0].state.directory) / "kubeconfig"

    @property
    def server(self) -> str:
        """The API server's URL."""
        return f"https://{Network(self.nodes[0].state.network).node(1)}:6443"

    @property
    def api(self) -> Api:
        """A client with the administrator's rights."""
        return Api(self.kubeconfig)

    @property
    def logs(self) -> list[Path]:
        """Every log of every node: services', and static pods' and other containers'."""
        return [path for node in self.nodes for path in log_files(node)]

    def kubectl(
        self,
        *arguments: str,
        stdin: str | None = None,
        check: bool = True,
        timeout: float = 60,
    ) -> str:
        """kubectl as administrator, from outside; what it printed on stdout.

        Raises NodeError with its stderr if it fails, unless `check` is off.
        """
        try:
            done = subprocess.run(
                [self.binaries.kubectl, f"--kubeconfig={self.kubeconfig}", *arguments],
                input=stdin,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
                env={"HOME": tempfile.gettempdir()},  # its cache
            )
        except subprocess.TimeoutExpired:
            raise NodeError(f"kubectl {' '.join(arguments)}: no end after {timeout} s") from None
        if check and done.returncode != 0:
            raise NodeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Create or change objects, given as manifests."""
        items = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "--filename=-", stdin=json.dumps(items))

    def get(self, *arguments: str) -> dict[str, Any]:
        """An object, or a list of them, as `kubectl get … -o json` gives it."""
        got: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "--output=json"))
        return got

    def wait(self, what: str, condition: Callable[[], bool], *, timeout: float = 120) -> None:
        """Until `condition` holds. Raises NodeError with the components' last lines."""
        wait(what, condition, self.nodes, timeout=timeout)

    def remove(self) -> None:
        """End it, and wait until nothing of it is left on the machine."""
        for node in reversed(self.nodes):
            node.remove()


@contextmanager
def kubeadm_cluster(
    workdir: Path,
    *,
    settings: Settings = Settings(),  # noqa: B008
    progress: Progress = print_progress,
) -> Iterator[KubeadmCluster]:
    """A cluster for as long as the context, gone without a trace afterwards but for its logs in
    `workdir`. Raises NodeError if it doesn't come up."""
    cluster = create_cluster(workdir, settings=settings, progress=progress)
    try:
        yield cluster
    finally:
        cluster.remove()


def create_cluster(
    workdir: Path,
    *,
    settings: Settings = Settings(),  # noqa: B008
    detached: bool = False,
    progress: Progress = print_progress,
) -> KubeadmCluster:
    """A cluster of one node, with its folder in `workdir`.

    It ends with this process unless it is `detached`, and then its logs go with it too.
    """
    for name in lifetime.sweep():
        progress(f"removed {name}, which an earlier run left")
    binaries = kubernetes_binaries(progress=progress)
    state = lifetime.reserve(workdir, detached=detached, keep_logs=not detached)
    progress(f"cluster {state.cluster}: starting node {state.name}")
    node = start_kubernetes_node(state, binaries, others=())
    try:
        load_images(node, binaries, progress)
        init(node, binaries, settings, progress)
        cluster = KubeadmCluster(state.cluster, [node], binaries)
        wait_until_ready(cluster, progress)
    except BaseException:
        node.remove()
        raise
    progress(f"cluster {state.cluster}: ready at {cluster.server}")
    return cluster


def find_clusters() -> list[KubeadmCluster]:
    """The detached clusters that run on this machine."""
    names = sorted({state.cluster for state in lifetime.states() if state.detached})
    return [
        KubeadmCluster(name, nodes, kubernetes_binaries())
        for name in names
        if (nodes := running_nodes(name))
    ]


def start_kubernetes_node(
    state: lifetime.NodeState,
    binaries: Binaries,
    *,
    others: Sequence[Node],
    services: Sequence[Service] = (),
    more_programs: Mapping[str, Path] | None = None,
) -> Node:
    """A node with its network and containerd; its kubelet waits for `kubeadm init` or `join`."""
    network = Network(state.network)
    kubernetes = {name: binaries.directory / name for name in ("kubeadm", "kubectl", "kubelet")}
    node = start_node(
        state,
        services=[
            CONTAINERD,
            kubelet_service(binaries.version, network.node(state.index)),
            *services,
        ],
        programs={
            **programs(),
            **kubernetes,
            "etcdctl": binary("etcdctl"),
            **(more_programs or {}),
        },
    )
    try:
        netns.connect(node, others)
        (node.root / "etc/resolv.conf").unlink(missing_ok=True)
        (node.root / "etc/resolv.conf").write_text("# no name server can be reached from here\n")
        _install_cni(node, network)
        pause = _wanted_images(node, binaries)
        configure(node, next(image for image in pause if "/pause:" in image))
        wait_for_containerd(node)
    except BaseException:
        node.remove()
        raise
    return node


def _install_cni(node: Node, network: Network) -> None:
    plugins = node.root / "opt/cni/bin"
    plugins.mkdir(parents=True)
    for plugin in cni_plugins().iterdir():
        (plugins / plugin.name).symlink_to(plugin)
    folder = node.root / "etc/cni/net.d"
    folder.mkdir(parents=True)
    (folder / "10-pods.conflist").write_text(cni_configuration(network, node.state.index))


def _wanted_images(node: Node, binaries: Binaries) -> list[str]:
    argv = ["kubeadm", "config", "images", "list", f"--kubernetes-version={binaries.version}"]
    return node.run(argv).stdout.split()


def load_images(node: Node, binaries: Binaries, progress: Progress) -> None:
    """Put every image that its pods may want into the node's containerd."""
    images = control_plane_images(binaries, _wanted_images(node, binaries))
    for image in [*images, workload_image()]:
        progress(f"loading {image.reference}")
        argv = ["ctr", "--namespace=k8s.io", "images", "import", str(archive(image))]
        node.run(argv, timeout=300)


def init(node: Node, binaries: Binaries, settings: Settings, progress: Progress) -> None:
    """Make the node a cluster's first control plane by `kubeadm init`."""
    address = Network(node.state.network).node(node.state.index)
    config = init_configuration(binaries.version, node.name, address, settings)
    uploads = ["--upload-certs"] if settings.certificate_key else []
    flags = ["--skip-phases=preflight,addon", "--skip-token-print", *uploads]
    kubeadm(node, ["init", *flags], config, progress)
    kubeconfig = Path(node.state.directory) / "kubeconfig"
    kubeconfig.touch(mode=0o600)
    kubeconfig.write_text((node.root / "etc/kubernetes/admin.conf").read_text())


def kubeadm(node: Node, arguments: Sequence[str], config: str, progress: Progress) -> None:
    """Run `kubeadm init` or `join` with a configuration, which stays on the node.

    Its preflight wants crictl, which Debian lacks: `arguments` leave it out.
    """
    file = node.root / "etc/kubernetes/kubeadm.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(config)
    progress(f"kubeadm {arguments[0]}")
    with (node.logs / f"kubeadm-{arguments[0]}.log").open("w") as log:
        process = node.popen(
            ["kubeadm", *arguments, "--config=/etc/kubernetes/kubeadm.yaml"],
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            if line.startswith("[") and "WARNING" not in line:  # of those, systemd's absence
                progress(f"  {line.strip()}")
    if process.wait() != 0:
        raise NodeError(f"{node.name}: kubeadm {arguments[0]} failed\n{last_lines(node)}")


def wait_until_ready(cluster: KubeadmCluster, progress: Progress) -> None:
    """Until nodes and their control planes are Ready, and pods can be made."""

    def ready() -> bool:
        listed = cluster.kubectl(
            "get",
            "nodes",
            '--output=jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}',
            check=False,
        )
        return listed.split() == ["True"] * len(cluster.nodes)

    def usable() -> bool:
        return "default" in cluster.kubectl("get", "serviceaccounts", check=False)

    progress("waiting for nodes, control planes and the first service account")
    cluster.wait("nodes Ready", ready)
    cluster.wait("service account for pods", usable)
    wait_for_control_plane(cluster)


def wait_for_control_plane(cluster: KubeadmCluster) -> None:
    """Until the API says of every static pod that it is Ready."""

    def ready() -> bool:
        listed = cluster.kubectl(
            "get",
            "pods",
            "--namespace=kube-system",
            "--selector=tier=control-plane",
            '--output=jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}',
            check=False,
        )
        return listed.split() == ["True"] * len(cluster.static_pods) * len(cluster.nodes)

    cluster.wait("static pods Ready in the API", ready)


def wait(
    what: str, condition: Callable[[], bool], nodes: Sequence[Node], *, timeout: float = 120
) -> None:
    """Until `condition` holds. Raises NodeError with the components' last lines."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(last_lines(node) for node in nodes)
            raise NodeError(f"not seen within {timeout:.0f} s: {what}\n{logs}")
        time.sleep(0.5)


def log_files(node: Node) -> list[Path]:
    """Logs of services first, then of containers, newest last; real paths on the machine."""
    pods = Path(node.state.directory) / "var/log/pods"
    containers = sorted(pods.glob("*/*/*.log"), key=lambda path: path.stat().st_mtime)
    return [*sorted(node.logs.glob("*.log")), *containers]


def last_lines(node: Node, count: int = 12) -> str:
    """The ends of a node's logs: its services', and the newest of each static pod's container."""
    newest = {path.parent.name: path for path in log_files(node) if path.parent != node.logs}
    chosen = [*sorted(node.logs.glob("*.log")), *(newest[n] for n in COMPONENTS if n in newest)]
    parts = []
    for path in chosen:
        lines = path.read_text(errors="replace").splitlines()[-count:]
        parts.append("\n".join([f"--- {path}", *(line[:400] for line in lines)]))
    return "\n".join(parts)
