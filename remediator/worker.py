"""One remediation from request to record: check, decide, claim, check, apply, verify.

Dry run is decided here and nowhere else: a fix is only ever asked to apply when it may. The check
that admits is the check right before acting where both happen within seconds in one process;
otherwise it's made again.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import msgspec
from structlog.contextvars import bound_contextvars

from exporter.logs import get_logger
from remediator import policy
from remediator.config import Config, Mode
from remediator.host import Clock, LockedError, host_lock, owner_alive
from remediator.journal import ConflictError, Instant, Journal, JournalError
from remediator.model import (
    CheckError,
    Claim,
    Condition,
    Decision,
    Fix,
    FixError,
    Origin,
    Outcome,
    Phase,
    Remediation,
    Step,
    Steps,
    Verdict,
)

log = get_logger("remediator.worker")

CHECK_DEADLINE = 180.0  # seconds; the zombie check looks twice, one age threshold apart
FRESH = 5.0  # seconds a check is good for
_LOCK_RETRY = 1.0
_WAIT_RETRY = 60.0

FAILURES = (
    "StillBroken",
    "VerifyFailed",
    "DeadlineExceeded",
    "Interrupted",
    "OwnerDied",
    "CheckFailed",
    "JournalUnavailable",
    "InternalError",
)
"""Every reason for which the engine itself fails one, beside those of the fixes."""


class Events(Protocol):
    """What the metrics want to hear."""

    def ended(self, remediation: Remediation) -> None:
        """It is durable in a terminal phase."""


class Worker:
    """Carries remediations through; one instance a process."""

    def __init__(
        self,
        *,
        journal: Journal,
        fixes: Mapping[str, Fix],
        config: Callable[[], Config],
        clock: Clock,
        claim: Claim,
        lock_directory: Path,
        events: Events,
        dry_run: bool = False,
        procfs: Path = Path("/proc"),
    ) -> None:
        self.fixes = fixes
        self._journal = journal
        self._config = config
        self._clock = clock
        self._claim = claim
        self._lock_directory = lock_directory
        self._events = events
        self._dry_run = dry_run
        self._procfs = procfs
        self._deciding = {name: asyncio.Lock() for name in fixes}
        self._running: Counter[str] = Counter()
        self._freed = asyncio.Condition()

    async def handle(self, remediation: Remediation) -> None:
        """Carry one active remediation as far as it goes now; never raises but on cancellation."""
        names = {"remediation": remediation.id, "fix": remediation.fix}
        with bound_contextvars(**names, target=remediation.target.key):
            try:
                await self._handle(remediation)
            except ConflictError as error:
                log.info("left to whoever changed it", why=str(error))
            except JournalError as error:
                log.error("the journal can't be used; tried again later", why=str(error))
            except Exception:
                log.exception("unexpected error")
                await self._end(remediation, Phase.FAILED, "InternalError", _INTERNAL)

    async def _handle(self, remediation: Remediation) -> None:
        if remediation.claim is not None:
            if owner_alive(remediation.claim, self._clock.boot_id, self._procfs):
                return
            await self._take_over(remediation, remediation.claim)
        elif remediation.phase is Phase.ADMITTED:
            await self.execute(remediation)
        else:
            admitted = await self._admit(remediation)
            if admitted is not None:
                await self.execute(*admitted)

    async def _admit(self, remediation: Remediation) -> tuple[Remediation, Condition, float] | None:
        """Check and decide; None where it goes no further now."""
        if decision := policy.expired(remediation, self._clock.now()):
            await self._end(remediation, Phase.SKIPPED, decision.reason, decision.message)
            return None
        looked = await self._look(remediation)
        if looked is None:
            return None
        condition, at = looked
        if not condition.broken:  # the common end of a stale alert, without reading more
            await self._end(remediation, Phase.SKIPPED, condition.reason, condition.message)
            return None
        async with self._deciding[remediation.fix]:
            facts = await self._facts(remediation)
            decision = policy.before_check(remediation, facts) or policy.after_check(
                remediation, condition, facts
            )
            if decision.verdict is Verdict.ADMIT:
                if remediation.phase is Phase.PENDING:
                    await self._journal.admit(remediation.id, decision)
                    log.info("admitted", reason=decision.reason, message=decision.message)
                return remediation, condition, at
        await self._deny(remediation, decision, facts)
        return None

    async def _deny(
        self, remediation: Remediation, decision: Decision, facts: policy.Facts
    ) -> None:
        if decision.verdict is Verdict.WAIT:
            due_in = _WAIT_RETRY
            if decision.until is not None:
                left = (decision.until - self._clock.now()).total_seconds()
                due_in = max(0.0, min(due_in, left))
            await self._journal.wait(
                remediation.id, decision, due_in=due_in, expires_in=facts.policy.expires
            )
            if remediation.reason != decision.reason:
                log.info("waits", reason=decision.reason, message=decision.message)
            return
        if decision.reason == "StormBreaker" and facts.pause is None:
            by = "the storm breaker"
            if await self._journal.pause(remediation.fix, by, decision.message, "StormBreaker"):
                log.error("paused", by=by, why=decision.message)
        await self._end(remediation, Phase.SKIPPED, decision.reason, decision.message)

    async def _look(self, remediation: Remediation) -> tuple[Condition, float] | None:
        """What forbids a look, then the look itself; None where that ended the remediation."""
        facts = await self._facts(remediation, acts=False)
        if decision := policy.before_check(remediation, facts):
            await self._end(remediation, Phase.SKIPPED, decision.reason, decision.message)
            return None
        fix = self.fixes[remediation.fix]
        try:
            async with asyncio.timeout(CHECK_DEADLINE):
                condition = await fix.check(remediation.target)
        except CheckError as error:
            await self._end(remediation, Phase.SKIPPED, "CheckFailed", str(error))
            return None
        except TimeoutError:
            message = f"The check did not end within {CHECK_DEADLINE:.0f} s; nothing was done."
            await self._end(remediation, Phase.SKIPPED, "CheckFailed", message)
            return None
        except Exception as error:
            log.exception("the check failed unexpectedly")
            message = f"The check failed unexpectedly ({type(error).__name__}); nothing was done."
            await self._end(remediation, Phase.SKIPPED, "CheckFailed", message)
            return None
        return condition, self._clock.boottime()

    async def execute(
        self, remediation: Remediation, condition: Condition | None = None, at: float = 0.0
    ) -> None:
        """Claim and act on an Admitted one. `at`: when `condition` was seen, on the boot clock."""
        async with self._slot(remediation.fix), self._lock(remediation) as locked:
            if not locked:
                return
            if condition is None or self._clock.boottime() - at > FRESH:
                again = await self._admit(remediation)
                if again is None:
                    return
                _, condition, _ = again
            else:
                facts = await self._facts(remediation, acts=False)
                if decision := policy.before_check(remediation, facts):  # paused a moment ago
                    await self._end(remediation, Phase.SKIPPED, decision.reason, decision.message)
                    return
            running = await self._journal.claim(remediation.id, self._claim, condition, None)
            log.info("running", message=condition.message)
            await self._act(running, condition, ())

    async def _take_over(self, remediation: Remediation, previous: Claim) -> None:
        """Its owner is dead: resume it, or end it in words. Never blindly repeat it."""
        if remediation.phase is not Phase.RUNNING:
            message = "The process that was asked by hand died before it began; nothing was done."
            await self._end(remediation, Phase.SKIPPED, "OwnerDied", message)
            return
        mode = self._config().fixes[remediation.fix].mode
        where = f" in step {remediation.steps[-1].name!r}" if remediation.steps else ""
        died = f"Its executor (pid {previous.pid}) died{where}"
        if self._dry_run or mode in (Mode.OFF, Mode.DRY_RUN):
            message = f"{died}. This daemon may not act, so it was not resumed: look at the target."
            await self._end(remediation, Phase.FAILED, "OwnerDied", message)
            return
        async with self._slot(remediation.fix), self._lock(remediation) as locked:
            if not locked:
                return
            condition = remediation.condition
            mine = await self._journal.claim(remediation.id, self._claim, None, previous)
            log.warning("taken over", why=died, steps=len(mine.steps))
            if not mine.steps:  # nothing was touched yet: as if it had just been admitted
                looked = await self._look(mine)
                if looked is None:
                    return
                if not looked[0].broken:
                    await self._end(mine, Phase.SKIPPED, looked[0].reason, looked[0].message)
                    return
                condition = looked[0]
            await self._act(mine, condition, mine.steps)

    async def _act(
        self, remediation: Remediation, condition: Condition | None, earlier: tuple[Step, ...]
    ) -> None:
        """Apply, or resume where there are earlier steps; verify; record."""

        async def record(index: int, step: Step) -> None:
            await self._journal.record_step(remediation.id, self._claim, index, step)
            if step.ended_at is None:
                log.info("step", number=index, step=step.name, message=step.message)
            else:
                log.info("step ended", number=index, step=step.name, ok=step.ok, result=step.result)

        fix = self.fixes[remediation.fix]
        steps = Steps(record, self._clock.now, earlier)
        try:
            outcome = await self._guarded(fix, remediation, condition, steps)
        except asyncio.CancelledError:
            message = "It was interrupted while it ran; the fix undid what it could."
            await asyncio.shield(self._end(remediation, Phase.FAILED, "Interrupted", message))
            raise
        await self._end_surely(remediation, outcome)

    async def _guarded(  # noqa: PLR0911 - one return a way to end
        self, fix: Fix, remediation: Remediation, condition: Condition | None, steps: Steps
    ) -> Outcome:
        """How apply or resume, and the verification, came out; only cancellation passes on."""
        target = remediation.target
        try:
            async with asyncio.timeout(fix.deadline):
                if steps.earlier or condition is None:
                    outcome = await fix.resume(target, steps)
                else:
                    outcome = await fix.apply(target, condition, steps)
        except FixError as error:
            return _failed(error.reason, str(error))
        except CheckError as error:
            return _failed("CheckFailed", str(error))
        except JournalError as error:
            return _failed("JournalUnavailable", f"A step could not be recorded: {error}")
        except ConflictError as error:
            return _failed("OwnerDied", f"Another process took it over: {error}")
        except TimeoutError:
            return _failed(
                "DeadlineExceeded",
                f"It did not end within {fix.deadline:.0f} s; the fix undid what it could.",
            )
        except Exception:
            log.exception("the fix failed unexpectedly")
            return _failed("InternalError", _INTERNAL)
        if outcome.phase is not Phase.SUCCEEDED or condition is None:
            return outcome
        return await self._verified(fix, remediation, condition, outcome)

    async def _verified(
        self, fix: Fix, remediation: Remediation, condition: Condition, outcome: Outcome
    ) -> Outcome:
        try:
            async with asyncio.timeout(CHECK_DEADLINE):
                after = await fix.verify(remediation.target, condition)
        except CheckError as error:
            return _failed("VerifyFailed", f"{outcome.message} But: {error}")
        except TimeoutError:
            return _failed("VerifyFailed", f"{outcome.message} But the look afterwards hung.")
        except Exception as error:
            log.exception("the verification failed unexpectedly")
            return _failed("VerifyFailed", f"{outcome.message} But: {type(error).__name__}.")
        if after.broken:
            return _failed("StillBroken", f"{outcome.message} But: {after.message}")
        return outcome

    async def _end_surely(self, remediation: Remediation, outcome: Outcome) -> None:
        """Record how it came out, however long the journal is away."""
        delay = 0.5
        while True:
            try:
                await self._end(remediation, outcome.phase, outcome.reason, outcome.message)
            except JournalError as error:
                log.error("how it ended can't be recorded yet", why=str(error))
                await asyncio.sleep(delay)
                delay = min(30.0, delay * 2)
            else:
                return

    async def _end(self, remediation: Remediation, phase: Phase, reason: str, message: str) -> None:
        ended = await self._journal.finish(remediation.id, phase, reason, message)
        level = log.warning if phase is Phase.FAILED else log.info
        merged = {} if ended.id == remediation.id else {"counted_in": ended.id}
        level("ended", phase=phase.value, reason=reason, message=message, **merged)
        counted = msgspec.structs.replace(ended, phase=phase, reason=reason)
        self._events.ended(counted)
        rules = self._config().fixes[remediation.fix]
        if why := policy.pauses_after(remediation, phase, rules):
            by = "pause_after_failure"
            if await self._journal.pause(remediation.fix, by, why, "PreviousFailed"):
                log.error("paused", by=by, why=why)

    async def _facts(self, remediation: Remediation, *, acts: bool = True) -> policy.Facts:
        config = self._config()
        rules = config.fixes[remediation.fix]
        pauses = {pause.fix: pause for pause in await self._journal.pauses()}
        horizon = max(rules.cooldown, rules.window)
        history = await self._journal.acts(remediation.fix, horizon) if acts else []
        now = self._clock.now()
        return policy.Facts(
            policy=rules,
            opt_out=config.opt_out,
            dry_run=self._dry_run,
            now=Instant(
                wall=now.timestamp(),
                boot_id=self._clock.boot_id,
                boottime=self._clock.boottime(),
            ),
            pause=pauses.get(remediation.fix),
            acts=[act for act in history if act.id != remediation.id],
        )

    @asynccontextmanager
    async def _slot(self, fix: str) -> AsyncIterator[None]:
        """One of the fix's `max_concurrent`, as the configuration has it now."""
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

    @asynccontextmanager
    async def _lock(self, remediation: Remediation) -> AsyncIterator[bool]:
        """The host's lock; by hand nobody waits: False, and it's ended in words."""
        name = lock_name(remediation)
        by_hand = remediation.origin is Origin.HAND and remediation.phase is not Phase.RUNNING
        with ExitStack() as held:
            while True:
                try:
                    held.enter_context(host_lock(self._lock_directory, name))
                except LockedError as error:
                    if by_hand:
                        await self._end(remediation, Phase.SKIPPED, "Locked", str(error))
                        yield False
                        return
                    log.info("waits for the lock", why=str(error))
                    await asyncio.sleep(_LOCK_RETRY)
                else:
                    yield True
                    return


_INTERNAL = "An unexpected error ended it; the log has the traceback under this remediation's id."


def _failed(reason: str, message: str) -> Outcome:
    return Outcome(phase=Phase.FAILED, reason=reason, message=message)


def lock_name(remediation: Remediation) -> str:
    """One lock for a node's fix; for smaller targets one of 64, so that files don't pile up."""
    if remediation.target.key == f"node/{remediation.target.node}":
        return remediation.fix
    slot = sha256(remediation.target.key.encode()).digest()[0] % 64
    return f"{remediation.fix}-{slot:02d}"
