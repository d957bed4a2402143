"""Find and read certificate files below a root, each parsed once and again only when it changed.

The exporter may see the host's files under a mount (`--path.rootfs`), where an absolute link such
as kubelet-client-current.pem would lead out into the container's own files: links are followed
inside the root, as a chroot would.
"""

import errno
import fnmatch
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath
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

MAX_BYTES = 4 * 1024 * 1024
_KUBEADM = f"{KUBERNETES_DIRECTORY}/"
_MAX_LINKS = 40
_READ_TRIES = 3
_RACY = 2.0  # seconds; a file changed so shortly before the reading may change unseen after it
_MAGIC = re.compile(r"[*?\[]")
_REASONS = {
    errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied",
    errno.ENOENT: "not_found",
    errno.ENOTDIR: "not_found",
    errno.ELOOP: "link_loop",
    errno.ENAMETOOLONG: "not_found",
}


class Root:
    """The host's file system, wherever it is seen from here."""

    def __init__(self, path: Path = Path("/")) -> None:
        self._prefix = str(path).rstrip("/")

    def resolve(self, path: str) -> str:
        """Where a path of the host is to be opened from here, links followed inside the root.

        Raises OSError (ELOOP) for a ring of links. What doesn't exist resolves to itself.
        """
        if not self._prefix:
            return path
        return self._prefix + self.real(path)

    def _resolve_or_none(self, path: str) -> str | None:
        try:
            return self.resolve(path)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None
            raise

    def real(self, path: str) -> str:
        """The same as the host's own realpath would say it."""
        rest = list(reversed(PurePosixPath(path).parts[1:]))
        done: list[str] = []
        links = 0
        while rest:
            part = rest.pop()
            if part == "..":
                done = done[:-1]
                continue
            here = "/" + "/".join([*done, part])
            try:
                target = os.readlink(self._prefix + here)  # noqa: PTH115 - a hot path
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
                    raise
                done.append(part)
                continue
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            pure = PurePosixPath(target)
            if pure.is_absolute():
                done = []
            rest.extend(reversed(pure.parts[1:] if pure.is_absolute() else pure.parts))
        return "/" + "/".join(done)

    def exists(self, path: str) -> bool:
        """Whether the host has a file or directory of that name."""
        try:
            Path(self.resolve(path)).stat()
        except OSError:
            return False
        return True

    def is_link(self, path: str) -> bool:
        """Whether the host has a link of that name, wherever it leads."""
        pure = PurePosixPath(path)
        try:
            return Path(self.resolve(str(pure.parent)), pure.name).is_symlink()
        except OSError:
            return False

    def expand(self, pattern: str) -> Iterator[tuple[str, str | None]]:
        """Each path that matches, as the host names it and as it is reached from here.

        The second is None for a ring of links. A pattern without wildcards matches itself, whether
        it exists or not. Raises OSError for a directory that exists but can't be listed.
        """
        parts = PurePosixPath(pattern).parts
        magic = [bool(_MAGIC.search(part)) for part in parts]
        yield from self._expand("/", parts[1:], magic[1:])

    def _expand(
        self, above: str, parts: Sequence[str], magic: Sequence[bool]
    ) -> Iterator[tuple[str, str | None]]:
        if True not in magic:
            path = above.rstrip("/") + "/" + "/".join(parts)
            yield path, self._resolve_or_none(path)
            return
        index = magic.index(True)
        directory = (above.rstrip("/") + "/" + "/".join(parts[:index])).rstrip("/") or "/"
        try:
            real = self.resolve(directory)
            entries = sorted(os.scandir(real), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        matches = re.compile(fnmatch.translate(parts[index])).match
        hidden = parts[index].startswith(".")
        last = index == len(parts) - 1
        for entry in entries:
            if not matches(entry.name) or (entry.name.startswith(".") and not hidden):
                continue
            path = directory.rstrip("/") + "/" + entry.name
            if not last:
                yield from self._expand(path, parts[index + 1 :], magic[index + 1 :])
            elif entry.is_symlink():
                yield path, self._resolve_or_none(path)
            else:
                yield path, real.rstrip("/") + "/" + entry.name


class _Wanted(NamedTuple):
    """A file to read: as the host names it, as it's reached from here, and whether it must be."""

    path: str
    here: str | None
    required: bool


class _Cached(msgspec.Struct, frozen=True):
    """What a file gave when it was last read."""

    state: tuple[int, ...]
    contents: Contents
    certificates: tuple[Certificate, ...]
    renewable: bool


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
        self._named = frozenset(p for p in patterns if not _MAGIC.search(p))
        self._clock = clock
        self._cache: dict[str, _Cached] = {}
        self._listed: dict[str, tuple[tuple[str, tuple[int, ...]], tuple[_Wanted, ...]]] = {}
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
            pending = self._matches(pattern, errors)
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
                for reference in cached.contents.references:
                    self._follow(wanted.path, reference.path, pending, errors)
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
            directory, state = self._directory(pattern)
            listed = self._listed.get(pattern)
            if listed is not None and state and listed[0] == (directory, state):
                return list(listed[1])
            matches = [
                _Wanted(path, here, required)
                for path, here in self._root.expand(pattern)
                if required or not is_key_file(path)
            ]
        except OSError as error:
            errors.append(ReadError(path=pattern, reason=_reason(error)))
            return []
        matches.reverse()
        if state and all(
            m.here and PurePath(m.here).parent == PurePath(directory) for m in matches
        ):
            # No link among them: what they are called can't change but with the directory.
            self._listed[pattern] = ((directory, state), tuple(matches))
        return matches

    def _directory(self, pattern: str) -> tuple[str, tuple[int, ...]]:
        """The one directory whose names a pattern asks for, and its state.

        No state where there are several, or none, or it was changed a moment ago (see _RACY).
        """
        above = pattern.rpartition("/")[0]
        if pattern in self._named or _MAGIC.search(above):
            return "", ()
        here = self._root.resolve(above or "/")
        try:
            found = os.stat(here)  # noqa: PTH116 - a hot path
        except OSError:
            return "", ()
        racy = self._clock() - found.st_mtime < _RACY
        return here, () if racy else _state(found)

    def _follow(
        self, kubeconfig: str, file: str, pending: list[_Wanted], errors: list[ReadError]
    ) -> None:
        path = str(PurePosixPath(kubeconfig).parent / file)  # as kubectl reads it
        try:
            pending.append(_Wanted(path, self._root.resolve(path), required=True))
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
        if now[:2] in seen:
            return None
        seen.add(now[:2])
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


def _state(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _read_stable(here: str, now: float) -> tuple[Contents, tuple[int, ...]]:
    """Read and parse a file that didn't change meanwhile; `changing` where it never stood still."""
    for _ in range(_READ_TRIES):
        # Without O_NONBLOCK a named pipe in place of a certificate would hang the scrape.
        descriptor = os.open(here, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                return Contents(problem="not_a_file"), _state(before)
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


def _read_all(descriptor: int) -> bytes:
    parts = []
    left = MAX_BYTES
    while left > 0 and (part := os.read(descriptor, min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno or 0, "io_error")
