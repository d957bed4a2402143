"""etcd stopped for a copy of its data, where expired certificates let nobody take a snapshot.

A static pod is stopped by taking its manifest out of the kubelet's directory. It is kept beside it,
under a name that is written to the step log first: whoever comes after a crash puts it back.
"""

import asyncio
import os
import shutil
import time
from pathlib import Path

from exporter.checks.certificates import Root
from exporter.checks.certificates.components import MANIFESTS, manifest_flags
from remediator.fixes.certificates.backup import sync
from remediator.fixes.certificates.restart import RestartError
from remediator.fixes.certificates.uptake import Uptake
from remediator.model import Steps

MANIFEST = f"{MANIFESTS}/etcd.yaml"
STASH = "/etc/kubernetes/.upkeep-etcd.yaml"
_STOP_TIMEOUT = 120.0  # seconds: the kubelet looks at the directory every 20


async def copy_data(root: Root, uptake: Uptake, target: Path, steps: Steps) -> None:
    """Stop etcd and copy its data; it stays stopped. OSError, RestartError."""
    data = manifest_flags(root, "etcd").get("data-dir", "/var/lib/etcd")
    async with steps.step("stop etcd", f"move {MANIFEST} to {STASH}") as step:
        _move(root, MANIFEST, STASH)
        ends = time.monotonic() + _STOP_TIMEOUT
        while await asyncio.to_thread(uptake.find, "etcd") is not None:
            if time.monotonic() > ends:
                raise RestartError("etcd", f"etcd did not stop within {_STOP_TIMEOUT:g} s")
            await asyncio.sleep(0.5)
        step.result = "etcd has stopped"
    async with steps.step("copy etcd", f"copy {data}") as step:
        size = await asyncio.to_thread(_copy, Path(root.resolve(data)), target)
        step.result = f"{size >> 20} MiB copied"


def _copy(source: Path, target: Path) -> int:
    shutil.copytree(source, target, symlinks=True)
    size = 0
    for folder, _, names in os.walk(target):
        for name in names:
            path = Path(folder) / name
            path.chmod(0o600)
            sync(path)
            size += path.stat().st_size
        Path(folder).chmod(0o700)
        sync(Path(folder))
    return size


def is_stopped(root: Root) -> bool:
    """Whether etcd's manifest is out of its place by our hand."""
    return root.exists(STASH) and not root.exists(MANIFEST)


async def start(root: Root, uptake: Uptake, steps: Steps, *, healthy: bool) -> None:
    """Put the manifest back if it is out. RestartError.

    healthy: whether to wait for etcd to be so; with expired certificates it can't be asked.
    """
    if not is_stopped(root):
        return
    async with steps.step("start etcd", f"move {STASH} back to {MANIFEST}"):
        _move(root, STASH, MANIFEST)
        if healthy:
            await uptake.await_healthy("etcd")


def _move(root: Root, source: str, target: str) -> None:
    here, there = Path(root.resolve(source)), Path(root.resolve(target))
    here.rename(there)
    sync(here.parent)
    sync(there.parent)
