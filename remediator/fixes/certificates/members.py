"""Who etcd's members are, read from its database on disk: for when no etcd can be asked.

With expired certificates nobody answers, but each member keeps the list of all members in its own
database. Where that names one member only, there is no other: a member that is alone is the whole
quorum, so nobody can have been added without its writing that down, within a tenth of a second.
(Two copies of one machine, or its data put back from before others joined, are two clusters to etcd
as well.) A list of several proves nothing more than that there have been several, which is the
careful way to be wrong.

The file is bbolt's: pages that are never changed in place, and two meta pages of which the newer
one is the root. etcd may go on writing while we read; then the meta page is another one
afterwards, and we read again.
"""

import mmap
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from exporter.checks.certificates import Root
from exporter.checks.certificates.components import etcd_environment, manifest_flags
from remediator.fixes.certificates.layout import ETCD_MANIFEST, ETCD_STASH

_PAGE = struct.Struct("<QHHI")  # id, kind, count, overflow
_META = struct.Struct("<IIIIQQQQQ")
"""Magic, version, page size, flags; pages: root, (sequence), free list, end; transaction."""
_BRANCH_ENTRY = struct.Struct("<IIQ")  # position, key's size, page
_LEAF_ENTRY = struct.Struct("<IIII")  # flags, position, key's size, value's size
_BUCKET = struct.Struct("<QQ")  # root page (0: the page follows), sequence
_BRANCH, _LEAF = 1, 2
_IS_BUCKET = 1
_MAGIC, _VERSION = 0xED0CDAED, 2
_DEEPEST = 32
_TRIES = 5
_DATABASE = "member/snap/db"  # in etcd's data directory


class MembersError(Exception):
    """The list can't be read; the sentence says why."""


class StoredMember(msgspec.Struct, frozen=True, rename={"peer_urls": "peerURLs"}):
    """One member, as etcd wrote it down."""

    name: str = ""
    """Empty for one that was added and never started."""
    peer_urls: tuple[str, ...] = ()


def stacked_flags(root: Root) -> dict[str, str]:
    """The flags of a stacked etcd, wherever a recovery has put its manifest."""
    here = "etcd" if root.exists(ETCD_MANIFEST) else f"../{Path(ETCD_STASH).stem}"
    return manifest_flags(root, here)


def stacked_data(root: Root) -> str:
    """Where a stacked etcd keeps its data."""
    return stacked_flags(root).get("data-dir", "/var/lib/etcd")


def stored_members(root: Root) -> list[StoredMember]:
    """What the etcd of this node knows, whether it runs or not. MembersError.

    Members of a stacked etcd are control planes; one on the host says nothing of how many use it.
    """
    flags = stacked_flags(root) or etcd_environment(root)
    if not flags:
        raise MembersError("this node has no etcd of its own")
    directory = flags.get("data-dir", "/var/lib/etcd")
    members = read_members(Path(root.resolve(f"{directory}/{_DATABASE}")))
    return sorted(members, key=lambda member: member.name)


def read_members(
    database: Path, *, pause: Callable[[float], None] = time.sleep
) -> list[StoredMember]:
    """Every member in an etcd database (`member/snap/db` in its data directory). MembersError."""
    problem = ""
    for _ in range(_TRIES):
        try:
            with database.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with data:
                before = _newest_meta(data)
                members = _members(data, before)
                if _newest_meta(data) == before:
                    return members
                problem = "etcd goes on writing to it"
        except (OSError, ValueError, struct.error, msgspec.DecodeError) as error:
            problem = getattr(error, "strerror", None) or str(error)
        pause(0.2)
    raise MembersError(f"{database.name} of etcd can't be read: {problem}")


class _Meta(msgspec.Struct, frozen=True):
    page_size: int
    root: int
    transaction: int


def _newest_meta(data: mmap.mmap) -> _Meta:
    """The root that counts. ValueError where either is damaged.

    etcd itself would go by the older one then, and read of later members in its log: that one may
    not know of them.
    """
    first = _meta(data, 0)
    second = None if first is None else _meta(data, first.page_size)
    if first is None or second is None:
        raise ValueError("it is no database of etcd's, or damaged")
    return max(first, second, key=lambda meta: meta.transaction)


def _meta(data: mmap.mmap, offset: int) -> _Meta | None:
    start = offset + _PAGE.size
    raw = data[start : start + _META.size + 8]
    if len(raw) < _META.size + 8:
        return None
    magic, version, page_size, _, root, _, _, end, transaction = _META.unpack_from(raw)
    checksum = int.from_bytes(raw[_META.size :], "little")
    if (magic, version) != (_MAGIC, _VERSION) or checksum != _fnv(raw[: _META.size]):
        return None
    if end * page_size > len(data):
        raise ValueError("it is cut short")
    return _Meta(page_size, root, transaction)


def _fnv(data: bytes) -> int:
    """FNV-1a of 64 bits."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def _members(data: mmap.mmap, meta: _Meta) -> list[StoredMember]:
    for flags, key, value in _entries(data, meta, meta.root):
        if key == b"members" and flags & _IS_BUCKET:
            root, _ = _BUCKET.unpack_from(value)
            inline = value[_BUCKET.size :]
            entries = _leaves(inline) if root == 0 else _entries(data, meta, root)
            found = [msgspec.json.decode(v, type=StoredMember) for _, _, v in entries]
            if found:
                return found
    raise ValueError("it names no members")


_Entry = tuple[int, bytes, bytes]


def _entries(
    data: mmap.mmap, meta: _Meta, page: int, above: tuple[int, ...] = ()
) -> Iterator[_Entry]:
    """Flags, key and value of every entry below a page, in their order."""
    offset = page * meta.page_size
    if offset + meta.page_size > len(data) or page in above or len(above) > _DEEPEST:
        raise ValueError(f"page {page} is not where it should be")
    number, kind, count, overflow = _PAGE.unpack_from(data, offset)
    content = data[offset : offset + (overflow + 1) * meta.page_size]
    if number != page:
        raise ValueError(f"page {page} is not whole")
    if kind == _LEAF:
        yield from _leaves(content)
    elif kind == _BRANCH:
        end = _PAGE.size + count * _BRANCH_ENTRY.size
        for index in range(count):
            at = _PAGE.size + index * _BRANCH_ENTRY.size
            position, key_size, below = _BRANCH_ENTRY.unpack_from(content, at)
            if at + position != end:
                raise ValueError(f"page {page} is not whole")
            end += key_size
            yield from _entries(data, meta, below, (*above, page))
    else:
        raise ValueError(f"page {page} is of an unknown kind")


def _leaves(content: bytes) -> Iterator[_Entry]:
    _, _, count, _ = _PAGE.unpack_from(content)
    end = _PAGE.size + count * _LEAF_ENTRY.size
    for index in range(count):
        at = _PAGE.size + index * _LEAF_ENTRY.size
        flags, position, key_size, value_size = _LEAF_ENTRY.unpack_from(content, at)
        key = at + position
        if key != end:  # each follows the one before: a wrong count would show here
            raise ValueError("an entry is not where it should be")
        end = key + key_size + value_size
        if end > len(content):
            raise ValueError("an entry is cut short")
        yield flags, content[key : key + key_size], content[key + key_size : end]
