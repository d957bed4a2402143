"""A file that is a whole snapshot of etcd, or is not.

One that broke off looks like a success to whoever took it. So it is read back from the disk: its
hash (the last 32 bytes), its size and its first page must be right before it counts.
"""

import hashlib
from pathlib import Path

import msgspec

_HASH_BYTES = 32
_BOLT_MAGIC = (0xED0CDAED).to_bytes(4, "little")
_MAGIC_AT = 16  # after the header of the first page
_BLOCK = 1 << 20


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot that was checked."""

    size: int
    """Bytes, without the hash."""
    sha256: str
    by: str
    """Who took it: `gateway` or `etcdctl`."""


class SnapshotError(Exception):
    """It can't be trusted; the sentence says why."""


def read_snapshot(path: Path, *, database_size: int, by: str) -> Snapshot:
    """Read it back. SnapshotError, OSError.

    database_size: what etcd said of its database before: a snapshot is no smaller.
    """
    digest = hashlib.sha256()
    first = held = b""
    size = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            held += block
            data, held = held[:-_HASH_BYTES], held[-_HASH_BYTES:]
            first = first or data[:64]
            digest.update(data)
            size += len(data)
    if digest.digest() != held:
        raise SnapshotError("its hash does not match; it was cut short")
    if size < database_size:
        raise SnapshotError(f"{size} bytes of a database of {database_size}")
    if first[_MAGIC_AT : _MAGIC_AT + 4] != _BOLT_MAGIC:
        raise SnapshotError("it does not begin as a database does")
    return Snapshot(size=size, sha256=digest.hexdigest(), by=by)
