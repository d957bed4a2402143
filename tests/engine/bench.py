"""A worker on real files and a real journal within the test's own process, to fail it on cue."""

import asyncio
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from remediator.config import Config, FixPolicy, Mode, OptOut, Seconds
from remediator.host import own_claim
from remediator.journal import JournalError, Pause
from remediator.journal.sqlite import SqliteJournal
from remediator.model import (
    Claim,
    Condition,
    Decision,
    Fix,
    Outcome,
    Phase,
    Remediation,
    Step,
    Steps,
    Target,
    Verdict,
)
from remediator.windows import Window
from remediator.worker import Worker
from tests.engine.mend_file import MendFile, Settings
from tests.engine.support import NODE, StubClock, request

OTHER = Claim(boot_id="another host", pid=7, start_time=7)
DEAD = Claim(boot_id="an earlier boot", pid=1, start_time=1)
ADMIT = Decision(verdict=Verdict.ADMIT, reason="Admitted", message="yes")
SEEN = Condition(
    broken=True, reason="FileThere", message="it was there", identities=frozenset({"web-1"})
)
RULES = FixPolicy(cooldown=Seconds(0), max_acts=100)


class FailingJournal(SqliteJournal):
    """Fails as often as `failing[method]` says, as on a disk that is full for a while."""

    def __init__(self, path: Path, clock: StubClock) -> None:
        super().__init__(path, clock)
        self.failing: dict[str, int] = {}
        self.tried: dict[str, int] = {}

    def _fail(self, name: str) -> None:
        self.tried[name] = self.tried.get(name, 0) + 1
        left = self.failing.get(name, 0)
        if left:
            self.failing[name] = left - 1
            raise JournalError("no space left on device; make room")

    async def pauses(self) -> list[Pause]:
        self._fail("pauses")
        return await super().pauses()

    async def record_step(self, remediation_id: str, claim: Claim, index: int, step: Step) -> None:
        self._fail("record_step")
        await super().record_step(remediation_id, claim, index, step)

    async def claim(self, *values: Any) -> Remediation:
        claimed = await super().claim(*values)
        self._fail("claim")  # durable, and its caller doesn't know
        return claimed

    async def finish(self, *values: Any, **more: Any) -> Remediation:
        self._fail("finish")
        return await super().finish(*values, **more)

    async def pause(self, *values: Any) -> bool:
        self._fail("pause")
        return await super().pause(*values)


class Bench:
    """One worker, its journal, and the files that its fix mends."""

    def __init__(self, directory: Path, *, policy: FixPolicy = RULES, **settings: Any) -> None:
        self.files = directory / "files"
        self.files.mkdir(parents=True, exist_ok=True)
        self.locks = directory / "locks"
        self.clock = StubClock()
        self.clock.boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self.claim = own_claim(self.clock)
        self.journal = FailingJournal(directory / "remediator.db", self.clock)
        self.policy = policy
        self.opt_out = OptOut()
        self.counted: list[tuple[Phase, str]] = []
        self.fix: MendFile = MendFile(Settings(directory=str(self.files), **settings))

    def worker(self, fix: Fix | None = None, *, dry_run: bool = False) -> Worker:
        return Worker(
            journal=self.journal,
            fixes={"mend-file": fix or self.fix},
            config=lambda: Config(fixes={"mend-file": self.policy}, opt_out=self.opt_out),
            clock=self.clock,
            claim=self.claim,
            lock_directory=self.locks,
            events=self,
            dry_run=dry_run,
        )

    def ended(self, remediation: Remediation) -> None:
        self.counted.append((remediation.phase, remediation.reason))

    async def ask(self, pod: str = "web-1", *, broken: bool = True) -> Remediation:
        """An alert asks; the remediation as the scheduler finds it."""
        if broken:
            (self.files / pod).touch()
        await self.journal.accept([request(pod)], f"r-{pod}-{os.urandom(4).hex()}")
        return next(r for r in await self.due() if r.target.pod == pod)

    async def left(self, *, step: bool, claim: Claim = DEAD, hand: bool = False) -> Remediation:
        """Running, and its owner isn't there; with the step that mends begun, or before it."""
        if hand:
            (self.files / "web-1").touch()
            target = Target(node=NODE, pod="web-1")
            found = await self.journal.begin("mend-file", target, "hand-1", "ada", claim)
        else:
            found = await self.ask()
            await self.journal.admit(found.id, ADMIT)
        await self.journal.claim(found.id, claim, SEEN, None)
        if step:
            begun = Step(
                name="mend", message="", started_at=datetime.now(UTC), data={"pod": "web-1"}
            )
            await self.journal.record_step(found.id, claim, 0, begun)
        return (await self.due())[0]

    async def due(self) -> list[Remediation]:
        return await self.journal.due("mend-file", 100)

    async def now(self, remediation: Remediation) -> Remediation:
        found = await self.journal.get(remediation.id)
        assert found is not None
        return found

    async def end(self, remediation: Remediation) -> tuple[Phase, str]:
        found = await self.now(remediation)
        return found.phase, found.reason

    @property
    def acts(self) -> list[str]:
        return self.fix.acts()


class Gated(MendFile):
    """Has acted, and goes on when the test lets it."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.fix.settings)
        self.gate = asyncio.Event()

    async def apply(self, target: Target, condition: Condition, steps: Steps) -> Outcome:
        async with steps.step("mend", f"remove the file of {target.pod}", pod=target.pod):
            self.act(target)
            await self.gate.wait()
            (self.directory / target.pod).unlink()
        return Outcome(phase=Phase.SUCCEEDED, reason="Mended", message="the file is gone")


async def until(what: Callable[[], object], seconds: float = 30.0) -> None:
    """Poll until it's true."""
    ends = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < ends, "it did not happen in time"
        await asyncio.sleep(0.01)


def approval() -> FixPolicy:
    return FixPolicy(mode=Mode.APPROVAL, cooldown=Seconds(0))


def annotated(bench: Bench) -> None:
    (bench.files / "web-1.opt-out").touch()


def listed(bench: Bench) -> None:
    bench.opt_out = OptOut(nodes=(NODE,))


def mode(mode: Mode) -> Callable[[Bench], None]:
    def change(bench: Bench) -> None:
        bench.policy = FixPolicy(mode=mode, cooldown=Seconds(0))

    return change


def window(bench: Bench) -> None:
    nine = Window(start="09:00", end="10:00")  # it's 03:04
    bench.policy = FixPolicy(maintenance_windows=(nine,), cooldown=Seconds(0))
