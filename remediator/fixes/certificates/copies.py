"""Copies of admin.conf, such as root's ~/.kube/config, which nobody else renews.

Only a copy of the same identity is touched: same user, same organisation, same CA, and the very
cluster. Somebody else's kubeconfig stays as it is, and is said to.
"""

import stat
from pathlib import Path

from exporter.checks.certificates import Root
from exporter.checks.certificates.parsing import Parsed, parse
from remediator.fixes.certificates.backup import replace
from remediator.fixes.certificates.layout import current_cluster

ADMIN = "/etc/kubernetes/admin.conf"


def renew_copy(root: Root, path: str) -> str:
    """Renew one copy; the old one stays as PATH.old. What was done, or why not, in words.

    A copy that can't be written is no reason to give up a rotation.
    """
    try:
        return _renew_copy(root, path)
    except OSError as error:
        return f"{path} could not be renewed: {error.strerror}"


def _renew_copy(root: Root, path: str) -> str:
    admin = Path(root.resolve(ADMIN))
    copy = Path(root.resolve(path))
    if not copy.exists():
        return f"{path} is not there"
    if copy.samefile(admin):
        return f"{path} is admin.conf itself"
    old, new = copy.read_bytes(), admin.read_bytes()
    if old == new:
        return f"{path} is up to date"
    if problem := _difference(old, new):
        return f"{path} was left alone: {problem}"
    before = copy.stat()
    owner = (before.st_uid, before.st_gid)
    mode = stat.S_IMODE(before.st_mode)
    replace(copy.with_name(copy.name + ".old"), old, mode=mode, owner=owner)
    replace(copy, new, mode=mode, owner=owner)
    return f"{path} renewed; the old one is {path}.old"


def _difference(old: bytes, new: bytes) -> str:
    """Why the one is not an older version of the other; empty where it is."""
    ours, theirs = parse(new), parse(old)
    if len(theirs.certificates) != len(ours.certificates) or theirs.references or theirs.problem:
        return "it does not hold what admin.conf holds"
    for other, own in zip(theirs.certificates, ours.certificates, strict=True):
        if _identity(other) != _identity(own):
            return f"it is of {other.subject}, admin.conf of {own.subject}"
        if own.usage == "ca" and other.fingerprint != own.fingerprint:
            return "it is of another cluster"
    try:
        servers = [current_cluster(data).get("server") for data in (old, new)]
    except (ValueError, KeyError):
        return "it does not hold what admin.conf holds"
    if servers[0] != servers[1]:
        return f"its server is {servers[0]}"
    return ""


def _identity(certificate: Parsed) -> tuple[str, str, str]:
    return certificate.subject, certificate.issuer, certificate.usage
