"""Copies of admin.conf, such as root's ~/.kube/config, which nobody else renews.

Only credentials of the same identity are touched: same user, same organisation, signed by the same
CA, and for the very cluster. In their place stand the new ones; whatever else the file holds, such
as contexts for other clusters, stays. Somebody else's kubeconfig stays as it is, and is said to.
"""

import base64
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.utils import CryptographyDeprecationWarning

from exporter.checks.certificates import Root
from exporter.checks.certificates.parsing import Parsed, load_yaml, parse
from remediator.fixes.certificates.backup import replace
from remediator.fixes.certificates.layout import current_cluster, current_user

ADMIN = "/etc/kubernetes/admin.conf"
_CERTIFICATE, _KEY = "client-certificate-data", "client-key-data"
_CA = "certificate-authority-data"
_OTHER = "it does not hold what admin.conf holds"


class NotOursError(Exception):
    """The file is not to be touched; the sentence says why."""


def renew_copy(root: Root, path: str) -> str:
    """Renew one copy; the old one stays as PATH.old. What was done, or why not, in words.

    A copy that can't be written is no reason to give up a rotation.
    """
    try:
        return _renew_copy(root, path)
    except NotOursError as error:
        return f"{path} was left alone: {error}"
    except OSError as error:
        return f"{path} could not be renewed: {error.strerror}"


def _renew_copy(root: Root, path: str) -> str:
    admin = Path(root.resolve(ADMIN))
    copy = Path(root.resolve(root.real(path)))  # a link stays one, and leads to the new one
    if not copy.exists():
        return f"{path} is not there"
    if copy.samefile(admin):
        return f"{path} is admin.conf itself"
    if not copy.is_file():  # a pipe would be waited for
        raise NotOursError("it is no file")
    old, new = copy.read_bytes(), admin.read_bytes()
    renewed = _renewed(old, new)
    if renewed == old:
        return f"{path} is up to date"
    before = copy.stat()
    owner = (before.st_uid, before.st_gid)
    mode = stat.S_IMODE(before.st_mode)
    kept = copy.with_name(copy.name + ".old")
    is_free = not kept.is_symlink() and (not kept.exists() or _is_older(kept, new))
    if is_free:
        replace(kept, old, mode=mode, owner=owner)
    replace(copy, renewed, mode=mode, owner=owner)
    where = f"is {path}.old" if is_free else f"is in the backup, for {path}.old is something else"
    return f"{path} renewed; the old one {where}"


def _is_older(path: Path, new: bytes) -> bool:
    """Whether a file is what a renewal of ours left, and no more than that."""
    try:
        return path.is_file() and _renewed(path.read_bytes(), new) == new
    except NotOursError:
        return False


def _renewed(old: bytes, new: bytes) -> bytes:
    """The one kubeconfig with the credentials of the other. NotOursError."""
    try:
        ours, cluster, document = current_user(new), current_cluster(new), load_yaml(old)
        users, clusters = _by_name(document, "user"), _by_name(document, "cluster")
        contexts = _by_name(document, "context").values()
        pairs = [(users.get(c["user"]), clusters.get(c["cluster"])) for c in contexts]
    except (TypeError, KeyError, ValueError, AttributeError):
        raise NotOursError(_OTHER) from None
    problems = [_difference(user, other, ours, cluster) for user, other in pairs]
    if all(problems):
        raise NotOursError(next(iter(problems), _OTHER))
    text = old
    for (user, _), problem in zip(pairs, problems, strict=True):
        if problem or user is None:
            continue
        for key in (_CERTIFICATE, _KEY):
            value = user[key].encode()
            if value not in old:
                raise NotOursError(f"{key} is not written in one line")
            text = text.replace(value, ours[key].encode())
    return text


def _by_name(document: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in document[f"{kind}s"]:
        found.setdefault(entry["name"], entry[kind])  # of two by one name the first counts
    return found


def _difference(
    user: Mapping[str, str] | None,
    cluster: Mapping[str, str] | None,
    our_user: Mapping[str, str],
    our_cluster: Mapping[str, str],
) -> str:
    """Why the one is not an older version of the other; empty where it is."""
    try:
        if user is None or cluster is None or not user[_KEY]:
            return _OTHER
        theirs, own = (_first(u[_CERTIFICATE]) for u in (user, our_user))
        their_ca, our_ca = (_first(c[_CA]) for c in (cluster, our_cluster))
    except (TypeError, KeyError, ValueError, IndexError):
        return _OTHER
    if _identity(theirs) != _identity(own):
        return f"it is of {theirs.subject}, admin.conf of {own.subject}"
    if their_ca.fingerprint != our_ca.fingerprint or not _is_signed(
        user[_CERTIFICATE], our_cluster[_CA]
    ):
        return "it is of another cluster"
    if cluster.get("server") != our_cluster.get("server"):
        return f"its server is {cluster.get('server')}"
    return ""


def _first(encoded: str) -> Parsed:
    return parse(base64.b64decode(encoded)).certificates[0]


def _is_signed(certificate: str, ca: str) -> bool:
    """By the key of the CA: two clusters' CAs have the same name, and a file may mix them up."""
    try:
        with warnings.catch_warnings():  # kubeadm's CAs had the serial number 0 for years
            warnings.simplefilter("ignore", CryptographyDeprecationWarning)
            one, by = (
                x509.load_pem_x509_certificate(base64.b64decode(c)) for c in (certificate, ca)
            )
        one.verify_directly_issued_by(by)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _identity(certificate: Parsed) -> tuple[str, str, str]:
    return certificate.subject, certificate.issuer, certificate.usage
