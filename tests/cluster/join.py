"""Three control planes with stacked etcd, as `kubeadm join --control-plane` makes them.

The first node is made by `kubeadm init`, which leaves the shared PKI, encrypted, in the cluster;
the others fetch it and become members of etcd. All are reached at one address (balancer.py), which
is in every kubeconfig of theirs.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from deploy.local.cache import print_progress
from tests.cluster import lifetime
from tests.cluster.balancer import balancer
from tests.cluster.kubeadm import (
    KubeadmCluster,
    Progress,
    init,
    kubeadm,
    load_images,
    start_kubernetes_node,
    wait_until_ready,
)
from tests.cluster.kubeadm_config import Settings, join_configuration, minor_version
from tests.cluster.kubernetes_build import Binaries, kubernetes_binaries
from tests.cluster.netns import Network
from tests.cluster.node import Node
from tests.cluster.pki import read_certificates

NODES = 3
PORT = 6443
_CLUSTER = {
    # Milliseconds. Three members on a few busy cores miss the usual 100 now and then, and each new
    # election would be a moment without a leader that no rotation is to blame for.
    "etcd": {"local": {"extraArgs": {"heartbeat-interval": "300", "election-timeout": "3000"}}},
    # It is also how long an API server that ends waits for watches, which end at no time: usually
    # a minute for each of the nodes.
    "apiServer": {"extraArgs": {"request-timeout": "15s"}},
}

_KUBELET = {
    # A kubelet that has just started on a busy machine doesn't know its disk yet, refuses etcd for
    # the 100 MiB of it that its manifest asks for, and never looks at that manifest again.
    "featureGates": {"LocalStorageCapacityIsolation": False},
}


@contextmanager
def joined_cluster(
    workdir: Path, *, progress: Progress = print_progress
) -> Iterator[KubeadmCluster]:
    """Three control planes for as long as the context; only their logs in `workdir` stay.

    Raises NodeError if they don't come up.
    """
    began = time.monotonic()

    def told(message: str) -> None:
        progress(f"{time.monotonic() - began:5.0f} s  {message}")

    for name in lifetime.sweep():
        told(f"removed {name}, which an earlier run left")
    binaries = kubernetes_binaries(progress=told)
    nodes: list[Node] = []
    with ExitStack() as stack:
        for index in range(1, NODES + 1):
            state = lifetime.reserve(
                workdir,
                cluster=nodes[0].state.cluster if nodes else "",
                index=index,
                detached=False,
                keep_logs=True,
            )
            told(f"starting node {state.name}")
            nodes.append(start_kubernetes_node(state, binaries, others=tuple(nodes)))
            stack.callback(nodes[-1].remove)
        network = Network(nodes[0].state.network)
        servers = [network.node(node.state.index) for node in nodes]
        stack.enter_context(balancer(network.machine, PORT, servers))
        settings = Settings(
            control_plane_endpoint=f"{network.machine}:{PORT}",
            certificate_key=secrets.token_hex(32),
            cluster=_CLUSTER,
            kubelet=_KUBELET if minor_version(binaries.version) < 25 else {},
            token=f"{secrets.token_hex(3)}.{secrets.token_hex(8)}",
        )
        cluster = KubeadmCluster(nodes[0].state.cluster, nodes, binaries)
        _build(cluster, binaries, settings, told)
        told(f"cluster {cluster.name}: {NODES} control planes at {settings.control_plane_endpoint}")
        yield cluster


def _build(
    cluster: KubeadmCluster, binaries: Binaries, settings: Settings, progress: Progress
) -> None:
    """Nodes into one cluster. Images are loaded while kubeadm waits for other things."""
    first, *others = cluster.nodes
    with ThreadPoolExecutor(1) as loader:
        load_images(first, binaries, progress)
        loaded: list[Future[None]] = [
            loader.submit(load_images, node, binaries, _silent) for node in others
        ]
        init(first, binaries, settings, progress)
        for node, images in zip(others, loaded, strict=True):
            images.result()
            _join(node, first, binaries, settings, progress)
    wait_until_ready(cluster, progress)


def _silent(_: str) -> None:
    """Several nodes' lines would be mixed."""


def _join(
    node: Node, first: Node, binaries: Binaries, settings: Settings, progress: Progress
) -> None:
    address = Network(node.state.network).node(node.state.index)
    ca = read_certificates(first.root / "etc/kubernetes")["ca"].public_key()
    key = ca.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    ca_hash = f"sha256:{hashlib.sha256(key).hexdigest()}"
    config = join_configuration(binaries.version, node.name, address, ca_hash, settings)
    kubeadm(node, ["join", "--skip-phases=preflight"], config, progress)
