"""One remediation from request to record: check, decide, claim, check, apply, verify.

Dry run is decided here and nowhere else: a fix is only ever asked to apply when it may. The check
that admits is the check right before acting where both happen within seconds in one process;
otherwise it's made again.
"""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
from structlog.contextvars import bound_contextvars

from exporter.logs import get_logger
from remediator import policy
from remediator.acting import CHECK_DEADLINE, INTERNAL, carry_out, recorder
from remediator.config import Config, Mode
from remediator.host import Clock, owner_alive
from remediator.journal import (
    LONGEST_WAIT,
    ConflictError,
    Instant,
    Journal,
    JournalError,
    Pause,
)
from remediator.model import (
    CheckError,
    Claim,
    Condition,
    Decision,
    Fix,
    Origin,
    Outcome,
    Phase,
    Remediation,
    Steps,
    Verdict,
)
from remediator.turns import Turns

log = get_logger("remediator.worker")

FRESH = 5.0  # seconds a check is good for
_ERROR_RETRY = 5.0  # seconds
MOST_TAKEOVERS = 3  # what was left by a dead process once more may be what kills it

FAILURES = (
    "StillBroken",
    "VerifyFailed",
    "DeadlineExceeded",
    "Interrupted",
    "OwnerDied",
    "DiedRepeatedly",
    "CheckFailed",
    "JournalUnavailable",
    "InternalError",
)
"""Every reason for which the engine itself fails one, beside those of the fixes."""


class Events(Protocol):
    """What the metrics want to hear."""

    def ended(self, remediation: Remediation) -> None:
        """It is durable in a terminal phase."""


class Seen(NamedTuple):
    """What a fix found, when on the boot clock, and which it was: a reload may bring another."""

    condition: Condition
    at: float
    fix: Fix


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
        self._turns = Turns(lock_directory, config)
        self._events = events
        self._dry_run = dry_run
        self._procfs = procfs
        self._deciding = {name: asyncio.Lock() for name in fixes}
        self._acting: set[str] = set()
        self._stopping = False

    def stop(self) -> frozenset[str]:
        """Begin nothing more; the ids of what acts."""
        self._stopping = True
        return frozenset(self._acting)

    async def reconfigured(self) -> None:
        """The configuration is another: there may be more slots."""
        await self._turns.look_again()

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
                if remediation.phase is Phase.RUNNING:  # half-done, so not to be given up
                    await asyncio.sleep(_ERROR_RETRY)
                else:
                    try:
                        await self._end(remediation, Phase.FAILED, "InternalError", INTERNAL)
                    except (ConflictError, JournalError) as error:
                        log.error("its end can't be recorded", why=str(error))

    async def _handle(self, remediation: Remediation) -> None:
        if remediation.claim is not None:
            if not self._owner_alive(remediation):
                await self._take_over(remediation, remediation.claim)
        elif remediation.phase is Phase.ADMITTED:
            await self.execute(remediation)
        else:
            admitted = await self._admit(remediation)
            if admitted is not None:
                await self.execute(*admitted)

    def _owner_alive(self, remediation: Remediation) -> bool:
        """Whether somebody carries it out: a claim of this process's own needs a task here too."""
        claim = remediation.claim
        if claim is not None and claim.same_process(self._claim):
            return remediation.id in self._acting
        return claim is not None and owner_alive(claim, self._clock.boot_id, self._procfs)

    async def _admit(self, remediation: Remediation) -> tuple[Remediation, Seen] | None:
        """Check and decide; None where it goes no further now."""
        if decision := policy.expired(remediation, self._clock.now()):
            await self._end(remediation, Phase.SKIPPED, decision.reason, decision.message)
            return None
        seen = await self._look(remediation)
        if seen is None:
            return None
        condition = seen.condition
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
                    await self._journal.admit(remediation.id, decision, condition.workload)
                    log.info("admitted", reason=decision.reason, message=decision.message)
                    remediation = msgspec.structs.replace(remediation, phase=Phase.ADMITTED)
                return remediation, seen
        await self._deny(remediation, decision, facts)
        return None

    async def _deny(
        self, remediation: Remediation, decision: Decision, facts: policy.Facts
    ) -> None:
        if decision.verdict is Verdict.WAIT and remediation.phase is Phase.RUNNING:
            message = (
                f"Its executor died before the first step; nothing was done. {decision.message}"
            )
            await self._end(remediation, Phase.SKIPPED, "OwnerDied", message)
            return
        if decision.verdict is Verdict.WAIT:
            due_in = LONGEST_WAIT
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

    async def _look(self, remediation: Remediation) -> Seen | None:
        """What forbids a look, then the look itself; None where that ended the remediation."""
        facts = await self._facts(remediation, acts=False)
        if decision := policy.before_check(remediation, facts):
            await self._end(remediation, Phase.SKIPPED, decision.reason, decision.message)
            return None
        fix = self.fixes[remediation.fix]
        bound = asyncio.timeout(CHECK_DEADLINE)
        try:
            async with bound:
                condition = await fix.check(remediation.target)
        except CheckError as error:
            await self._end(remediation, Phase.SKIPPED, "CheckFailed", str(error))
            return None
        except Exception as error:
            message = f"The check did not end within {CHECK_DEADLINE:.0f} s; nothing was done."
            if not (isinstance(error, TimeoutError) and bound.expired()):
                log.exception("the check failed unexpectedly")
                name = type(error).__name__
                message = f"The check failed unexpectedly ({name}); nothing was done."
            await self._end(remediation, Phase.SKIPPED, "CheckFailed", message)
            return None
        return Seen(condition, self._clock.boottime(), fix)

    async def execute(self, remediation: Remediation, seen: Seen | None = None) -> None:
        """Claim and act on an Admitted one."""
        async with (
            self._turns.slot(remediation.fix),
            self._turns.lock(
                remediation.fix, remediation.target, waits=remediation.origin is Origin.ALERT
            ) as locked_by,
        ):
            if locked_by:
                await self._end(remediation, Phase.SKIPPED, "Locked", locked_by)
                return
            if seen is None or self._clock.boottime() - seen.at > FRESH:
                again = await self._admit(remediation)
                if again is None:
                    return
                _, seen = again
            else:
                # Paused, reloaded, or past its window a moment ago. That it counts as one of the
                # acts that are allowed was decided, and stands.
                facts = await self._facts(remediation, acts=False)
                decision = policy.before_check(remediation, facts) or policy.after_check(
                    remediation, seen.condition, facts
                )
                if decision.verdict is not Verdict.ADMIT:
                    await self._deny(remediation, decision, facts)
                    return
            await self._claim_and_act(remediation, seen.fix, seen.condition, None)

    async def _take_over(self, remediation: Remediation, previous: Claim) -> None:
        """Its owner is dead: what it began is resumed or ended in words, never blindly repeated.

        What it only meant to begin is decided anew. All of that comes before the claim: what goes
        wrong in it leaves the remediation a dead owner's, to be taken over later.
        """
        async with (
            self._turns.slot(remediation.fix),
            self._turns.lock(remediation.fix, remediation.target, waits=True),
        ):
            found = await self._journal.get(remediation.id)
            if found is None or found.phase.terminal or found.claim != previous:
                return
            died = f"Its executor (pid {previous.pid}) died"
            fix, condition = self.fixes[found.fix], found.condition
            if previous.takeovers >= MOST_TAKEOVERS:
                await self._end(found, Phase.FAILED, "DiedRepeatedly", _died_often(found, previous))
                return
            if found.steps:
                mode = self._config().fixes[found.fix].mode
                if self._dry_run or mode in (Mode.OFF, Mode.DRY_RUN):
                    message = (
                        f"{died} in step {found.steps[-1].name!r}. This daemon may not act, so it "
                        "was not resumed: look at the target."
                    )
                    await self._end(found, Phase.FAILED, "OwnerDied", message)
                    return
            elif found.origin is Origin.HAND:  # what was asked for is known to who asked alone
                message = f"{died} before the first step; nothing was done. Ask for it again."
                await self._end(found, Phase.SKIPPED, "OwnerDied", message)
                return
            else:
                again = await self._admit(found)
                if again is None:
                    return
                _, (condition, _, fix) = again
            log.warning("taken over", why=died, steps=len(found.steps))
            await self._claim_and_act(found, fix, condition, previous)

    async def _claim_and_act(
        self,
        remediation: Remediation,
        fix: Fix,
        condition: Condition | None,
        previous: Claim | None,
    ) -> None:
        """Apply, or resume where there are earlier steps; verify; record."""
        if self._stopping:  # its turn came too late: the next start takes it up
            return
        self._acting.add(remediation.id)
        try:
            claim = self._claim
            if previous is not None:
                claim = msgspec.structs.replace(claim, takeovers=previous.takeovers + 1)
            mine = await self._journal.claim(remediation.id, claim, condition, previous)
            log.info("running", message=condition.message if condition else "")
            await self._act(mine, claim, fix, condition)
        finally:
            self._acting.discard(remediation.id)

    async def _act(
        self, remediation: Remediation, claim: Claim, fix: Fix, condition: Condition | None
    ) -> None:
        record = recorder(self._journal, remediation.id, claim)
        steps = Steps(record, self._clock.now, remediation.steps)
        try:
            outcome = await carry_out(fix, remediation.target, condition, steps)
        except asyncio.CancelledError:
            message = "It was interrupted while it ran; the fix undid what it could."
            try:
                await asyncio.shield(self._end(remediation, Phase.FAILED, "Interrupted", message))
            except (ConflictError, JournalError) as error:
                log.error("that it was interrupted can't be recorded", why=str(error))
            raise
        await self._end_surely(remediation, outcome)

    async def _end_surely(self, remediation: Remediation, outcome: Outcome) -> None:
        """Record how it came out, however long the journal is away; who lost the claim may not."""
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
        rules = self._config().fixes[remediation.fix]
        pause = None
        if why := policy.pauses_after(remediation, phase, rules):
            pause = Pause(
                fix=remediation.fix,
                since=self._clock.now(),
                by="pause_after_failure",
                why=why,
                reason="PreviousFailed",
            )
        ended = await self._journal.finish(
            remediation.id, phase, reason, message, claim=remediation.claim, pause=pause
        )
        level = log.warning if phase is Phase.FAILED else log.info
        merged = {} if ended.id == remediation.id else {"counted_in": ended.id}
        level("ended", phase=phase.value, reason=reason, message=message, **merged)
        counted = msgspec.structs.replace(ended, phase=phase, reason=reason)
        self._events.ended(counted)
        if pause is not None:
            log.error("paused", by=pause.by, why=pause.why)

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


def _died_often(found: Remediation, previous: Claim) -> str:
    step = f"in step {found.steps[-1].name!r}" if found.steps else "before the first step"
    return (
        f"Its process died {previous.takeovers + 1} times, the last time {step}, so it is not "
        "taken up once more: look at the target, and at the daemon's log for what ends it."
    )
