"""A cluster's own certificates made to end at any moment, and put in use.

The cluster's real CA keys sign them. Components are restarted without the kubelet's back-off:
while it is stopped they are ended, and when it comes back it starts them as if for the first time.
"""

from __future__ import annotations

import os
import signal
import ssl
import time
from contextlib import suppress
from pathlib import Path

from cryptography import x509

from tests.cluster.kubeadm import COMPONENTS, KubeadmCluster, wait, wait_for_control_plane
from tests.cluster.netns import Network
from tests.cluster.node import Node, NodeError, inner_pid
from tests.cluster.pki import Remaining, set_remaining

_TERM_SECONDS = 8


def expire_certificates(
    cluster: KubeadmCluster, node: Node, remaining: Remaining, *, restart: bool = True
) -> dict[str, x509.Certificate]:
    """Give the certificates in the node's /etc/kubernetes `remaining` life (pki.set_remaining);
    the new ones by kubeadm's name. Negative: they have expired.

    With `restart` the components come back with them. With expired ones the API server can't reach
    etcd and ends again and again, as it does on a real node: then this returns as soon as etcd
    serves the new certificate.
    """
    signed = set_remaining(node.root / "etc/kubernetes", remaining)
    if restart:
        restart_control_plane(cluster, node, healthy=_all_valid(signed))
    return signed


def restart_control_plane(cluster: KubeadmCluster, node: Node, *, healthy: bool = True) -> None:
    """End all static pods' processes at once and have the kubelet start them anew.

    With `healthy`, returns when all of them are Ready, else when etcd serves.
    """
    before = {name: component_pid(node, name) for name in COMPONENTS}
    node.stop("kubelet")
    try:
        for name in reversed(COMPONENTS):
            if (pid := before[name]) is not None:
                _end(pid)
    finally:
        node.start("kubelet")

    def restarted() -> bool:
        wanted = COMPONENTS if healthy else COMPONENTS[:1]
        return all(component_pid(node, name) not in {None, before[name]} for name in wanted)

    def ready() -> bool:
        return cluster.kubectl("get", "--raw=/readyz", check=False, timeout=20) == "ok"

    wait("restarted control plane", restarted, cluster.nodes)
    address = Network(node.state.network).node(node.state.index)
    if healthy:
        wait("API server ready", ready, cluster.nodes)
        wait_for_control_plane(cluster)
    else:
        wait("etcd serving", lambda: served_certificate(address, 2379) is not None, cluster.nodes)


def component_pid(node: Node, name: str) -> int | None:
    """The process of a static pod's component ("etcd", "kube-apiserver" …), as the machine counts;
    None while there is none."""
    for pid in node.pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
            if program.rsplit(b"/", 1)[-1] == name.encode() and inner_pid(pid, 2) == 1:
                return pid
    return None


def served_certificate(host: str, port: int) -> x509.Certificate | None:
    """What a TLS endpoint serves, expired or not, asked without a client certificate; None if
    nobody answers within seconds."""
    try:
        return x509.load_pem_x509_certificate(
            ssl.get_server_certificate((host, port), timeout=5).encode()
        )
    except OSError:
        return None


def _all_valid(signed: dict[str, x509.Certificate]) -> bool:
    now = time.time()
    return all(certificate.not_valid_after_utc.timestamp() > now for certificate in signed.values())


def _end(pid: int) -> None:
    """TERM, and KILL after some seconds: an API server waits for open watches."""
    with suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(process, signal.SIGTERM)
            deadline = time.monotonic() + _TERM_SECONDS
            while _runs(pid) and time.monotonic() < deadline:
                time.sleep(0.1)
            signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)
    deadline = time.monotonic() + _TERM_SECONDS
    while _runs(pid):
        if time.monotonic() > deadline:
            raise NodeError(f"process {pid} survives SIGKILL")
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
