"""Backups of the control plane's files, keys included, and putting them back.

A backup is a directory of its own, mode 0700: `files.tar.gz`, perhaps an etcd snapshot, and
`index.json`, which says what is in it. It gets its name by a rename once it is whole and on disk,
so what has a name is complete. It never lies where the kubelet would run it or a backup would hold
itself.
"""

import gzip
import hashlib
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from exporter.checks.certificates import Root
from exporter.checks.certificates.layouts import KUBERNETES_DIRECTORY, PKI_DIRECTORIES

ARCHIVE = "files.tar.gz"
INDEX = "index.json"
ETCD_DIRECTORY = "/etc/ssl/etcd"
SOURCES = (KUBERNETES_DIRECTORY, ETCD_DIRECTORY, "/etc/etcd.env", "/var/lib/kubelet/config.yaml")
_PARTIAL = ".partial-"
_DAMAGED = (OSError, EOFError, tarfile.TarError, zlib.error)
"""What reading an archive that isn't what it was may raise, depending on where it is damaged."""
_RESERVE = 64 * 1024 * 1024  # bytes to leave free beyond what the backup takes


class BackupError(Exception):
    """A backup could not be made, or can't be used; the sentence says why."""


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup holds."""

    node: str
    created: datetime
    serials: Mapping[str, str]
    """Of each of kubeadm's certificates, by name."""
    files: Mapping[str, str]
    """SHA-256 of every regular file in the archive, by its path on the host."""
    etcd: Mapping[str, Any] = {}
    """Members, health and status of etcd as they were, and the snapshot's size and hash."""


class Backup(msgspec.Struct, frozen=True, kw_only=True):
    """A finished backup."""

    directory: Path
    """As seen from here."""
    index: Index


def directory_problem(root: Root, directory: str) -> str:
    """Why backups can't be kept in a directory of the host, in a sentence; empty where they can."""
    if not directory.startswith("/"):
        return f"backup_directory {directory!r} is not an absolute path"
    real = PurePosixPath(root.real(directory))
    for source in SOURCES:
        if real.is_relative_to(root.real(source)):
            return (
                f"backup_directory {directory} lies in {source}, where the kubelet could run it "
                "and a backup would hold itself; choose another"
            )
    return _link_problem(root)


def _link_problem(root: Root) -> str:
    """Which file of the PKI a backup would miss, since a link leads to it; empty where none."""
    kept = [root.real(source) for source in SOURCES]
    for directory in PKI_DIRECTORIES:
        here = root.resolve(directory)
        for folder, folders, names in os.walk(here):
            for name in [*folders, *names, "."]:
                path = str(PurePosixPath(directory, Path(folder).relative_to(here), name))
                real = PurePosixPath(root.real(path))
                if not any(real.is_relative_to(source) for source in kept):
                    return f"{path} is {real}, which a backup would not hold: move it to {path}"
    return ""


def space_problem(root: Root, directory: str, extra: int = 0) -> str:
    """Why the disk can't hold a backup, in a sentence; empty where it can. extra: bytes more."""
    needed = extra + _RESERVE
    for path in _existing(root):
        for folder, _, names in os.walk(root.resolve(path)):
            needed += sum(_size(Path(folder) / name) for name in names)
    here = Path(root.resolve(directory))
    while not here.exists():
        here = here.parent
    space = os.statvfs(here)
    free = space.f_bavail * space.f_frsize
    if free >= needed:
        return ""
    return (
        f"{directory} has {free >> 20} MiB free and a backup needs {needed >> 20} MiB; make room "
        "or choose another backup_directory"
    )


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


class BackupWriter:
    """A backup being made. Leave it by `finish` or `discard`."""

    def __init__(self, root: Root, directory: str, name: str) -> None:
        """name: of the finished backup. BackupError where it can't be begun."""
        self._root = root
        self._final = Path(root.resolve(directory)) / name
        self.partial = self._final.with_name(_PARTIAL + name)
        """Where it's being made; an etcd snapshot is put here too."""
        try:
            self._final.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self.partial.exists():
                shutil.rmtree(self.partial)  # of a rotation that died
            self.partial.mkdir(mode=0o700)
        except OSError as error:
            raise BackupError(f"{directory} can't be written: {error.strerror}") from None

    def add_files(self, copies: Sequence[str]) -> dict[str, str]:
        """Put the control plane's files and `copies` into it; SHA-256 by path. BackupError."""
        archive = self.partial / ARCHIVE
        hashes: dict[str, str] = {}
        try:
            descriptor = os.open(archive, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with (
                os.fdopen(descriptor, "wb") as raw,
                gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as packed,
                tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
            ):
                for path in [*_existing(self._root), *copies]:
                    self._add(tar, path, hashes)
            _check_archive(archive, hashes)
        except _DAMAGED as error:
            why = getattr(error, "strerror", None) or str(error)
            raise BackupError(f"the backup could not be written: {why}") from None
        return hashes

    def _add(self, tar: tarfile.TarFile, path: str, hashes: dict[str, str]) -> None:
        here = Path(self._root.resolve(path))
        if stat.S_ISSOCK(here.lstat().st_mode):  # tarfile has no form for it
            return
        info = tar.gettarinfo(str(here), arcname=path.lstrip("/"))
        if info.isreg():
            with here.open("rb") as file:
                info.size = os.fstat(file.fileno()).st_size
                data = file.read(info.size)
            hashes[path] = hashlib.sha256(data).hexdigest()
            info.type = tarfile.REGTYPE  # of two hard links, both in full
            tar.addfile(info, _Bytes(data))
            return
        tar.addfile(info)
        if info.isdir():
            for child in sorted(os.scandir(here), key=lambda entry: entry.name):
                below = f"{path}/{child.name}"
                if child.is_symlink():
                    link = tar.gettarinfo(child.path, arcname=below.lstrip("/"))
                    tar.addfile(link)
                else:
                    self._add(tar, below, hashes)

    def finish(self, index: Index) -> Backup:
        """Write what it holds, put all of it on disk, and give it its name. BackupError."""
        try:
            descriptor = os.open(self.partial / INDEX, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(index), indent=2))
            for entry in self.partial.iterdir():
                sync(entry)
            sync(self.partial)
            self.partial.rename(self._final)
            sync(self._final.parent)
        except OSError as error:
            raise BackupError(f"the backup could not be written: {error.strerror}") from None
        return Backup(directory=self._final, index=index)

    def discard(self) -> None:
        """Take away what was begun."""
        shutil.rmtree(self.partial, ignore_errors=True)


class _Bytes:
    """The least that tarfile reads from; io.BytesIO would copy the keys once more."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def read(self, size: int = -1) -> bytes:
        part, self._data = self._data[:size], self._data[size:]
        return bytes(part)


def _existing(root: Root) -> list[str]:
    return [path for path in SOURCES if root.exists(path)]


def _contents(
    archive: Path, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, tarfile.TarInfo, bytes]]:
    """Path on the host, owner and mode, and data of each wanted regular file. `_DAMAGED`."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            path = "/" + member.name
            if member.isreg() and wanted(path) and (file := tar.extractfile(member)) is not None:
                yield path, member, file.read()


def _check_archive(archive: Path, hashes: Mapping[str, str]) -> None:
    """Read it back: an archive is a backup only once it has been read."""
    found = {
        path: hashlib.sha256(data).hexdigest()
        for path, _, data in _contents(archive, lambda _path: True)
    }
    if found != hashes:
        raise BackupError("the backup does not hold what was put into it; is the disk faulty?")


def sync(path: Path) -> None:
    """Put a file or directory on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(directory: Path) -> Backup:
    """A finished backup. BackupError where it isn't one, or isn't whole."""
    try:
        index = msgspec.json.decode((directory / INDEX).read_bytes(), type=Index)
        _check_archive(directory / ARCHIVE, index.files)
    except (msgspec.MsgspecError, *_DAMAGED) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise BackupError(f"{directory} is not a whole backup: {why}") from None
    return Backup(directory=directory, index=index)


def read_files(backup: Backup, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The contents of its files whose path `wanted` is true for. BackupError."""
    try:
        return {path: data for path, _, data in _contents(backup.directory / ARCHIVE, wanted)}
    except _DAMAGED as error:
        why = getattr(error, "strerror", None) or str(error)
        raise BackupError(f"backup {backup.directory} can't be read: {why}") from None


def put_back(root: Root, backup: Backup, paths: Iterable[str]) -> list[str]:
    """Put files back as they were, owner and mode too; the paths that had changed.

    Each by a rename, so that a crash leaves the one or the other whole. Times are of now: whoever
    started before must be seen to have started before. BackupError where it can't be done.
    """
    wanted = {_archived(root, backup, path) for path in paths}
    changed = []
    try:
        for path, member, data in _contents(backup.directory / ARCHIVE, wanted.__contains__):
            wanted.discard(path)
            if hashlib.sha256(data).hexdigest() != backup.index.files.get(path):
                raise tarfile.ReadError(f"{path} in it is damaged")
            target = Path(root.resolve(path))
            if target.exists() and target.read_bytes() == data:
                continue
            replace(target, data, mode=member.mode, owner=(member.uid, member.gid))
            changed.append(path)
    except _DAMAGED as error:
        why = getattr(error, "strerror", None) or str(error)
        raise BackupError(f"backup {backup.directory} could not be put back: {why}") from None
    if wanted:
        raise BackupError(f"backup {backup.directory} does not hold {', '.join(sorted(wanted))}")
    return changed


def _archived(root: Root, backup: Backup, path: str) -> str:
    """The name a file has in the archive, where a directory above it may be a link."""
    real = root.real(path)
    return real if path not in backup.index.files and real in backup.index.files else path


def replace(target: Path, data: bytes, *, mode: int, owner: tuple[int, int]) -> None:
    """Give a file new contents by a rename, on disk when it returns."""
    temporary = target.with_name(f".{target.name}.upkeep")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if (os.geteuid(), os.getegid()) != owner:
                os.fchown(file.fileno(), *owner)
            os.fchmod(file.fileno(), stat.S_IMODE(mode))
            os.fsync(file.fileno())
        temporary.rename(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(target.parent)


def prune(root: Root, directory: str, keep: int) -> list[str]:
    """Remove all but the newest `keep` finished backups, and what dead rotations began."""
    here = Path(root.resolve(directory))
    if not here.is_dir():
        return []
    finished = sorted(p for p in here.iterdir() if (p / INDEX).is_file() and p.name[0] != ".")
    begun = [p for p in here.iterdir() if p.name.startswith(_PARTIAL)]
    removed = finished[:-keep] + begun
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in removed]
