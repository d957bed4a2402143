"""Command lines and health questions of a control plane's components.

They are the flags of kubeadm's static pod manifests, without what belongs to a node, and with each
port given. Kept to flags that Kubernetes 1.20 and today's share, save for those by version.
"""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from tests.cluster.api import Api, ApiError
from tests.cluster.pki import Pki

SERVICE_NETWORK = "10.96.0.0/12"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Ports:
    """A loopback port for everything that listens."""

    etcd_client: int
    etcd_peer: int
    etcd_metrics: int
    apiserver: int
    controller_manager: int
    scheduler: int

    @classmethod
    def count(cls) -> int:
        """How many."""
        return len(fields(cls))


def commands(pki: Pki, ports: Ports, *, etcd: Path, data: Path) -> dict[str, list[str]]:
    """Component -> command line, in the order in which they have to start."""
    return {
        "etcd": [str(etcd), *_etcd(pki, ports, data)],
        "kube-apiserver": [str(pki.binaries.kube_apiserver), *_apiserver(pki, ports)],
        "kube-controller-manager": [
            str(pki.binaries.kube_controller_manager),
            *_controller_manager(pki, ports),
        ],
        "kube-scheduler": [str(pki.binaries.kube_scheduler), *_scheduler(pki, ports)],
    }


def health_checks(pki: Pki, ports: Ports) -> dict[str, Callable[[], bool]]:
    """Component -> question whether it is of use; raises OSError while nobody answers."""
    return {
        "etcd": lambda: _answers_ok(f"http://{LOOPBACK}:{ports.etcd_metrics}/health"),
        "kube-apiserver": lambda: _apiserver_ready(pki),
        "kube-controller-manager": lambda: _answers_ok(
            f"https://{LOOPBACK}:{ports.controller_manager}/healthz"
        ),
        "kube-scheduler": lambda: _answers_ok(f"https://{LOOPBACK}:{ports.scheduler}/healthz"),
    }


def _etcd(pki: Pki, ports: Ports, data: Path) -> list[str]:
    certificates = pki.directory / "pki/etcd"
    client = f"https://{LOOPBACK}:{ports.etcd_client}"
    peer = f"https://{LOOPBACK}:{ports.etcd_peer}"
    return [
        "--name=node-1",
        f"--data-dir={data}",
        f"--advertise-client-urls={client}",
        f"--listen-client-urls={client}",
        f"--listen-metrics-urls=http://{LOOPBACK}:{ports.etcd_metrics}",
        f"--initial-advertise-peer-urls={peer}",
        f"--listen-peer-urls={peer}",
        f"--initial-cluster=node-1={peer}",
        "--client-cert-auth=true",
        "--peer-client-cert-auth=true",
        f"--cert-file={certificates}/server.crt",
        f"--key-file={certificates}/server.key",
        f"--peer-cert-file={certificates}/peer.crt",
        f"--peer-key-file={certificates}/peer.key",
        f"--trusted-ca-file={certificates}/ca.crt",
        f"--peer-trusted-ca-file={certificates}/ca.crt",
    ]


def _apiserver(pki: Pki, ports: Ports) -> list[str]:
    certificates = pki.directory / "pki"
    return [
        f"--bind-address={LOOPBACK}",
        f"--advertise-address={LOOPBACK}",
        f"--secure-port={ports.apiserver}",
        "--endpoint-reconciler-type=none",  # a Service can't have a loopback endpoint
        "--allow-privileged=true",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--enable-bootstrap-token-auth=true",
        f"--client-ca-file={certificates}/ca.crt",
        f"--etcd-servers=https://{LOOPBACK}:{ports.etcd_client}",
        f"--etcd-cafile={certificates}/etcd/ca.crt",
        f"--etcd-certfile={certificates}/apiserver-etcd-client.crt",
        f"--etcd-keyfile={certificates}/apiserver-etcd-client.key",
        f"--kubelet-client-certificate={certificates}/apiserver-kubelet-client.crt",
        f"--kubelet-client-key={certificates}/apiserver-kubelet-client.key",
        f"--proxy-client-cert-file={certificates}/front-proxy-client.crt",
        f"--proxy-client-key-file={certificates}/front-proxy-client.key",
        "--requestheader-allowed-names=front-proxy-client",
        f"--requestheader-client-ca-file={certificates}/front-proxy-ca.crt",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-username-headers=X-Remote-User",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={certificates}/sa.pub",
        f"--service-account-signing-key-file={certificates}/sa.key",
        f"--service-cluster-ip-range={SERVICE_NETWORK}",
        f"--tls-cert-file={certificates}/apiserver.crt",
        f"--tls-private-key-file={certificates}/apiserver.key",
    ]


def _controller_manager(pki: Pki, ports: Ports) -> list[str]:
    certificates = pki.directory / "pki"
    return [
        *_client(pki, "controller-manager", ports.controller_manager),
        "--controllers=*,bootstrapsigner,tokencleaner",
        "--use-service-account-credentials=true",
        f"--client-ca-file={certificates}/ca.crt",
        f"--cluster-signing-cert-file={certificates}/ca.crt",
        f"--cluster-signing-key-file={certificates}/ca.key",
        f"--requestheader-client-ca-file={certificates}/front-proxy-ca.crt",
        f"--root-ca-file={certificates}/ca.crt",
        f"--service-account-private-key-file={certificates}/sa.key",
        "--kube-api-qps=100",  # else the accounts of its controllers take seconds at the start
        "--kube-api-burst=200",
        "--node-monitor-grace-period=120s",  # hollow nodes on a busy machine stay Ready
    ]


def _scheduler(pki: Pki, ports: Ports) -> list[str]:
    return _client(pki, "scheduler", ports.scheduler)


def _client(pki: Pki, user: str, port: int) -> list[str]:
    kubeconfig = pki.directory / f"{user}.conf"
    minor = int(pki.binaries.version.split(".")[1])
    insecure = ["--port=0"] if minor < 23 else []
    return [
        *insecure,
        f"--bind-address={LOOPBACK}",
        f"--secure-port={port}",
        f"--kubeconfig={kubeconfig}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        "--leader-elect=false",  # a killed one's lease would hold up its successor for 15 s
    ]


def _apiserver_ready(pki: Pki) -> bool:
    try:
        return Api(pki.directory / "admin.conf").text("/readyz") == "ok"
    except ApiError:  # some post-start hook isn't through yet
        return False


def _answers_ok(url: str) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # these two serve certificates that they sign themselves
    context.verify_mode = ssl.CERT_NONE
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with opener.open(url, timeout=5) as response:
            status: int = response.status
    except urllib.error.HTTPError:
        return False
    return status == 200
