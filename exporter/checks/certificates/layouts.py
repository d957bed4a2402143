"""Where kubeadm, Kubespray, k3s and the kubelet keep certificates, and who renews which.

Only what `kubeadm certs renew` can renew is managed by kubeadm: a leaf of its own list whose CA's
key is on this node. A CA, or a leaf below an external CA, is nobody's but people's.
"""

from collections.abc import Callable
from pathlib import PurePosixPath

import msgspec

KUBERNETES_DIRECTORY = "/etc/kubernetes"
PKI_DIRECTORIES = (f"{KUBERNETES_DIRECTORY}/pki", f"{KUBERNETES_DIRECTORY}/ssl")
"""kubeadm's own, and Kubespray's (whose `pki` is a link to `ssl`)."""

DEFAULT_PATTERNS = (
    "/etc/kubernetes/pki/*.crt",
    "/etc/kubernetes/pki/etcd/*.crt",
    "/etc/kubernetes/ssl/*.crt",
    "/etc/kubernetes/ssl/etcd/*.crt",
    "/etc/kubernetes/admin.conf",
    "/etc/kubernetes/super-admin.conf",
    "/etc/kubernetes/controller-manager.conf",
    "/etc/kubernetes/scheduler.conf",
    "/etc/kubernetes/kubelet.conf",
    "/var/lib/kubelet/pki/kubelet-client-current.pem",
    "/var/lib/kubelet/pki/kubelet-server-current.pem",
    "/var/lib/kubelet/pki/kubelet.crt",
    "/etc/ssl/etcd/ssl/*.pem",
    "/var/lib/rancher/k3s/server/tls/*.crt",
    "/var/lib/rancher/k3s/server/tls/etcd/*.crt",
    "/var/lib/rancher/k3s/agent/*.crt",
    "/etc/rancher/k3s/k3s.yaml",
    "/root/.kube/config",
    "/home/*/.kube/config",
)


class KubeadmCertificate(msgspec.Struct, frozen=True, kw_only=True):
    """One leaf of kubeadm's list."""

    name: str
    """As `kubeadm certs check-expiration` prints it and `kubeadm certs renew` takes it."""
    file: str
    """Below the PKI directory; for a kubeconfig below /etc/kubernetes."""
    ca: str
    """The CA that signs it, below the PKI directory, without ending."""

    @property
    def is_kubeconfig(self) -> bool:
        return self.file.endswith(".conf")


def _leaf(name: str, file: str, ca: str) -> KubeadmCertificate:
    return KubeadmCertificate(name=name, file=file, ca=ca)


KUBEADM_CERTIFICATES = (
    _leaf("admin.conf", "admin.conf", "ca"),
    _leaf("apiserver", "apiserver.crt", "ca"),
    _leaf("apiserver-etcd-client", "apiserver-etcd-client.crt", "etcd/ca"),
    _leaf("apiserver-kubelet-client", "apiserver-kubelet-client.crt", "ca"),
    _leaf("controller-manager.conf", "controller-manager.conf", "ca"),
    _leaf("etcd-healthcheck-client", "etcd/healthcheck-client.crt", "etcd/ca"),
    _leaf("etcd-peer", "etcd/peer.crt", "etcd/ca"),
    _leaf("etcd-server", "etcd/server.crt", "etcd/ca"),
    _leaf("front-proxy-client", "front-proxy-client.crt", "front-proxy-ca"),
    _leaf("scheduler.conf", "scheduler.conf", "ca"),
    _leaf("super-admin.conf", "super-admin.conf", "ca"),
)
"""In the order in which `kubeadm certs renew all` goes through them."""

_BY_FILE = {certificate.file: certificate for certificate in KUBEADM_CERTIFICATES}
_CA_NAMES = {"ca.crt": "ca", "etcd/ca.crt": "etcd-ca", "front-proxy-ca.crt": "front-proxy-ca"}


class Placing(msgspec.Struct, frozen=True, kw_only=True):
    """What a path alone tells of the certificates in it."""

    name: str
    leaf_managed_by: str
    """Who renews its leafs; for kubeadm only as long as `ca_key` exists."""
    ca_key: str = ""
    """The path of the key that kubeadm needs to renew it; empty where none is needed."""


def is_key_file(path: str) -> bool:
    """Whether a name that a default pattern matches is Kubespray's name for a key, not to read."""
    return path.endswith("-key.pem")


def place(path: str, exists: Callable[[str], bool]) -> Placing:
    """Name a file and say who renews its leafs. `exists` answers for a path on the host."""
    pure = PurePosixPath(path)
    name = pure.name if pure.suffix in (".conf", ".yaml") or not pure.suffix else pure.stem
    if pure.parent == PurePosixPath(KUBERNETES_DIRECTORY):
        return _place_kubeconfig(pure.name, name, exists)
    for directory in PKI_DIRECTORIES:
        if pure.is_relative_to(directory):
            below = str(pure.relative_to(directory))
            if known := _BY_FILE.get(below):
                key = f"{directory}/{known.ca}.key"
                return Placing(name=known.name, leaf_managed_by="kubeadm", ca_key=key)
            return Placing(name=_CA_NAMES.get(below, name), leaf_managed_by="")
    return Placing(name=name, leaf_managed_by=_manager_by_directory(path, pure.name))


def _manager_by_directory(path: str, name: str) -> str:
    if path.startswith("/var/lib/kubelet/pki/"):
        # kubelet.crt is made once and left alone; the other two the kubelet rotates.
        return "kubelet" if name.startswith(("kubelet-client-", "kubelet-server-")) else ""
    if path.startswith("/etc/ssl/etcd/ssl/"):
        return "kubespray"
    if path.startswith(("/var/lib/rancher/k3s/", "/etc/rancher/k3s/")):
        return "k3s"
    return ""


def _place_kubeconfig(file: str, name: str, exists: Callable[[str], bool]) -> Placing:
    if file not in _BY_FILE:
        return Placing(name=name, leaf_managed_by="")
    pki = pki_directory(exists)
    return Placing(name=file, leaf_managed_by="kubeadm", ca_key=f"{pki}/ca.key")


def pki_directory(exists: Callable[[str], bool]) -> str:
    """The PKI directory that kubeadm uses on this node (kubeadm's own where neither is there)."""
    for directory in PKI_DIRECTORIES:
        if exists(f"{directory}/ca.crt"):
            return directory
    return PKI_DIRECTORIES[0]
