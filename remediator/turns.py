"""Whose turn it is: the slots of a fix in this process, and the host's lock beyond it.

The daemon waits for both, for it has time and its queue is the journal. A person at a keyboard is
told instead who holds the lock.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from hashlib import sha256
from pathlib import Path

from exporter.logs import get_logger
from remediator.config import Config
from remediator.host import LockedError, host_lock
from remediator.model import Target

log = get_logger("remediator.worker")

_LOCK_RETRY = 1.0  # seconds


class Turns:
    """One instance a process."""

    def __init__(self, directory: Path, config: Callable[[], Config]) -> None:
        """directory: where the lock files stand, the same for all processes of the host."""
        self._directory = directory
        self._config = config
        self._running: Counter[str] = Counter()
        self._freed = asyncio.Condition()

    @asynccontextmanager
    async def slot(self, fix: str) -> AsyncIterator[None]:
        """One of the fix's `max_concurrent`, as the configuration has it now; waits for it."""
        async with self._freed:
            await self._freed.wait_for(
                lambda: self._running[fix] < self._config().fixes[fix].max_concurrent
            )
            self._running[fix] += 1
        try:
            yield
        finally:
            self._running[fix] -= 1
            async with self._freed:
                self._freed.notify_all()

    async def look_again(self) -> None:
        """There may be more slots than there were."""
        async with self._freed:
            self._freed.notify_all()

    @asynccontextmanager
    async def lock(self, fix: str, target: Target, *, waits: bool) -> AsyncIterator[str]:
        """The host's lock. Yields '', or where it doesn't wait why it isn't held.

        A lock file that can't be made or opened (a full disk, too many open files) is waited for
        like one that another process holds: acting without it is out of the question.
        """
        name = lock_name(fix, target)
        with ExitStack() as held:
            why = ""
            while True:
                try:
                    held.enter_context(host_lock(self._directory, name))
                except LockedError as error:
                    said, log_it = str(error), log.info
                except OSError as error:
                    said = f"no lock file {name} in {self._directory}: {error.strerror}"
                    log_it = log.error
                else:
                    yield ""
                    return
                if not waits:
                    yield said
                    return
                if said != why:
                    log_it("waits for the lock", why=said)
                why = said
                await asyncio.sleep(_LOCK_RETRY)


def lock_name(fix: str, target: Target) -> str:
    """One lock for a node's fix; for smaller targets one of 64, so that files don't pile up."""
    if target.key == f"node/{target.node}":
        return fix
    slot = sha256(target.key.encode()).digest()[0] % 64
    return f"{fix}-{slot:02d}"
