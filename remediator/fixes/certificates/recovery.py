"""etcd stopped for a copy of its data, where expired certificates let nobody take a snapshot.

Where it has several members, each node renews and starts its own, and then waits for the others: no
node can do more before more than half have done as much, and none waits for ever.

A static pod is stopped by taking its manifest out of the kubelet's directory. It is kept beside it,
under a name that is written to the step log first: whoever comes after a crash puts it back.
"""

import asyncio
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from exporter.checks.certificates import Root
from exporter.checks.certificates.components import endpoint_of, manifest_flags
from exporter.checks.certificates.served import ProbeError, probe
from remediator.fixes.certificates.backup import sync
from remediator.fixes.certificates.layout import ETCD_MANIFEST, ETCD_STASH, Layout
from remediator.fixes.certificates.members import (
    MembersError,
    StoredMember,
    stacked_data,
    stored_members,
)
from remediator.fixes.certificates.restart import RestartError
from remediator.fixes.certificates.uptake import Uptake
from remediator.model import FixError, Steps

_KUBELET_TIME = 40.0  # seconds: the kubelet looks at the directory every 20, at least
_STOP_TIMEOUT = 180.0
_GONE_FOR = 5.0  # seconds for which no etcd must have been seen


async def copy_data(root: Root, uptake: Uptake, target: Path, steps: Steps) -> None:
    """Stop etcd and copy its data; it stays stopped. OSError, RestartError."""
    data = stacked_data(root)
    async with steps.step("stop etcd", f"move {ETCD_MANIFEST} to {ETCD_STASH}") as step:
        if not is_stopped(root):
            _move(root, ETCD_MANIFEST, ETCD_STASH)
        await _await_stop(uptake)
        step.result = "etcd has stopped"
    async with steps.step("copy etcd", f"copy {data}") as step:
        size = await asyncio.to_thread(_copy, Path(root.resolve(data)), target)
        step.result = f"{size >> 20} MiB copied"


async def _await_stop(uptake: Uptake) -> None:
    """Wait until etcd is gone and stays so.

    A kubelet that has not reached the API since it started forgets a pod whose manifest went, but
    doesn't end it: then we do, and nobody starts it again.
    """
    begun = time.monotonic()
    gone_since: float | None = None
    while gone_since is None or time.monotonic() - gone_since < _GONE_FOR:
        now = time.monotonic()
        process = await asyncio.to_thread(uptake.find, "etcd")
        if process is None:
            gone_since = gone_since or now
        else:
            gone_since = None
            if now - begun > _STOP_TIMEOUT:
                raise RestartError("etcd", f"etcd did not stop within {_STOP_TIMEOUT:g} s")
            if now - begun > _KUBELET_TIME:
                await uptake.end(process)
        await asyncio.sleep(0.5)


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
    return root.exists(ETCD_STASH) and not root.exists(ETCD_MANIFEST)


async def start(root: Root, uptake: Uptake, steps: Steps, *, healthy: bool) -> None:
    """Put the manifest back if it is out. RestartError.

    healthy: whether to wait for etcd to be so; with expired certificates it can't be asked.
    """
    if not is_stopped(root):
        return
    async with steps.step("start etcd", f"move {ETCD_STASH} back to {ETCD_MANIFEST}"):
        try:
            _move(root, ETCD_STASH, ETCD_MANIFEST)
        except OSError as error:
            raise RestartError(
                "etcd",
                f"etcd is stopped and can't be started again ({error.strerror}): "
                f"mv {ETCD_STASH} {ETCD_MANIFEST}",
            ) from None
        if healthy:
            await uptake.await_healthy("etcd")


async def await_quorum(
    root: Root, uptake: Uptake, components: Sequence[str], layout: Layout, steps: Steps
) -> None:
    """Wait for etcd's other members where it has any. FixError, RestartError.

    If they don't come, every component here has got the new certificates nevertheless: this node
    then needs nobody's help once they do.
    """
    try:
        members = await asyncio.to_thread(stored_members, root)
    except MembersError:
        return  # the wait for a healthy etcd that follows says what is wrong with it
    own = manifest_flags(root, "etcd").get("name", "")
    others = [member for member in members if member.name != own]
    if not others:
        return
    names = ", ".join(member.name or "one not started" for member in others)
    message = (
        f"etcd needs {len(members) // 2 + 1} of its {len(members)} members: recover {names} too, "
        "now, each by itself"
    )
    async with steps.step("await quorum", message) as step:
        try:
            await uptake.await_healthy("etcd")
        except RestartError:
            states = await asyncio.gather(
                *[asyncio.to_thread(_state, member, time.time()) for member in others]
            )
            await uptake.end_older(components, layout)
            raise FixError(
                "AwaitingPeers",
                "this node's certificates are renewed and its etcd runs, but more than half of "
                f"etcd's members have to: {'; '.join(states)}. Recover those; this node then comes "
                "up by itself",
            ) from None
        step.result = "etcd has a leader"


def _state(member: StoredMember, now: float) -> str:
    """How a member looks from outside, in words."""
    name = member.name or "one not started"
    endpoint = endpoint_of(",".join(member.peer_urls))
    try:
        served = probe(endpoint).certificate if endpoint else None
    except ProbeError:
        served = None
    if served is None:
        return f"{name} does not answer"
    return f"{name} {'has expired' if served.not_after <= now else 'is renewed'}"


def _move(root: Root, source: str, target: str) -> None:
    here, there = Path(root.resolve(source)), Path(root.resolve(target))
    here.rename(there)
    sync(here.parent)
    sync(there.parent)
