"""Lets a fix act: records its steps, bounds its time, and puts into words however it ends."""

import asyncio
from collections.abc import Awaitable, Callable

from exporter.logs import get_logger
from remediator.journal import ConflictError, Journal, JournalError
from remediator.model import (
    CheckError,
    Claim,
    Condition,
    Fix,
    FixError,
    Outcome,
    Phase,
    Step,
    Steps,
    Target,
)

log = get_logger("remediator.worker")

CHECK_DEADLINE = 180.0  # seconds; the zombie check looks twice, one age threshold apart
RECORD_PATIENCE = 30.0  # seconds for which a step that can't be recorded is tried again
_RECORD_RETRY = 0.5

INTERNAL = "An unexpected error ended it; the log has the traceback under this remediation's id."


def recorder(
    journal: Journal, remediation_id: str, claim: Claim
) -> Callable[[int, Step], Awaitable[None]]:
    """Records steps, and holds the fix up for a while where the journal is away.

    A disk that is full for seconds must not break a rotation half-way. Once patience has run
    out each record is tried once: the fix's way back must not wait again at every step.
    """
    given_up_at = 0.0

    async def record(index: int, step: Step) -> None:
        nonlocal given_up_at
        now = asyncio.get_running_loop().time
        while True:
            try:
                await journal.record_step(remediation_id, claim, index, step)
                break
            except JournalError as error:
                if not given_up_at:
                    given_up_at = now() + RECORD_PATIENCE
                    log.error("a step can't be recorded yet", step=step.name, why=str(error))
                if now() >= given_up_at:
                    raise
            await asyncio.sleep(_RECORD_RETRY)
        given_up_at = 0.0
        if step.ended_at is None:
            log.info("step", number=index, step=step.name, message=step.message)
        else:
            log.info("step ended", number=index, step=step.name, ok=step.ok, result=step.result)

    return record


async def carry_out(  # noqa: PLR0911 - one return a way to end
    fix: Fix, target: Target, condition: Condition | None, steps: Steps
) -> Outcome:
    """How apply or resume, and the verification, came out.

    Only cancellation and ConflictError pass on.
    """
    bound = asyncio.timeout(fix.deadline)
    try:
        async with bound:
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
    except ConflictError:  # another process took it over, so its end is that one's to record
        raise
    except Exception as error:
        if isinstance(error, TimeoutError) and bound.expired():
            return _failed(
                "DeadlineExceeded",
                f"It did not end within {fix.deadline:.0f} s; the fix undid what it could.",
            )
        log.exception("the fix failed unexpectedly")
        return _failed("InternalError", INTERNAL)
    if outcome.phase is not Phase.SUCCEEDED or condition is None:
        return outcome
    return await _verified(fix, target, condition, outcome)


async def _verified(fix: Fix, target: Target, condition: Condition, outcome: Outcome) -> Outcome:
    bound = asyncio.timeout(CHECK_DEADLINE)
    try:
        async with bound:
            after = await fix.verify(target, condition)
    except CheckError as error:
        return _failed("VerifyFailed", f"{outcome.message} But: {error}")
    except Exception as error:
        if isinstance(error, TimeoutError) and bound.expired():
            return _failed("VerifyFailed", f"{outcome.message} But: the look afterwards hung.")
        log.exception("the verification failed unexpectedly")
        return _failed("VerifyFailed", f"{outcome.message} But: {type(error).__name__}.")
    if after.broken:
        return _failed("StillBroken", f"{outcome.message} But: {after.message}")
    return outcome


def _failed(reason: str, message: str) -> Outcome:
    return Outcome(phase=Phase.FAILED, reason=reason, message=message)
