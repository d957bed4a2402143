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
from contextlib import suppress
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

import msgspec

from exporter.checks.certificates import Root
from exporter.checks.certificates.layouts import KUBERNETES_DIRECTORY

ARCHIVE = "files.tar.gz"
INDEX = "index.json"
ETCD_DIRECTORY = "/etc/ssl/etcd"
SOURCES = (KUBERNETES_DIRECTORY, ETCD_DIRECTORY, "/etc/etcd.env", "/var/lib/kubelet/config.yaml")
PARTIAL = ".partial-"
"""How the name of one begins that is being made."""
_DAMAGED = (OSError, EOFError, tarfile.TarError, zlib.error)
"""What reading an archive that isn't what it was may raise, depending on where it is damaged."""


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


class BackupWriter:
    """A backup being made. Leave it by `finish` or `discard`."""

    def __init__(self, root: Root, directory: str, name: str) -> None:
        """name: of the finished backup. BackupError where it can't be begun."""
        self._root = root
        self._final = Path(root.resolve(directory)) / name
        self.partial = self._final.with_name(PARTIAL + name)
        """Where it's being made; an etcd snapshot is put here too."""
        try:
            self._final.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self.partial.exists():
                shutil.rmtree(self.partial)  # of a rotation that died
            self.partial.mkdir(mode=0o700)
        except OSError as error:
            raise BackupError(f"{directory} can't be written: {error.strerror}") from None

    def add_files(self, copies: Sequence[str], needed: Sequence[str] = ()) -> dict[str, str]:
        """Put the control plane's files and `copies` into it; SHA-256 by path. BackupError.

        needed: paths without which it would be no way back.
        """
        archive = self.partial / ARCHIVE
        hashes: dict[str, str] = {}
        try:
            descriptor = os.open(archive, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with (
                os.fdopen(descriptor, "wb") as raw,
                gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as packed,
                tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
            ):
                for path in [*existing(self._root), *copies]:
                    self._add(tar, path, hashes)
            _check_archive(archive, hashes)
        except _DAMAGED as error:
            why = getattr(error, "strerror", None) or str(error)
            raise BackupError(f"the backup could not be written: {why}") from None
        for path in needed:
            if path not in hashes and self._root.real(path) not in hashes:
                raise BackupError(f"{path} did not get into the backup")
        return hashes

    def _add(self, tar: tarfile.TarFile, path: str, hashes: dict[str, str]) -> None:
        # A link that was named is followed: it's what it leads to that is to be kept.
        here = Path(self._root.resolve(self._root.real(path)))
        if stat.S_ISSOCK(here.lstat().st_mode):  # tarfile has no form for it
            return
        info = tar.gettarinfo(str(here), arcname=path.lstrip("/"))
        if info.isreg() or info.islnk():
            info.type, info.linkname = tarfile.REGTYPE, ""  # of two hard links, both in full
            with here.open("rb") as file:
                info.size = os.fstat(file.fileno()).st_size
                hashed = _Hashed(file)
                tar.addfile(info, hashed)
            hashes[path] = hashed.digest.hexdigest()
            return
        tar.addfile(info)
        if info.isdir():
            for child in sorted(os.scandir(here), key=lambda entry: entry.name):
                below = f"{path}/{child.name}"
                if child.is_symlink():
                    link = tar.gettarinfo(child.path, arcname=below.lstrip("/"))
                    tar.addfile(link)
                else:
                    with suppress(FileNotFoundError):  # an editor's, gone meanwhile
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


class _Hashed:
    """The least that tarfile reads from; what it has read is hashed, whatever its size."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        part = self._file.read(size)
        self.digest.update(part)
        return part


def existing(root: Root) -> list[str]:
    """Which of SOURCES there are."""
    return [path for path in SOURCES if root.exists(path)]


def _members(
    archive: Path, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, tarfile.TarInfo, IO[bytes] | None]]:
    """Path on the host, owner and mode, and content of each wanted regular file, each after the
    directories above it, which have no content. `_DAMAGED`."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            path = "/" + member.name
            if member.isdir() or (member.isreg() and wanted(path)):
                yield path, member, tar.extractfile(member)


def _check_archive(archive: Path, hashes: Mapping[str, str]) -> None:
    """Read it back: an archive is a backup only once it has been read."""
    found = {
        path: hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        for path, _, file in _members(archive, lambda _path: True)
        if file is not None
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
        found = _members(backup.directory / ARCHIVE, wanted)
        return {path: file.read() for path, _, file in found if file is not None}
    except _DAMAGED as error:
        why = getattr(error, "strerror", None) or str(error)
        raise BackupError(f"backup {backup.directory} can't be read: {why}") from None


def put_back(root: Root, backup: Backup, paths: Iterable[str]) -> list[str]:
    """Put files back as they were, owner and mode too; the paths that had changed.

    Each by a rename, so that a crash leaves the one or the other whole; a directory that is gone is
    made again. Times are of now: whoever started before must be seen to have started before. A
    right content is left alone, so its time is too. BackupError where it can't be done.
    """
    wanted = {_archived(root, backup, path) for path in paths}
    folders: dict[str, tarfile.TarInfo] = {}
    changed = []
    try:
        for path, member, file in _members(backup.directory / ARCHIVE, wanted.__contains__):
            if file is None:
                folders[path] = member
                continue
            wanted.discard(path)
            data = file.read()
            if hashlib.sha256(data).hexdigest() != backup.index.files.get(path):
                raise tarfile.ReadError(f"{path} in it is damaged")
            if _put(root, path, data, member, folders):
                changed.append(path)
    except _DAMAGED as error:
        why = getattr(error, "strerror", None) or str(error)
        raise BackupError(f"backup {backup.directory} could not be put back: {why}") from None
    if wanted:
        raise BackupError(f"backup {backup.directory} does not hold {', '.join(sorted(wanted))}")
    return changed


def _put(
    root: Root,
    path: str,
    data: bytes,
    member: tarfile.TarInfo,
    folders: Mapping[str, tarfile.TarInfo],
) -> bool:
    """Whether a file had to be changed to be as it was. OSError."""
    target = Path(root.resolve(path))
    mode, owner = stat.S_IMODE(member.mode), (member.uid, member.gid)
    if not target.is_file() or target.read_bytes() != data:
        for above in reversed(PurePosixPath(path).parents):
            _make(Path(root.resolve(str(above))), folders.get(str(above)))
        replace(target, data, mode=mode, owner=owner)
        return True
    found = target.stat()
    if (found.st_uid, found.st_gid) == owner and stat.S_IMODE(found.st_mode) == mode:
        return False
    os.chown(target, *owner)
    target.chmod(mode)  # after it, since a change of owner may take bits of it away
    sync(target)
    return True


def _make(directory: Path, was: tarfile.TarInfo | None) -> None:
    """A directory that is gone, as it was. OSError."""
    if directory.is_dir():
        return
    directory.mkdir(mode=0o700)
    if was is not None:
        if (os.geteuid(), os.getegid()) != (was.uid, was.gid):
            os.chown(directory, was.uid, was.gid)
        directory.chmod(stat.S_IMODE(was.mode))
    sync(directory.parent)


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
