"""A real cluster laid out as Kubespray does it: etcd on the host, the PKI in /etc/kubernetes/ssl.

Made by the real kubeadm with an external etcd, as Kubespray makes it: etcd is a systemd unit with
/etc/etcd.env, its certificates are in /etc/ssl/etcd/ssl, made for a hundred years by its own CA and
named as Kubespray names them, and /etc/kubernetes/pki is a link. Only systemd is not real: the
node's PID 1 keeps etcd running, and systemctl.py asks it to.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deploy.local.cache import print_progress
from deploy.local.debian import binary
from tests.cluster import kubeadm, lifetime
from tests.cluster.kubeadm import KubeadmCluster, Progress
from tests.cluster.kubeadm_config import Settings
from tests.cluster.kubernetes_build import kubernetes_binaries
from tests.cluster.netns import Network
from tests.cluster.node import PROJECT, Node
from tests.cluster.node_init import Service

ETCD_SSL = "/etc/ssl/etcd/ssl"
ENVIRONMENT = "/etc/etcd.env"
STATIC_PODS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler")
_LIFE = timedelta(days=36500)
# systemd reads EnvironmentFile= by itself; a shell is the next best.
_START = f"set -a; . {ENVIRONMENT}; exec etcd"


@contextmanager
def kubespray_cluster(
    workdir: Path, *, progress: Progress = print_progress
) -> Iterator[KubeadmCluster]:
    """One node, gone without a trace afterwards but for its logs in `workdir`. Raises NodeError."""
    for name in lifetime.sweep():
        progress(f"removed {name}, which an earlier run left")
    binaries = kubernetes_binaries(progress=progress)
    state = lifetime.reserve(workdir, detached=False, keep_logs=True)
    etcd = Service("etcd", ["sh", "-c", _START], needs=ENVIRONMENT)
    node = kubeadm.start_kubernetes_node(
        state, binaries, others=(), services=[etcd], more_programs={"etcd": binary("etcd")}
    )
    try:
        cluster = KubeadmCluster(state.cluster, [node], binaries, static_pods=STATIC_PODS)
        _install_systemctl(node)
        address = Network(state.network).node(state.index)
        write_host_etcd(node.root, node.name, address)
        (node.root / "etc/kubernetes/ssl").mkdir(parents=True)
        (node.root / "etc/kubernetes/pki").symlink_to("/etc/kubernetes/ssl")
        node.run(["systemctl", "start", "etcd"])
        kubeadm.load_images(node, binaries, progress)
        external = {
            "endpoints": [f"https://{address}:2379"],
            "caFile": f"{ETCD_SSL}/ca.pem",
            "certFile": f"{ETCD_SSL}/node-{node.name}.pem",
            "keyFile": f"{ETCD_SSL}/node-{node.name}-key.pem",
        }
        configuration = {
            "certificatesDir": "/etc/kubernetes/ssl",
            "etcd": {"external": external},
        }
        kubeadm.init(node, binaries, Settings(cluster=configuration), progress)
        kubeadm.wait_until_ready(cluster, progress)
        progress(f"cluster {state.cluster}: ready at {cluster.server}")
        yield cluster
    finally:
        node.remove()


def _install_systemctl(node: Node) -> None:
    """In the place of the machine's own, which is of no use without systemd."""
    path = node.root / "usr/bin/systemctl"
    path.unlink(missing_ok=True)
    script = PROJECT / "tests/cluster/systemctl.py"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    path.chmod(0o755)


def write_host_etcd(
    root: Path, name: str, address: str, *, client_port: int = 2379, peer_port: int = 2380
) -> None:
    """Below `root`: /etc/etcd.env as Kubespray's template makes it, and etcd's certificates."""
    folder = root / ETCD_SSL.lstrip("/")
    folder.mkdir(parents=True)
    write_certificates(folder, name, address)
    clients = f"https://{address}:{client_port}"
    peers = f"https://{address}:{peer_port}"
    loopback = "" if address == "127.0.0.1" else f",https://127.0.0.1:{client_port}"
    member, admin = f"{ETCD_SSL}/member-{name}", f"{ETCD_SSL}/admin-{name}"
    (root / ENVIRONMENT.lstrip("/")).write_text(
        f"""# Environment file for etcd
ETCD_DATA_DIR=/var/lib/etcd
ETCD_ADVERTISE_CLIENT_URLS={clients}
ETCD_INITIAL_ADVERTISE_PEER_URLS={peers}
ETCD_INITIAL_CLUSTER_STATE=new
ETCD_METRICS=basic
ETCD_LISTEN_CLIENT_URLS={clients}{loopback}
ETCD_ELECTION_TIMEOUT=5000
ETCD_HEARTBEAT_INTERVAL=250
ETCD_INITIAL_CLUSTER_TOKEN=k8s_etcd
ETCD_LISTEN_PEER_URLS={peers}
ETCD_NAME=etcd1
ETCD_INITIAL_CLUSTER=etcd1={peers}
ETCD_AUTO_COMPACTION_RETENTION=8
ETCD_SNAPSHOT_COUNT=10000

# TLS settings
ETCD_TRUSTED_CA_FILE={ETCD_SSL}/ca.pem
ETCD_CERT_FILE={member}.pem
ETCD_KEY_FILE={member}-key.pem
ETCD_CLIENT_CERT_AUTH=true

ETCD_PEER_TRUSTED_CA_FILE={ETCD_SSL}/ca.pem
ETCD_PEER_CERT_FILE={member}.pem
ETCD_PEER_KEY_FILE={member}-key.pem
ETCD_PEER_CLIENT_CERT_AUTH=True

# CLI settings
ETCDCTL_ENDPOINTS=https://127.0.0.1:{client_port}
ETCDCTL_CACERT={ETCD_SSL}/ca.pem
ETCDCTL_KEY={admin}-key.pem
ETCDCTL_CERT={admin}.pem
"""
    )


def write_certificates(folder: Path, name: str, address: str) -> None:
    """etcd's CA (kept where it is there already) and its three leafs, as make-ssl-etcd.sh does."""
    authority, ca_key = _authority(folder)
    names = [x509.DNSName(n) for n in ("localhost", name, "etcd.kube-system.svc")]
    addresses = [x509.IPAddress(ipaddress.ip_address(a)) for a in {address, "127.0.0.1"}]
    for kind in ("member", "admin", "node"):
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        leaf = (
            _builder(f"etcd-{kind}-{name}", authority.subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=False)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
                ),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([*names, *addresses]), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        _write(folder / f"{kind}-{name}", leaf, key)


def _authority(folder: Path) -> tuple[x509.Certificate, rsa.RSAPrivateKey]:
    path = folder / "ca.pem"
    if path.exists():
        key = serialization.load_pem_private_key((folder / "ca-key.pem").read_bytes(), None)
        assert isinstance(key, rsa.RSAPrivateKey)
        return x509.load_pem_x509_certificate(path.read_bytes()), key
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "etcd-ca")])
    certificate = (
        _builder("etcd-ca", subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(folder / "ca", certificate, key)
    return certificate, key


def _builder(name: str, issuer: x509.Name, key: rsa.RSAPublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + _LIFE)
    )


def _write(path: Path, certificate: x509.Certificate, key: rsa.RSAPrivateKey) -> None:
    secret = path.with_name(f"{path.name}-key.pem")
    secret.touch(mode=0o600)
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
    path.with_name(f"{path.name}.pem").write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
    )
