"""Names of containers from the log folders of the node, where no API server can be asked.

The kubelet keeps a link /var/log/containers/POD_NAMESPACE_CONTAINER-ID.log for each container and a
folder /var/log/pods/NAMESPACE_POD_UID for each pod. Names of objects can't hold an underscore, so
both are read without doubt.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from exporter.checks.cgroups import ContainerRef

_LINK = re.compile(r"([a-z0-9.-]+)_([a-z0-9.-]+)_([a-z0-9.-]+)-([0-9a-f]{64})\.log")
_FOLDER = re.compile(r"([a-z0-9.-]+)_([a-z0-9.-]+)_([0-9a-f-]{32,36})")


class ContainerNames(NamedTuple):
    """What people and alerts call a container."""

    namespace: str
    pod: str
    container: str

    @property
    def known(self) -> bool:
        """False where the node's log folders don't name the pod: ids stand for names."""
        return bool(self.namespace)


class LogFolders:
    """Looks containers up in the log folders below a root; remembers what it found."""

    def __init__(self, rootfs: Path = Path("/")) -> None:
        self._links = rootfs / "var/log/containers"
        self._pods = rootfs / "var/log/pods"
        self._linked: dict[ContainerRef, ContainerNames] = {}

    def names(self, refs: set[ContainerRef]) -> dict[ContainerRef, ContainerNames]:
        """Names for each of `refs`; where none are to be had, the ids and no namespace."""
        self._linked = {ref: names for ref, names in self._linked.items() if ref in refs}
        missing = refs - self._linked.keys()
        if not missing:
            return self._linked
        by_id = {ref.container_id: ref for ref in missing}
        pods_with_links: set[tuple[str, str]] = set()
        for name in _entries(self._links):
            if link := _LINK.fullmatch(name):
                pods_with_links.add((link[2], link[1]))
                if ref := by_id.pop(link[4], None):
                    self._linked[ref] = ContainerNames(link[2], link[1], link[3])
        unlinked = set(by_id.values())
        return self._linked | self._from_folders(unlinked, pods_with_links)

    def container_ids(self) -> set[str]:
        """Ids of the containers that have a link: those that run, and the last dead ones."""
        links = (_LINK.fullmatch(name) for name in _entries(self._links))
        return {link[4] for link in links if link}

    def ids(self, names: ContainerNames) -> set[str]:
        """Ids of the containers of that name that have a link, dead ones included."""
        links = (_LINK.fullmatch(entry) for entry in _entries(self._links))
        wanted = (names.pod, names.namespace, names.container)
        return {link[4] for link in links if link and link.group(1, 2, 3) == wanted}

    def _from_folders(
        self, refs: set[ContainerRef], pods_with_links: set[tuple[str, str]]
    ) -> dict[ContainerRef, ContainerNames]:
        """The pod is certain; its container only where it has one, and that isn't another's."""
        found = {ref: ContainerNames("", ref.pod_uid, ref.container_id) for ref in refs}
        for name in _entries(self._pods) if refs else ():
            folder = _FOLDER.fullmatch(name)
            for ref in refs if folder else ():
                if folder is None or folder[3] != ref.pod_uid:
                    continue
                containers = _entries(self._pods / name)
                sure = len(containers) == 1 and (folder[1], folder[2]) not in pods_with_links
                container = containers[0] if sure else ref.container_id
                found[ref] = ContainerNames(folder[1], folder[2], container)
        return found


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - names are wanted, not paths
    except OSError:  # no such folder, or not ours to read: then there are no names
        return []
