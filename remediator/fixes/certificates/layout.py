"""What kubeadm would renew on this node: each certificate with its key and its CA.

Paths are the host's; `Root.resolve` says where they are seen from here.
"""

import base64
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from exporter.checks.certificates import Certificate, CertificateReader, Root
from exporter.checks.certificates.components import MANIFESTS, etcd_environment
from exporter.checks.certificates.layouts import (
    KUBEADM_CERTIFICATES,
    KUBERNETES_DIRECTORY,
    pki_directory,
)
from exporter.checks.certificates.parsing import load_yaml
from remediator.model import CheckError

ETCD_MANIFEST = f"{MANIFESTS}/etcd.yaml"
ETCD_STASH = f"{KUBERNETES_DIRECTORY}/.upkeep-etcd.yaml"
"""Where etcd's manifest is while a recovery has stopped it."""


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """One leaf of kubeadm's with its key, as it's on disk now."""

    name: str
    certificate: Certificate
    key: str
    """The key's path; a kubeconfig's own where both are embedded in it."""
    ca: str
    """The path of the CA that signs it, without ending."""


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """The control plane's files on this node."""

    pki: str
    pairs: tuple[Pair, ...]
    """In kubeadm's order. Without those of an etcd that kubeadm doesn't run."""
    etcd: str
    """`stacked` (a static pod), `host` (a systemd unit), or empty: elsewhere."""

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of every certificate and key, which is what kubeadm writes."""
        return tuple(path for pair in self.pairs for path in (pair.certificate.path, pair.key))

    @property
    def serials(self) -> dict[str, str]:
        """What identifies a state of all pairs: name to serial."""
        return {pair.name: pair.certificate.serial for pair in self.pairs}


def read_layout(root: Root) -> Layout:
    """Read it; empty pairs where this is no control plane node. CheckError for unreadable files."""
    pki = pki_directory(root.exists)
    etcd = _etcd(root, pki)
    wanted = {}
    for known in KUBEADM_CERTIFICATES:
        if known.ca == "etcd/ca" and etcd != "stacked":
            continue
        directory = KUBERNETES_DIRECTORY if known.is_kubeconfig else pki
        wanted[f"{directory}/{known.file}"] = known
    inventory = CertificateReader(root, list(wanted)).read()
    for error in inventory.errors:
        if error.reason != "not_found" or root.exists(error.path):
            raise CheckError(
                f"{error.path} can't be read as a certificate ({error.reason}); look at the file, "
                "and at the last backup if a renewal was cut short"
            )
    pairs = []
    for path, known in wanted.items():
        leaf = next((c for c in inventory.certificates if c.path == path and c.usage != "ca"), None)
        if leaf is not None:
            key = path if known.is_kubeconfig else path.removesuffix(".crt") + ".key"
            pair = Pair(name=known.name, certificate=leaf, key=key, ca=f"{pki}/{known.ca}")
            pairs.append(pair)
    return Layout(pki=pki, pairs=tuple(pairs), etcd=etcd)


def _etcd(root: Root, pki: str) -> str:
    if root.exists(ETCD_MANIFEST) or root.exists(ETCD_STASH):
        return "stacked"
    if etcd_environment(root):
        return "host"
    # A PKI on its own, no component beside it: kubeadm takes etcd for stacked.
    is_apart = not root.exists(f"{MANIFESTS}/kube-apiserver.yaml")
    return "stacked" if is_apart and root.exists(f"{pki}/etcd/ca.crt") else ""


class PairError(Exception):
    """A key and its certificate don't belong together, or can't be read; names the file only."""


def check_pair(root: Root, pair: Pair) -> None:
    """See that the key on disk is the certificate's. PairError where not; keeps nothing of it."""
    try:
        certificate, key = _read_pair(Path(root.resolve(pair.certificate.path)), pair, root)
        public = x509.load_pem_x509_certificate(certificate).public_key()
        private = load_pem_private_key(key, password=None).public_key()
        of_both = [
            k.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            for k in (public, private)
        ]
    except (OSError, ValueError, TypeError, KeyError, UnsupportedAlgorithm) as error:
        raise PairError(f"{pair.key} can't be read ({type(error).__name__})") from None
    if of_both[0] != of_both[1]:
        raise PairError(f"{pair.key} is not the key of {pair.certificate.path}")


def _read_pair(path: Path, pair: Pair, root: Root) -> tuple[bytes, bytes]:
    if pair.key != pair.certificate.path:
        return path.read_bytes(), Path(root.resolve(pair.key)).read_bytes()
    user = current_user(path.read_bytes())
    return (
        base64.b64decode(user["client-certificate-data"]),
        base64.b64decode(user["client-key-data"]),
    )


def current_user(kubeconfig: bytes) -> dict[str, str]:
    """The user of a kubeconfig's current context. ValueError or KeyError where it has none."""
    return _current(kubeconfig, "user")


def current_cluster(kubeconfig: bytes) -> dict[str, str]:
    """The cluster of a kubeconfig's current context. ValueError or KeyError where it has none."""
    return _current(kubeconfig, "cluster")


def _current(kubeconfig: bytes, kind: str) -> dict[str, str]:
    try:
        document = load_yaml(kubeconfig)
        named = {entry["name"]: entry["context"] for entry in document["contexts"]}
        wanted = named[document["current-context"]][kind]
        found = next(e[kind] for e in document[f"{kind}s"] if e["name"] == wanted)
    except (TypeError, StopIteration):
        raise ValueError(f"no {kind} for the current context") from None
    if not isinstance(found, dict):
        raise ValueError(f"no {kind} for the current context")  # noqa: TRY004 - one error for all
    return found
