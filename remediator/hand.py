"""What is asked for on the command line, carried out by the daemon's own worker and journal.

By hand no cooldown, window, approval or pause counts, only opt-outs and the checks. What a timer
asks for is held by all of them, as what an alert asks for is. Either finishes first what a dead
process began: there may be no daemon to do it.
"""

import asyncio
import secrets
import signal
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from remediator.config import Config
from remediator.flags import Flags
from remediator.host import HostClock, own_claim, owner_alive
from remediator.journal.sqlite import SqliteJournal
from remediator.model import Claim, Condition, Fix, Phase, Remediation, Request, Step, Target
from remediator.worker import Worker

if TYPE_CHECKING:  # its module loads what the other fixes never need
    from remediator.fixes.certificates.kept import Listed

_STOPS = (signal.SIGINT, signal.SIGTERM)
_MOST_LEFT = 1000  # remediations that are looked through for what a dead process began


@runtime_checkable
class Forceable(Fix, Protocol):
    """A fix that a person may ask for before its condition is due."""

    async def force(self, target: Target) -> Condition:
        """As `check`, due or not; what forbids acting forbids it all the same."""


class Forced:
    """The same fix, with the look that a person's `--force` asks for."""

    def __init__(self, fix: Forceable) -> None:
        self.name, self.deadline = fix.name, fix.deadline
        self.target_labels, self.reasons = fix.target_labels, fix.reasons
        self.check, self.apply = fix.force, fix.apply
        self.verify, self.resume = fix.verify, fix.resume


@runtime_checkable
class Restorable(Fix, Protocol):
    """A fix that keeps backups of what it changes."""

    def restoring(self, backup: str, *, forced: bool) -> Fix:
        """The fix that puts one of them back."""

    def backups(self) -> "list[Listed]":
        """What there is, newest first."""


class LiveJournal(SqliteJournal):
    """A journal that says each step as soon as it's recorded."""

    def __init__(self, path: Path, clock: HostClock, say: Callable[[str], None]) -> None:
        super().__init__(path, clock)
        self._out = say

    def say(self, line: str) -> None:
        """Tell people; that nobody is there any more is no reason to stop."""
        with suppress(OSError):
            self._out(line)

    async def record_step(self, remediation_id: str, claim: Claim, index: int, step: Step) -> None:
        await super().record_step(remediation_id, claim, index, step)
        if step.ended_at is None:
            self.say(f"{step.started_at:%H:%M:%S}  {step.name}: {step.message}")
        else:
            how = "ok" if step.ok else "failed"
            result = f": {step.result}" if step.result else ""
            self.say(f"{step.ended_at:%H:%M:%S}    {how} after {step.seconds:.1f} s{result}")


class _Ended:
    """Keeps how it ended: the same refusal as last time is counted there and has no record."""

    def __init__(self) -> None:
        self.last: Remediation | None = None

    def ended(self, remediation: Remediation) -> None:
        self.last = remediation


class Hands:
    """Carries out one fix in this process."""

    def __init__(self, flags: Flags, config: Config, fix: Fix, journal: LiveJournal) -> None:
        """fix: as the daemon knows it; what a dead process began is finished with it."""
        self._fix = fix
        self._journal = journal
        self._clock = HostClock()
        self._claim = own_claim(self._clock)
        self._dry_run = flags.dry_run
        self._ended = _Ended()
        self._worker = Worker(
            journal=journal,
            fixes={fix.name: fix},
            config=lambda: config,
            clock=self._clock,
            claim=self._claim,
            lock_directory=flags.lock_directory,
            events=self._ended,
            dry_run=flags.dry_run,
        )

    async def _steadily(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it to its end. A terminal that is lost changes nothing; the first signal to stop makes
        the fix undo what it began, and that is waited for."""
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(work)

        def stop() -> None:
            if task.cancelling():
                self._journal.say("it's being undone already; that ends by itself")
            else:
                self._journal.say("stopping: what was begun is undone first")
                task.cancel()

        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        for number in _STOPS:
            loop.add_signal_handler(number, stop)
        try:
            await task
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
        finally:
            for number in (signal.SIGHUP, *_STOPS):
                loop.remove_signal_handler(number)

    async def finish_left(self, target: Target) -> list[Remediation]:
        """Finish or undo what dead processes began on the target; how each ended."""
        done = []
        for left in await self._journal.due(self._fix.name, _MOST_LEFT):
            if left.target != target or left.claim is None:
                continue
            if not owner_alive(left.claim, self._clock.boot_id):
                await self._steadily(self._worker.handle(left))
                done.append(await self._now(left))
        return done

    async def run(self, target: Target, by: str, fix: Fix | None = None) -> Remediation:
        """Once, now. ConflictError where one is under way. fix: another look of the same fix."""
        self._worker.fixes = {self._fix.name: fix or self._fix}
        name = f"hand-{secrets.token_hex(6)}"
        # A dry run takes nobody's place: it only shows what would be done.
        begun = await self._journal.begin(
            self._fix.name, target, name, by, self._claim, instead=not self._dry_run
        )
        await self._steadily(self._worker.execute(begun))
        found = await self._now(begun)
        if found.phase is Phase.ADMITTED:  # stopped while it looked
            message = "It was stopped before the first step; nothing was done."
            return await self._journal.finish(
                begun.id, Phase.SKIPPED, "Interrupted", message, claim=begun.claim
            )
        return found

    async def ask(self, target: Target) -> Remediation | None:
        """As an alert asks: every guardrail stands. None where no record is kept."""
        request = Request(
            fix=self._fix.name,
            target=target,
            fingerprint="timer",
            alert="timer",
            starts_at=self._clock.now(),
            firing=True,
        )
        await self._journal.accept([request], f"timer-{secrets.token_hex(6)}")
        for due in await self._journal.due(self._fix.name, _MOST_LEFT):
            if due.target == target:
                await self._steadily(self._worker.handle(due))
                return await self._now(due)
        found = await self._journal.find(fix=self._fix.name, target=target.key, limit=1)
        return found[0] if found else None

    async def _now(self, remediation: Remediation) -> Remediation:
        found = await self._journal.get(remediation.id)
        return found or self._ended.last or remediation
