"""The host's file system below a root: links followed inside it, globs listed in it.

The exporter may see the host's files under a mount (`--path.rootfs`), where an absolute link such
as kubelet-client-current.pem would lead out into the container's own files: links are followed
inside the root, as a chroot would.
"""

import errno
import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

MAGIC = re.compile(r"[*?\[]")
"""What makes a path a pattern."""
_MAX_LINKS = 40
_NO_LINK = (errno.EINVAL, errno.ENOENT, errno.ENOTDIR, errno.EACCES)
"""What readlink says where there is none to follow; who may not look may not open it either."""


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
                if error.errno not in _NO_LINK:
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
        magic = [bool(MAGIC.search(part)) for part in parts]
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
