"""Records whatever this process does to the world beyond reading it (E14).

Files, processes and signals pass Python's own audit hooks, whichever way they are reached; what no
hook sees (a signal by process descriptor, an API request's method) is recorded where it leaves.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from remediator.config import Config, FixPolicy, Mode, Seconds
from remediator.host import HostClock, own_claim
from remediator.journal.sqlite import SqliteJournal
from remediator.model import Fix, Remediation, Request, Target
from remediator.worker import Worker

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = (
    *("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"),
    *("os.symlink", "os.truncate", "os.utime", "os.setxattr", "os.removexattr"),
    *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"),
    *("os.kill", "os.killpg", "signal.pthread_kill"),
)


class Boundary:
    """What crossed it, in words; `reads` counts the API requests that only ask."""

    def __init__(self) -> None:
        self.recording = False
        self.crossed: list[str] = []
        self.reads = 0
        self._busy = threading.local()

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record what is done within; what was recorded before is forgotten."""
        self.crossed, self.reads, self.recording = [], 0, True
        try:
            yield
        finally:
            self.recording = False

    def audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The hook; it runs in whichever thread does the thing."""
        if not self.recording or getattr(self._busy, "on", False):
            return
        self._busy.on = True
        try:
            if event == "open":
                path, _, flags = arguments
                if flags & _WRITES and path != os.devnull:
                    self.crossed.append(f"open {path}")
            elif event == "subprocess.Popen":
                self.crossed.append(f"run {' '.join(map(str, arguments[1]))}")
            elif event in _CHANGES:
                self.crossed.append(f"{event} {arguments}")
        finally:
            self._busy.on = False

    def send(self, handle: int, number: int) -> None:
        """pidfd_send_signal, for the fix's own edge."""
        self.crossed.append(f"signal {signal.Signals(number).name}")
        signal.pidfd_send_signal(handle, number)

    def api(self, patch: pytest.MonkeyPatch) -> None:
        """Record the methods of HTTP requests."""
        real: Callable[..., Any] = aiohttp.ClientSession._request

        async def request(session: Any, method: str, url: Any, **options: Any) -> Any:
            if self.recording and method.upper() not in ("GET", "HEAD"):
                self.crossed.append(f"{method} {url}")
            elif self.recording:
                self.reads += 1
            return await real(session, method, url, **options)

        patch.setattr(aiohttp.ClientSession, "_request", request)


BOUNDARY = Boundary()
sys.addaudithook(BOUNDARY.audited)  # never to be removed again, so it's one for all tests


class _Unheard:
    def ended(self, remediation: Remediation) -> None:
        pass


async def once(fix: Fix, target: Target, folder: Path, *, mode: Mode) -> Remediation:
    """Carry out one alert through worker and journal; what crosses is in BOUNDARY.

    The journal is made before anything is recorded: it's the remediator's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clock = HostClock()
    journal = SqliteJournal(folder / "remediator.db", clock)
    rules = FixPolicy(mode=mode, cooldown=Seconds(0))
    worker = Worker(
        journal=journal,
        fixes={fix.name: fix},
        config=lambda: Config(fixes={fix.name: rules}),
        clock=clock,
        claim=own_claim(clock),
        lock_directory=folder / "locks",
        events=_Unheard(),
    )
    request = Request(
        fix=fix.name,
        target=target,
        fingerprint="a",
        alert="A",
        starts_at=datetime.now(UTC),
        firing=True,
    )
    try:
        await journal.accept([request], f"r-{mode.value}")
        (asked,) = await journal.due(fix.name, 1)
        with BOUNDARY.record():
            await worker.handle(asked)
        found = await journal.get(asked.id)
        assert found is not None
        return found
    finally:
        await journal.aclose()


def said_and_not_done(found: Remediation, *, asking: str = "-") -> None:
    """It was broken, it says what it would do, and nothing crossed the boundary.

    asking: how the one program that may run ends its command line, for it only tells something.
    """
    assert (found.phase.value, found.reason) == ("Skipped", "DryRun"), found.message
    assert "nothing done. Would: " in found.message
    crossed = [one for one in BOUNDARY.crossed if not one.endswith(asking)]
    assert crossed == [], crossed
