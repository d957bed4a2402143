"""A PKI made by the real kubeadm, whose certificates end whenever a test wants them to.

kubeadm itself gives every leaf a year. So after `kubeadm init phase certs` and `kubeconfig` the
leaves are signed again by the real CA keys with other dates; subject, names, usages and keys stay,
and `kubeadm certs check-expiration` and `certs renew` work on them as on a cluster's.

`kubeadm certs renew` looks for the kubeconfig files in /etc/kubernetes and nowhere else. That is
why a PKI lies below a root folder of its own: `kubeadm --rootfs` changes its root to it (as an
ordinary user with `unshare --map-root-user`), and nothing of the machine's own is touched.
"""

from __future__ import annotations

import base64
import os
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.utils import CryptographyDeprecationWarning

from tests.cluster.kubernetes_build import Binaries, kubernetes_binaries
from tests.cluster.processes import ClusterError

AUTHORITIES = {
    "ca": "pki/ca.crt",
    "etcd-ca": "pki/etcd/ca.crt",
    "front-proxy-ca": "pki/front-proxy-ca.crt",
}
"""kubeadm's name of each CA -> its file below /etc/kubernetes."""

LEAVES = {
    "admin.conf": ("admin.conf", "ca"),
    "super-admin.conf": ("super-admin.conf", "ca"),  # since 1.29
    "controller-manager.conf": ("controller-manager.conf", "ca"),
    "scheduler.conf": ("scheduler.conf", "ca"),
    "kubelet.conf": ("kubelet.conf", "ca"),
    "apiserver": ("pki/apiserver.crt", "ca"),
    "apiserver-kubelet-client": ("pki/apiserver-kubelet-client.crt", "ca"),
    "apiserver-etcd-client": ("pki/apiserver-etcd-client.crt", "etcd-ca"),
    "etcd-healthcheck-client": ("pki/etcd/healthcheck-client.crt", "etcd-ca"),
    "etcd-peer": ("pki/etcd/peer.crt", "etcd-ca"),
    "etcd-server": ("pki/etcd/server.crt", "etcd-ca"),
    "front-proxy-client": ("pki/front-proxy-client.crt", "front-proxy-ca"),
}
"""kubeadm's name of each leaf -> its file below /etc/kubernetes and its CA.

kubelet.conf isn't in kubeadm's renewal: the kubelet renews its own.
"""

ADDRESS = "192.0.2.1"
"""kubeadm refuses loopback as a node's address; this one (RFC 5737) belongs to nobody."""

Remaining = timedelta | Mapping[str, timedelta]


@dataclass(frozen=True)
class Pki:
    """A throwaway /etc/kubernetes."""

    rootfs: Path
    binaries: Binaries

    @property
    def directory(self) -> Path:
        """What a node has as /etc/kubernetes."""
        return self.rootfs / "etc/kubernetes"

    def kubeadm_command(self, *arguments: str) -> list[str]:
        """The command line of kubeadm that sees this PKI as /etc/kubernetes.

        For `certs …` commands, which get the cluster's configuration too.
        """
        user = [] if os.geteuid() == 0 else ["unshare", "--map-root-user"]
        config = ["--config", "/etc/kubernetes/kubeadm.yaml"]
        kubeadm = str(self.binaries.kubeadm)
        return [*user, kubeadm, "--rootfs", str(self.rootfs), *arguments, *config]

    def kubeadm(self, *arguments: str) -> str:
        """Run it; its output. Raises ClusterError with what kubeadm said."""
        return _run(self.kubeadm_command(*arguments))

    def certificates(self) -> dict[str, x509.Certificate]:
        """Every certificate that is there, CAs too, by kubeadm's name."""
        return read_certificates(self.directory)


def kubeadm_pki(
    rootfs: Path,
    *,
    remaining: Remaining | None = None,
    lifetime: timedelta = timedelta(days=365),
    binaries: Binaries | None = None,
    address: str = ADDRESS,
    endpoint: str = "127.0.0.1:6443",
    node_name: str = "node-1",
    names: Iterable[str] = (),
) -> Pki:
    """Make `rootfs`/etc/kubernetes as `kubeadm init` does on a first control-plane node.

    `remaining` and `lifetime`: see set_remaining(). The CAs are made to begin no later than their
    oldest leaf, as in a cluster of that age. Without `remaining` the dates are kubeadm's.
    `endpoint` ("host:port") goes into the kubeconfig files, `names` (addresses or DNS names) into
    the API server's certificate as well. kubeadm.yaml beside pki/ is the configuration to renew
    with. Raises ClusterError with what kubeadm said; an /etc/kubernetes that is there is refused.
    """
    pki = Pki(rootfs.absolute(), binaries or kubernetes_binaries())
    if pki.directory.exists():
        raise ClusterError(f"{pki.directory} is there already; give an empty root folder")
    pki.directory.mkdir(parents=True)
    host, port = endpoint.rsplit(":", 1)
    init = {
        "apiVersion": _config_version(pki.binaries.version),
        "kind": "InitConfiguration",
        "localAPIEndpoint": {"advertiseAddress": address, "bindPort": int(port)},
        "nodeRegistration": {
            "name": node_name,
            "criSocket": "unix:///run/containerd/containerd.sock",
        },
    }
    cluster = {
        "apiVersion": _config_version(pki.binaries.version),
        "kind": "ClusterConfiguration",
        "kubernetesVersion": pki.binaries.version,
        "controlPlaneEndpoint": endpoint,
        "certificatesDir": str(pki.directory / "pki"),
        "apiServer": {"certSANs": sorted({host, "127.0.0.1", "localhost", *names})},
    }
    config = pki.directory / "kubeadm.yaml"
    config.write_text(yaml.safe_dump_all([init, cluster]))
    phase = [str(pki.binaries.kubeadm), "init", "phase"]
    _run([*phase, "certs", "all", "--config", str(config)])
    folder = ["--kubeconfig-dir", str(pki.directory)]
    _run([*phase, "kubeconfig", "all", "--config", str(config), *folder])
    cluster["certificatesDir"] = "/etc/kubernetes/pki"
    config.write_text(yaml.safe_dump_all([init, cluster]))
    if remaining is not None:
        set_remaining(pki.directory, remaining, lifetime=lifetime)
        _age_authorities(pki.directory)
    return pki


def set_remaining(
    directory: Path,
    remaining: Remaining,
    *,
    lifetime: timedelta = timedelta(days=365),
    now: datetime | None = None,
) -> dict[str, x509.Certificate]:
    """Sign certificates in `directory` (an /etc/kubernetes) again, in place; the new ones by name.

    `remaining` is what they have left from `now` on (negative: expired so long ago): one value for
    every leaf that is there, or by kubeadm's names, which may be those of CAs too. `lifetime` is
    from notBefore to notAfter. A CA keeps its key, so what it signed stays valid, and is replaced
    in the kubeconfig files as well.

    Raises ClusterError for a name that isn't there.
    """
    moment = (now or datetime.now(UTC)).replace(microsecond=0)
    there = read_certificates(directory)
    if isinstance(remaining, timedelta):
        remaining = {name: remaining for name in there if name in LEAVES}
    if unknown := sorted(set(remaining) - set(there)):
        raise ClusterError(f"no certificate {', '.join(unknown)} in {directory}")
    signed = {}
    for name, left in sorted(remaining.items(), key=lambda item: item[0] not in AUTHORITIES):
        not_after = moment + left
        signed[name] = _sign_again(directory, name, not_after - lifetime, not_after)
    return signed


def read_certificates(directory: Path) -> dict[str, x509.Certificate]:
    """The certificates in `directory` (an /etc/kubernetes), leaves and CAs, by kubeadm's name.

    A kubelet.conf that only points at files elsewhere has none of its own.
    """
    found = {}
    for name, path in _files(directory).items():
        pem = _read_pem(path) if path.exists() else b""
        if pem:
            found[name] = _parse(pem)
    return found


def _files(directory: Path) -> dict[str, Path]:
    leaves = {name: directory / path for name, (path, _) in LEAVES.items()}
    return leaves | {name: directory / path for name, path in AUTHORITIES.items()}


def _sign_again(
    directory: Path, name: str, not_before: datetime, not_after: datetime
) -> x509.Certificate:
    path = _files(directory)[name]
    old = _parse(_read_pem(path))
    authority = AUTHORITIES[name if name in AUTHORITIES else LEAVES[name][1]]
    key = serialization.load_pem_private_key(
        (directory / authority).with_suffix(".key").read_bytes(), password=None
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    new = builder.sign(cast("CertificateIssuerPrivateKeyTypes", key), hashes.SHA256())
    pem = new.public_bytes(serialization.Encoding.PEM)
    _write_pem(path, pem)
    if name == "ca":
        for kubeconfig in directory.glob("*.conf"):
            _edit_kubeconfig(kubeconfig, "clusters", "certificate-authority-data", pem)
    return new


def _age_authorities(directory: Path) -> None:
    certificates = read_certificates(directory)
    for name in AUTHORITIES:
        authority = certificates[name]
        begins = [
            certificates[leaf].not_valid_before_utc
            for leaf, (_, issuer) in LEAVES.items()
            if issuer == name and leaf in certificates
        ]
        if min(begins) < authority.not_valid_before_utc:
            _sign_again(directory, name, min(begins), authority.not_valid_after_utc)


def _parse(pem: bytes) -> x509.Certificate:
    with warnings.catch_warnings():  # kubeadm's CAs had the serial number 0 for years
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        return x509.load_pem_x509_certificate(pem)


def _read_pem(path: Path) -> bytes:
    if path.suffix != ".conf":
        return path.read_bytes()
    user = yaml.safe_load(path.read_text())["users"][0]["user"]
    return base64.b64decode(user.get("client-certificate-data", ""))


def _write_pem(path: Path, pem: bytes) -> None:
    if path.suffix == ".conf":
        _edit_kubeconfig(path, "users", "client-certificate-data", pem)
    else:
        _replace(path, pem)


def _edit_kubeconfig(path: Path, section: str, key: str, pem: bytes) -> None:
    config = yaml.safe_load(path.read_text())
    entry = config[section][0][section.removesuffix("s")]
    entry[key] = base64.b64encode(pem).decode()
    _replace(path, yaml.safe_dump(config).encode())


def _replace(path: Path, content: bytes) -> None:
    """Write anew with mode and owner kept, so that no reader ever sees half a file."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    before = path.stat()
    os.chown(temporary, before.st_uid, before.st_gid)
    Path(temporary).chmod(stat.S_IMODE(before.st_mode))
    Path(temporary).rename(path)


def _config_version(kubernetes: str) -> str:
    minor = int(kubernetes.split(".")[1])
    return f"kubeadm.k8s.io/{'v1beta2' if minor < 22 else 'v1beta3'}"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip()
        raise ClusterError(f"{' '.join(command)} failed ({done.returncode}):\n{said[-2000:]}")
    return done.stdout
