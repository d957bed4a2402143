"""Which backup may be put back: one that is whole, nobody else's, and this node's own."""

import hashlib
import os
import stat
from pathlib import Path, PurePosixPath

from exporter.checks.certificates import Root
from exporter.checks.certificates.parsing import parse
from remediator.fixes.certificates.backup import (
    ARCHIVE,
    INDEX,
    Backup,
    BackupError,
    load,
    read_files,
)
from remediator.fixes.certificates.plan import RefusedError
from remediator.fixes.certificates.renewal import is_kubeadms


def usable(directory: Path, name: str) -> Backup:
    """A backup that is whole, and that nobody but root could have read or changed."""
    if not (directory / INDEX).is_file():
        raise RefusedError(
            "NoBackup",
            f"there is no finished backup {name}; `upkeep-remediator restore` lists them",
        )
    for path in (directory, directory / INDEX, directory / ARCHIVE):
        if not path.exists():
            continue
        found = path.stat()
        mode = stat.S_IMODE(found.st_mode)
        if mode & 0o077 or found.st_uid not in (0, os.geteuid()):
            raise RefusedError(
                "BackupOpen",
                f"{path.name} has mode {mode:04o} and is user {found.st_uid}'s: others may "
                "have read or changed it; look at it, then take their rights away",
            )
    try:
        backup = load(directory)
    except BackupError as error:
        raise RefusedError("BackupUnsound", str(error)) from None
    if not backup.index.serials or any(".." in PurePosixPath(p).parts for p in backup.index.files):
        raise RefusedError(
            "BackupUnsound",
            f"{name} has no whole set of certificates and keys: it can be looked into, not put "
            "back",
        )
    return backup


def foreign(root: Root, backup: Backup) -> str:
    """What in it would part this node from its cluster, in words; empty where nothing does."""
    kept = read_files(backup, lambda path: path.endswith("ca.crt"))
    for path, data in kept.items():
        here = Path(root.resolve(path))
        if here.is_file() and _fingerprints(here.read_bytes()) != _fingerprints(data):
            return (
                "CA than this node has now: with it the node would fall out of its cluster, "
                "unless that is what was lost"
            )
    for path, digest in backup.index.files.items():
        here = Path(root.resolve(path))
        if PurePosixPath(path).name not in ("sa.key", "sa.pub") or not here.is_file():
            continue
        if hashlib.sha256(here.read_bytes()).hexdigest() != digest:
            return (
                f"{path} than this node has now: with it no service account's token that was "
                "given out since would count, unless that is what was lost"
            )
    return ""


def is_there(root: Root, backup: Backup) -> bool:
    """Whether every file that would be put back is here already, as it is in the backup."""
    for path, digest in backup.index.files.items():
        if not is_kubeadms(path, backup.index.serials):
            continue
        here = Path(root.resolve(path))
        if not here.is_file() or hashlib.sha256(here.read_bytes()).hexdigest() != digest:
            return False
    return True


def _fingerprints(data: bytes) -> set[str]:
    return {c.fingerprint for c in parse(data).certificates}
