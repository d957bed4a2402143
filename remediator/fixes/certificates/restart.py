"""A new process for a static pod's component, and the wait until it's healthy.

The process gets SIGTERM, by pidfd, and the kubelet starts the container anew: the manifest never
leaves its place, so nothing is down if we die here. What the kubelet holds back in its back-off is
waited for, and never ended again.
"""

import asyncio
import os
import select
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp

from exporter.checks.certificates import Root
from exporter.checks.certificates.components import (
    Process,
    find_processes,
    manifest_flags,
    start_ticks,
)

_POLL = 0.5  # seconds
_END_TIMEOUT = 180.0  # seconds to end after SIGTERM: an API server waits 60 s for open watches
_STEADY = 2.0  # seconds for which a component must stay healthy
_HEALTH_PORTS = {"kube-controller-manager": "10257", "kube-scheduler": "10259"}


class RestartError(Exception):
    """A component did not end, or did not come back; the sentence names it."""

    def __init__(self, component: str, message: str) -> None:
        super().__init__(message)
        self.component = component


Healthy = Callable[[str], Awaitable[bool]]
"""Whether a component, by name, is healthy now."""
Find = Callable[[], Awaitable[Process]]
"""Finds a component's process; RestartError while there is none."""


class Restarter:
    """Restarts components of this node, one at a time."""

    def __init__(self, root: Root, procfs: Path, healthy: Healthy, *, timeout: float) -> None:
        """timeout: seconds for a component to come back."""
        self._root = root
        self._procfs = procfs
        self._healthy = healthy
        self._timeout = timeout

    def find(self, component: str) -> Process | None:
        """The first process of its newest container; None while there is none."""
        found = [p for p in find_processes(self._procfs, self._root) if p.component == component]
        first: dict[str, Process] = {}  # of each container: what was executed in it came later
        for process in sorted(found, key=lambda p: p.start_ticks):
            first.setdefault(process.container, process)
        return max(first.values(), key=lambda p: p.start_ticks, default=None)

    async def restart(self, process: Process) -> Process:
        """End this very process, and return the healthy one that follows it. RestartError."""
        await self.end(process)
        return await self.await_healthy(process.component, other_than=process)

    async def end(self, process: Process) -> None:
        """End this very process by SIGTERM. RestartError."""
        try:
            descriptor = os.pidfd_open(process.pid)
        except ProcessLookupError:
            return
        try:
            # The pid may be another's by now; held by the descriptor it can't become one.
            if start_ticks(self._procfs, process.pid) != process.start_ticks:
                return
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            ends = time.monotonic() + _END_TIMEOUT
            ended = select.poll()  # select() itself knows no descriptor above 1023
            ended.register(descriptor, select.POLLIN)
            while not ended.poll(0):
                if time.monotonic() > ends:
                    raise RestartError(
                        process.component,
                        f"{process.component} (pid {process.pid}) did not end within "
                        f"{_END_TIMEOUT:g} s of SIGTERM",
                    )
                await asyncio.sleep(0.1)
        except ProcessLookupError:
            return
        finally:
            os.close(descriptor)

    async def await_healthy(
        self, component: str, *, other_than: Process | None = None, find: Find | None = None
    ) -> Process:
        """Wait until a process (not `other_than`) runs and stays healthy. RestartError.

        find: looks for the process where it is no static pod's.
        """
        ends = time.monotonic() + self._timeout
        steady: tuple[Process, float] | None = None
        while True:
            now = time.monotonic()
            process = await self._look(component, find)
            fresh = process is not None and (other_than is None or process != other_than)
            if process is None or not fresh or not await self._healthy(component):
                steady = None
            elif steady is None or steady[0] != process:
                steady = (process, now)
            elif now - steady[1] >= _STEADY:
                return process
            if now > ends:
                what = "is not healthy" if fresh else "did not come back"
                raise RestartError(component, f"{component} {what} after {self._timeout:g} s")
            await asyncio.sleep(_POLL)

    async def _look(self, component: str, find: Find | None) -> Process | None:
        if find is None:
            return await asyncio.to_thread(self.find, component)
        try:
            return await find()
        except RestartError:  # between two processes there is none
            return None

    async def answers_healthz(self, component: str) -> bool:
        """Whether the controller-manager or the scheduler is healthy, by its own port.

        Where that port is closed a running process is all there is to know.
        """
        flags = manifest_flags(self._root, component)
        port = flags.get("secure-port", _HEALTH_PORTS[component])
        host = flags.get("bind-address", "127.0.0.1")
        if port == "0":
            return True
        if host in ("0.0.0.0", "::"):  # noqa: S104 - what it listens on, not what we do
            host = "127.0.0.1"
        url = f"https://{f'[{host}]' if ':' in host else host}:{port}/healthz"
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
                # It serves a self-signed certificate of its own, and is told nothing.
                session.get(url, ssl=False) as answer,
            ):
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False
