"""Find and read certificate files below a root, each parsed once and again only when it changed."""

import errno
import os
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import msgspec

from exporter.checks.certificates.layouts import (
    DEFAULT_PATTERNS,
    KUBERNETES_DIRECTORY,
    is_key_file,
    place,
)
from exporter.checks.certificates.model import Certificate, Inventory, ReadError
from exporter.checks.certificates.parsing import Contents, parse
from exporter.checks.certificates.root import MAGIC, Root

MAX_BYTES = 4 * 1024 * 1024
_KUBEADM = f"{KUBERNETES_DIRECTORY}/"
_READ_TRIES = 3
_RACY = 2.0  # seconds; a file changed so shortly before the reading may change unseen after it
_REASONS = {
    errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied",
    errno.ENOENT: "not_found",
    errno.ENOTDIR: "not_found",
    errno.ELOOP: "link_loop",
    errno.ENAMETOOLONG: "not_found",
}


class _Wanted(NamedTuple):
    """A file to read: as the host names it, as it's reached from here, and whether it must be."""

    path: str
    here: str | None
    required: bool
    named_by_file: bool = False


class _Cached(msgspec.Struct, frozen=True):
    """What a file gave when it was last read."""

    state: tuple[int, ...]
    contents: Contents
    certificates: tuple[Certificate, ...]
    renewable: bool


class _Group(msgspec.Struct, frozen=True, kw_only=True):
    """The files of one pattern that were all right and no links: looked at in one tight loop."""

    directory: tuple[str, tuple[int, ...]]
    files: tuple[tuple[bytes, int, int], ...]
    """Path from here, inode, and when it was last changed in any way (nothing can set that)."""
    inodes: frozenset[tuple[int, int]]
    used: dict[str, _Cached]
    certificates: tuple[Certificate, ...]


class CertificateReader:
    """Reads everything that a set of patterns matches; keep it between readings: it remembers.

    Not safe for two threads at once.
    """

    def __init__(
        self,
        root: Root,
        patterns: Sequence[str] = (),
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """patterns: globs as the host names its files; none means the known layouts."""
        self._root = root
        self._patterns = tuple(patterns) or DEFAULT_PATTERNS
        self._named = frozenset(p for p in patterns if not MAGIC.search(p))
        self._clock = clock
        self._cache: dict[str, _Cached] = {}
        self._groups: dict[str, _Group] = {}
        self._last = Inventory(certificates=(), errors=())

    def read(self) -> Inventory:
        """Everything there is now; the same object as last time where nothing changed.

        Never raises for what single files are.
        """
        found: list[Certificate] = []
        errors: list[ReadError] = []
        seen: set[tuple[int, int]] = set()
        used: dict[str, _Cached] = {}
        keys: dict[str, bool] = {}
        for pattern in self._patterns:
            directory = self._directory(pattern)
            if group := self._unchanged(pattern, directory, seen):
                seen |= group.inodes
                used.update(group.used)
                found.extend(group.certificates)
                continue
            pending = self._matches(pattern, errors)
            wanted_here = tuple(reversed(pending))
            while pending:
                wanted = pending.pop()
                try:
                    cached = self._read_file(wanted.path, wanted.here, seen, keys)
                except OSError as error:
                    if wanted.required or not self._is_absent(wanted.path, error):
                        errors.append(ReadError(path=wanted.path, reason=_reason(error)))
                    continue
                if cached is None:
                    continue
                used[wanted.path] = cached
                found.extend(cached.certificates)
                if cached.contents.problem:
                    errors.append(ReadError(path=wanted.path, reason=cached.contents.problem))
                for reference in () if wanted.named_by_file else cached.contents.references:
                    self._follow(wanted.path, reference.path, pending, errors)
            self._remember(pattern, directory, wanted_here, used)
        self._cache = used
        inventory = Inventory(certificates=tuple(found), errors=tuple(sorted(set(errors))))
        if inventory != self._last:
            self._last = inventory
        return self._last

    def _is_absent(self, path: str, error: OSError) -> bool:
        """Whether there is simply no such file; a link that leads nowhere is a fault."""
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            return False
        return not self._root.is_link(path)

    def _matches(self, pattern: str, errors: list[ReadError]) -> list[_Wanted]:
        required = pattern in self._named
        try:
            matches = [
                _Wanted(path, here, required)
                for path, here in self._root.expand(pattern)
                if required or not is_key_file(path)
            ]
        except OSError as error:
            errors.append(ReadError(path=pattern, reason=_reason(error)))
            return []
        matches.reverse()
        return matches

    def _directory(self, pattern: str) -> tuple[str, tuple[int, ...]] | None:
        """The one directory whose names a pattern asks for, and its state.

        None where there are several, or none, or it was changed a moment ago (see _RACY).
        """
        above = pattern.rpartition("/")[0]
        if pattern in self._named or pattern.startswith(_KUBEADM) or MAGIC.search(above):
            return None
        try:
            here = self._root.resolve(above or "/")
            found = os.stat(here)  # noqa: PTH116 - a hot path
        except OSError:
            return None
        return None if self._clock() - found.st_mtime < _RACY else (here, _state(found))

    def _remember(
        self,
        pattern: str,
        directory: tuple[str, tuple[int, ...]] | None,
        wanted: Sequence[_Wanted],
        used: dict[str, _Cached],
    ) -> None:
        """Keep a pattern's files as one group, if nothing but a change of theirs can change it."""
        self._groups.pop(pattern, None)
        files = [(m.here, used.get(m.path)) for m in wanted]
        if directory is None or not files:
            return
        above = directory[0].rstrip("/")
        for here, cached in files:
            if (
                here is None
                or here.rpartition("/")[0] != above  # a link's target may be replaced elsewhere
                or cached is None
                or not cached.state
                or cached.contents.problem
                or cached.contents.references
            ):
                return
        self._groups[pattern] = _Group(
            directory=directory,
            files=tuple(
                (os.fsencode(here or ""), *_brief(c.state)) for here, c in files if c is not None
            ),
            inodes=frozenset((c.state[0], c.state[1]) for _, c in files if c is not None),
            used={m.path: used[m.path] for m in wanted},
            certificates=tuple(x for _, c in files if c is not None for x in c.certificates),
        )

    def _unchanged(
        self,
        pattern: str,
        directory: tuple[str, tuple[int, ...]] | None,
        seen: set[tuple[int, int]],
    ) -> _Group | None:
        """The group of a pattern, if neither the directory nor any file of it has changed."""
        group = self._groups.get(pattern)
        if group is None or group.directory != directory or not seen.isdisjoint(group.inodes):
            return None
        look = os.stat
        try:
            for here, inode, changed in group.files:
                found = look(here)
                if found.st_ctime_ns != changed or found.st_ino != inode:
                    return None
        except OSError:
            return None
        return group

    def _follow(
        self, kubeconfig: str, file: str, pending: list[_Wanted], errors: list[ReadError]
    ) -> None:
        path = str(PurePosixPath(kubeconfig).parent / file)  # as kubectl reads it
        try:
            here = self._root.resolve(path)
            pending.append(_Wanted(path, here, required=True, named_by_file=True))
        except OSError as error:
            errors.append(ReadError(path=path, reason=_reason(error)))

    def _read_file(
        self, path: str, here: str | None, seen: set[tuple[int, int]], keys: dict[str, bool]
    ) -> _Cached | None:
        """A file's certificates; None where the same file was read under another name already."""
        if here is None:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        found = os.stat(here)  # noqa: PTH116 - a hot path
        now = _state(found)
        inode = now[0], now[1]
        if inode in seen:
            return None
        seen.add(inode)
        cached = self._cache.get(path)
        if cached is None or cached.state != now:
            contents, state = _read_stable(here, self._clock())
            cached = self._describe(path, contents, state, keys)
        elif path.startswith(_KUBEADM) and cached.renewable != self._is_renewable(path, keys):
            cached = self._describe(path, cached.contents, cached.state, keys)
        return cached

    def _is_renewable(self, path: str, keys: dict[str, bool]) -> bool:
        key = place(path, self._exists(keys)).ca_key if path.startswith(_KUBEADM) else ""
        return not key or self._exists(keys)(key)

    def _exists(self, keys: dict[str, bool]) -> Callable[[str], bool]:
        """Root.exists, each path looked at once in a reading."""

        def exists(path: str) -> bool:
            if path not in keys:
                keys[path] = self._root.exists(path)
            return keys[path]

        return exists

    def _describe(
        self, path: str, contents: Contents, state: tuple[int, ...], keys: dict[str, bool]
    ) -> _Cached:
        placing = place(path, self._exists(keys))
        renewable = self._is_renewable(path, keys)
        certificates = {
            Certificate(
                path=path,
                name=placing.name,
                managed_by=placing.leaf_managed_by if p.usage != "ca" and renewable else "",
                **msgspec.structs.asdict(p),
            ): None
            for p in contents.certificates
        }
        return _Cached(
            state=state, contents=contents, certificates=tuple(certificates), renewable=renewable
        )


def _brief(state: tuple[int, ...]) -> tuple[int, int]:
    """The inode and the time of change of a `_state`."""
    return state[1], state[4]


def _state(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _read_stable(here: str, now: float) -> tuple[Contents, tuple[int, ...]]:
    """Read and parse a file that didn't change meanwhile; `changing` where it never stood still."""
    for _ in range(_READ_TRIES):
        descriptor, before = open_regular(here)
        if descriptor is None:
            return Contents(problem="not_a_file"), _state(before)
        try:
            if before.st_size > MAX_BYTES:
                return Contents(problem="too_large"), _state(before)
            data = _read_all(descriptor)
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        now_there = os.stat(here)  # noqa: PTH116 - another file may have taken its name
        if not _state(before) == _state(after) == _state(now_there):
            continue
        contents = parse(data)
        del data
        # Two writes within one tick of the file system's clock leave the same times: what was
        # written a moment ago is read again next time, whatever its times say.
        racy = now - after.st_mtime < _RACY
        return contents, () if racy else _state(after)
    return Contents(problem="changing"), ()


def open_regular(here: str) -> tuple[int | None, os.stat_result]:
    """A descriptor to read a regular file by, None for anything else, and what it is. OSError.

    Anybody's kubeconfig may name anything. To open a device may do something (a watchdog's begins
    to count), and a pipe has somebody wait for us: so it's looked at before it is opened, and what
    was looked at is what is opened.
    """
    found = os.open(here, os.O_PATH | os.O_CLOEXEC)
    try:
        what = os.fstat(found)
        if not stat.S_ISREG(what.st_mode):
            return None, what
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC), what
    finally:
        os.close(found)


def _read_all(descriptor: int) -> bytes:
    parts = []
    left = MAX_BYTES
    while left > 0 and (part := os.read(descriptor, min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno or 0, "io_error")
