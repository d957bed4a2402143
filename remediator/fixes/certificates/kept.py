"""The backups that are kept: which there are, and which are too many."""

import re
import shutil
from datetime import datetime
from pathlib import Path

import msgspec

from exporter.checks.certificates import Root
from remediator.fixes.certificates.backup import INDEX, PARTIAL, Index

BEFORE_RESTORE = "-before-restore"
"""How the name of a backup ends that a restore made of what was there."""
_OURS = re.compile(rf"[0-9]{{8}}T[0-9]{{6}}Z({BEFORE_RESTORE})?")


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the list of backups."""

    name: str
    created: datetime | None
    size: int
    """Bytes on disk."""
    node: str
    holds: str
    """What is in it, or why it can't be used, in words."""


def list_backups(root: Root, directory: str) -> list[Listed]:
    """What lies in a directory of backups, newest first; half ones too, which say so."""
    here = Path(root.resolve(directory))
    if not here.is_dir():
        return []
    return [_listed(path) for path in sorted(here.iterdir(), reverse=True) if path.is_dir()]


def _listed(path: Path) -> Listed:
    size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    index = _index(path)
    if index is None:
        why = "not finished: a run that died, or one under way"
        return Listed(name=path.name, created=None, size=size, node="", holds=why)
    holds = [f"{len(index.files)} files"]
    if index.serials:
        holds.append(f"{len(index.serials)} certificates")
    for kind, words in (("snapshot", "etcd snapshot"), ("data", "etcd data")):
        if kind in index.etcd:
            holds.append(words)
    if not index.serials:
        holds.append("no whole set: to look into only")
    return Listed(
        name=path.name, created=index.created, size=size, node=index.node, holds=", ".join(holds)
    )


def _index(directory: Path) -> Index | None:
    try:
        return msgspec.json.decode((directory / INDEX).read_bytes(), type=Index)
    except (OSError, msgspec.MsgspecError):
        return None


def is_whole_set(root: Root, directory: str, name: str) -> bool:
    """Whether a backup holds certificates and keys that fit, so that it can be put back."""
    index = _index(Path(root.resolve(directory), name))
    return index is not None and bool(index.serials)


def prune(root: Root, directory: str, keep: int, *, node: str) -> list[str]:
    """Remove the node's backups that are older than the newest `keep` of those that can be put
    back, and what dead rotations began.

    What has another name than a backup gets here, or is of another node, is not ours to remove.
    """
    here = Path(root.resolve(directory))
    try:
        ours = [(p, _index(p)) for p in sorted(here.iterdir()) if _OURS.fullmatch(p.name)]
    except OSError:  # there is none, or it's away: it can wait
        return []
    own = [(path, index) for path, index in ours if index is not None and index.node == node]
    whole = [path for path, index in own if index.serials]
    removed = [path for path, _ in own if len(whole) > keep and path < whole[-keep]]
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in removed] + discard_begun(root, directory)


def discard_begun(root: Root, directory: str) -> list[str]:
    """Take away what dead rotations began."""
    here = Path(root.resolve(directory))
    try:
        begun = [path for path in here.iterdir() if path.name.startswith(PARTIAL)]
    except OSError:
        return []
    for path in begun:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in begun]
