"""Bringing the certificates on disk into use, and seeing that they are.

The same way serves a renewal and a roll-back: whoever started before the files were written gets a
new process, in the order in which components need each other, each healthy before the next.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from exporter.checks.certificates import CertificateReader, Root
from exporter.checks.certificates.components import Process, served_files
from exporter.checks.certificates.served import ProbeError, probe
from exporter.kubernetes.access import AccessError
from exporter.kubernetes.client import ApiError
from remediator.fixes.certificates.apiserver import ApiServer
from remediator.fixes.certificates.etcd import Etcd, EtcdError, find_access, quorum_problem
from remediator.fixes.certificates.host_etcd import HostEtcd
from remediator.fixes.certificates.kubelet import kubelet_problem
from remediator.fixes.certificates.layout import Layout
from remediator.fixes.certificates.restart import Restarter, RestartError
from remediator.fixes.certificates.settings import Settings
from remediator.model import Steps

_READ_AT_START = ("kube-controller-manager", "kube-scheduler")
_TOLERANCE = 1.0  # seconds: start times are right to about that
_SERVED_TIMEOUT = 120.0  # seconds: an API server looks at its files once a minute
_POLL = 1.0


class NotServedError(Exception):
    """A component still uses other certificates than those on disk; the sentence names it."""


class Uptake:
    """Restarts components of this node and looks at what they use."""

    def __init__(
        self,
        settings: Settings,
        *,
        root: Root,
        procfs: Path,
        clock: Callable[[], float],
        node_name: str,
    ) -> None:
        self._settings = settings
        self._root = root
        self._clock = clock
        self._node = node_name
        self._api = ApiServer(root)
        self._restarter = Restarter(
            root, procfs, self._is_healthy, timeout=settings.component_timeout
        )
        self._host_etcd = HostEtcd(root, procfs)

    async def restart(
        self,
        components: Sequence[str],
        layout: Layout,
        steps: Steps,
        *,
        since: float = 0.0,
        quorum: bool = True,
    ) -> None:
        """Give a new process to each that is older than the files. RestartError.

        since: leave those alone that started before it. quorum: ask etcd's members first.
        """
        if self._settings.restart == "none":
            return
        if layout.etcd == "host" and self._settings.restart == "all":
            await self._restart_host_etcd(layout, steps, quorum=quorum)
        written = newest_write(self._root, layout)
        for component in components:
            if self._settings.restart == "needed" and component not in _READ_AT_START:
                continue
            process = await asyncio.to_thread(self._restarter.find, component)
            message = f"restart {component}, healthy before the next"
            async with steps.step(f"restart {component}", message) as step:
                if process is not None:
                    step.data = {"pid": process.pid, "start": process.start_ticks}
                # Those two are stale or not by their start alone, so that is put right too.
                begun_by = 0.0 if component in _READ_AT_START else since
                if process is not None and self._is_older(process, written, begun_by):
                    if problem := await kubelet_problem(self._root):
                        raise RestartError(component, problem)
                    if component == "etcd" and quorum:
                        await self._await_quorum(layout)
                    begun = time.monotonic()
                    new = await self._restarter.restart(process)
                    step.result = (
                        f"pid {process.pid} of container {process.container[:12]} ended, pid "
                        f"{new.pid} of {new.container[:12]} healthy after "
                        f"{time.monotonic() - begun:.0f} s"
                    )
                else:  # it ended by itself, or never had other certificates: not once more
                    new = await self._restarter.await_healthy(component)
                    step.result = f"pid {new.pid} is healthy and needs no restart"

    async def await_absent(self, components: Sequence[str], steps: Steps) -> None:
        """Wait for those that were away before, in a back-off: one that never comes back is no
        reason to restart the others. RestartError."""
        if self._settings.restart == "none":
            return
        for component in components:
            if await asyncio.to_thread(self._restarter.find, component) is None:
                message = f"{component} does not run: see that it comes back with the new files"
                async with steps.step(f"await {component}", message):
                    await self._restarter.await_healthy(component)

    async def _restart_host_etcd(self, layout: Layout, steps: Steps, *, quorum: bool) -> None:
        """A new process from systemd, only where its own files changed. RestartError."""
        async with steps.step("restart etcd", "restart etcd.service if its files changed") as step:
            try:
                process = await self._host_etcd.find()
            except RestartError as error:  # etcd reads its files at each connection: no reason to
                step.result = f"left alone: {error}"  # put back what was renewed
                return
            if not self._host_etcd.is_older_than_its_files(process):
                step.result = f"pid {process.pid} is newer than its files and needs no restart"
                return
            if quorum:
                await self._await_quorum(layout)
            await self._host_etcd.restart()
            new = await self._restarter.await_healthy(
                "etcd", other_than=process, find=self._host_etcd.find
            )
            step.result = f"pid {process.pid} ended, pid {new.pid} is healthy"

    def _is_older(self, process: Process, written: float, since: float) -> bool:
        return since - _TOLERANCE <= process.started_at <= written + _TOLERANCE

    async def await_healthy(self, component: str) -> None:
        """Wait until it is. RestartError."""
        await self._restarter.await_healthy(component)

    def find(self, component: str) -> Process | None:
        """Its process, if it runs."""
        return self._restarter.find(component)

    async def end(self, process: Process) -> None:
        """End this very process by SIGTERM. RestartError."""
        await self._restarter.end(process)

    async def end_older(self, components: Sequence[str], layout: Layout) -> None:
        """End each that is older than the files, and leave its return to the kubelet.
        RestartError."""
        written = newest_write(self._root, layout)
        for component in components:
            process = await asyncio.to_thread(self._restarter.find, component)
            if process is not None and self._is_older(process, written, 0.0):
                await self._restarter.end(process)

    async def _await_quorum(self, layout: Layout) -> None:
        """Every member healthy before one goes; the wait is for one that is just coming back."""
        access = find_access(self._root, layout.pki)
        if access is None:
            raise RestartError("etcd", "etcd's manifest does not say how its members are asked")
        etcd = Etcd(self._root, access)
        ends = time.monotonic() + self._settings.component_timeout
        while True:
            try:
                members = await etcd.members()
                problem = quorum_problem(members, await etcd.unhealthy(members))
            except EtcdError as error:
                problem = str(error)
            if not problem:
                return
            if time.monotonic() > ends:
                raise RestartError("etcd", problem)
            await asyncio.sleep(_POLL)

    async def _is_healthy(self, component: str) -> bool:
        if component == "kube-apiserver":
            return await self._api.ready()
        if component == "etcd":
            access = find_access(self._root, "/etc/kubernetes/pki")
            return access is not None and await Etcd(self._root, access).healthy()
        return await self._restarter.answers_healthz(component)

    async def verify(self, components: Sequence[str], steps: Steps) -> None:
        """See that everything uses what is on disk. NotServedError."""
        async with steps.step("verify", "what is served, who leads, a request as admin") as step:
            served = await self._await_served()
            await self._await_leaders([c for c in components if c in _READ_AT_START])
            await self._await_answer()
            step.result = f"served: {', '.join(served) or 'nothing here'}; admin.conf works"

    async def _await_answer(self) -> None:
        """admin.conf may name a balancer, behind which another node's server is just going."""
        ends = time.monotonic() + _SERVED_TIMEOUT
        while True:
            try:
                await self._api.get("/api/v1/namespaces/kube-system")
            except (ApiError, AccessError) as error:
                if time.monotonic() > ends:
                    raise NotServedError(f"the new admin.conf does not work: {error}") from None
                await asyncio.sleep(_POLL)
            else:
                return

    async def _await_served(self) -> list[str]:
        files = [f for f in served_files(self._root) if f.component != "kubelet"]
        reader = CertificateReader(self._root, [file.path for file in files])
        ends = time.monotonic() + _SERVED_TIMEOUT
        for file in files:
            while True:
                problem = await asyncio.to_thread(
                    self._difference, reader, file.path, file.endpoint
                )
                if not problem:
                    break
                if time.monotonic() > ends:
                    raise NotServedError(f"{file.component}: {problem}")
                await asyncio.sleep(_POLL)
        return [f"{file.name} on {file.endpoint}" for file in files]

    def _difference(self, reader: CertificateReader, path: str, endpoint: str) -> str:
        leaf = next((c for c in reader.read().certificates if c.path == path), None)
        try:
            served = probe(endpoint).certificate
        except ProbeError as error:
            return str(error)
        if leaf is None:
            return f"{path} can't be read"
        if served.fingerprint == leaf.fingerprint:
            return ""
        return f"{endpoint} serves {served.serial}, {path} is {leaf.serial}"

    async def _await_leaders(self, components: Sequence[str]) -> None:
        """Somebody leads, and says so anew: its credentials work. No clock is compared, for the
        leader may be on another node, with another clock."""
        ends = time.monotonic() + _SERVED_TIMEOUT
        for component in components:
            path = f"/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/{component}"
            first = ""
            while True:
                led = await self._led_at(path)
                if first and led not in ("", first):
                    break
                first = first or led
                if time.monotonic() > ends:
                    raise NotServedError(f"no {component} has led since the renewal")
                await asyncio.sleep(_POLL)

    async def _led_at(self, path: str) -> str:
        """When the leader last said so, by its own clock; empty where that can't be known."""
        try:
            lease = await self._api.get(path)
            return str(lease["spec"]["renewTime"])
        except (ApiError, AccessError, TypeError, KeyError):
            return ""


def newest_write(root: Root, layout: Layout) -> float:
    """When the last of the certificate files was written, Unix seconds."""
    paths = [pair.certificate.path for pair in layout.pairs]
    return max(Path(root.resolve(path)).stat().st_mtime for path in paths)
