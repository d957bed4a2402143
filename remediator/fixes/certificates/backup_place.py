"""Whether backups can be kept where they are to be kept, and hold what a way back needs."""

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from exporter.checks.certificates import Root
from exporter.checks.certificates.layouts import PKI_DIRECTORIES
from remediator.fixes.certificates.backup import SOURCES, existing

_RESERVE = 64 * 1024 * 1024  # bytes to leave free beyond what the backup takes


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
    return ""


def link_problem(root: Root, renewed: Iterable[str]) -> str:
    """Which file of the PKI a backup would miss, since a link leads to it, or a roll-back would not
    write; empty where none. renewed: paths of the files that kubeadm would write."""
    kept = [root.real(source) for source in SOURCES]
    pki = [root.real(directory) for directory in PKI_DIRECTORIES]
    try:
        for directory in PKI_DIRECTORIES:
            here = root.resolve(directory)
            for folder, folders, names in os.walk(here):
                for name in [*folders, *names, "."]:
                    path = str(PurePosixPath(directory, Path(folder).relative_to(here), name))
                    if not _is_below(root.real(path), kept):
                        return _leads_away(root, path)
        for path in renewed:
            real = root.real(path)
            is_kubeconfig = real == f"{kept[0]}/{PurePosixPath(path).name}"
            if not is_kubeconfig and not _is_below(real, pki):
                return _leads_away(root, path)
    except OSError as error:  # a ring of links
        return f"{error.filename} can't be followed: {error.strerror}"
    return ""


def _is_below(real: str, directories: Iterable[str]) -> bool:
    return any(PurePosixPath(real).is_relative_to(directory) for directory in directories)


def _leads_away(root: Root, path: str) -> str:
    real = root.real(path)
    return f"{path} is {real}, which a backup would not hold and put back: move it to {path}"


def space_problem(root: Root, directory: str, extra: int = 0) -> str:
    """Why the disk can't hold a backup, in a sentence; empty where it can. extra: bytes more."""
    needed = extra + _RESERVE + sum(size_of(root, path) for path in existing(root))
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


def size_of(root: Root, directory: str) -> int:
    """Bytes of all files below a directory of the host."""
    return sum(
        _size(Path(folder) / name)
        for folder, _, names in os.walk(root.resolve(directory))
        for name in names
    )


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0
