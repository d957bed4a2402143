"""The fix `unstick-rollout`: check, free step by step, verify, and what a successor must finish."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping

from exporter.checks.freeing import Freeing, Limits, Refusal, plan_freeing
from exporter.checks.labels import parse_selector
from exporter.checks.objects import OPT_OUT
from exporter.checks.rollouts import Moving, Stuck
from exporter.checks.scheduling import has_room
from exporter.kubernetes import AccessError, ApiError, Client, decode
from exporter.logs import get_logger
from remediator.fixes.rollouts.act import Act, sentence
from remediator.fixes.rollouts.look import Look, look
from remediator.fixes.rollouts.mark import mark_of
from remediator.fixes.rollouts.reasons import FAILED, FINAL, SKIPPED
from remediator.fixes.rollouts.settings import Settings
from remediator.fixes.rollouts.step import (
    GaveUpError,
    Open,
    left_open,
    newest_of,
    noted,
)
from remediator.fixes.rollouts.undo import undo
from remediator.model import (
    CheckError,
    Condition,
    FixError,
    Outcome,
    Phase,
    Steps,
    Target,
    in_words,
)
from remediator.shield import shielded

log = get_logger("remediator.rollouts")

_MOST_OVERTAKEN = 5  # steps taken back because somebody changed the Deployment meanwhile


class UnstickRollout:
    """Frees a stuck Deployment's own old pods, as few at a time as let one new pod run."""

    name = "unstick-rollout"
    target_labels = ("namespace", "deployment")
    reasons: Mapping[Phase, tuple[str, ...]] = {
        Phase.SUCCEEDED: ("RolloutUnstuck",),
        Phase.FAILED: FAILED,
        Phase.SKIPPED: SKIPPED,
    }

    def __init__(
        self,
        settings: Settings,
        connect: Callable[[], Client],
        *,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`connect` makes an API client (`exporter.kubernetes.client`); one is made for each use.

        Raises `exporter.checks.labels.SelectorError` where a selector in the settings is broken.
        """
        self.deadline = settings.deadline
        self._settings = settings
        self._connect = connect
        self._now = now
        self._sleep = sleep
        self._selector = parse_selector(settings.selector)
        self._may_stop = (
            None
            if settings.allow_none_available == "!*"
            else parse_selector(settings.allow_none_available)
        )

    # check and verify

    async def check(self, target: Target) -> Condition:
        try:
            async with self._connect() as api:
                found = await look(api, target, self._now(), whole=True)
        except (ApiError, AccessError) as error:
            raise CheckError(str(error)) from None
        return self._judge(target, found)

    async def verify(self, target: Target, condition: Condition) -> Condition:
        """Healed once the rollout is no longer stuck; a newer revision is another matter."""
        return await self.check(target)

    def _judge(self, target: Target, found: Look | None) -> Condition:
        if found is None:
            return Condition(
                broken=False, reason="ConditionCleared", message=f"there is no {target}"
            )
        stuck = found.stuck
        if isinstance(stuck, Moving):
            return _no(found, stuck.code, f"{target} is not stuck: {stuck.message}")
        age = self._now() - stuck.since
        plan = self._refused(found, stuck, age) or self._plan(found, stuck)
        if isinstance(plan, Refusal):
            return _no(found, plan.code, f"{target} is stuck, but {plan.message}")
        return Condition(
            broken=True,
            reason=stuck.cause.value,
            message=f"{target} has been stuck for {age:.0f} s: {stuck.message}",
            identities=frozenset(pod.uid for pod in stuck.waiting),
            plan=(sentence(plan),),
            opted_out=_opt_out(found),
            workload=f"deployment/{target.namespace}/{target.deployment}",
            detail=stuck,
        )

    def _refused(self, found: Look, stuck: Stuck, age: float) -> Refusal | None:
        """The fix's own limits, apart from those of the plan."""
        settings = self._settings
        if not self._selector.matches(found.deployment.labels):
            return Refusal(
                "NotSelected", f"it doesn't match the fix's selector {settings.selector!r}"
            )
        if failed := mark_of(stuck.newest).failed:
            return Refusal(
                "FailedBefore",
                f"freeing room for ReplicaSet {stuck.newest.name} failed once ({failed}); "
                "it is not tried again until the Deployment has another revision",
            )
        if age < settings.min_stuck:
            return Refusal(
                "BelowActLimit",
                f"only for {age:.0f} s, and nothing is done before {settings.min_stuck:g} s",
            )
        return None

    def _plan(self, found: Look, stuck: Stuck) -> Freeing | Refusal:
        may_stop = self._may_stop is not None and self._may_stop.matches(stuck.deployment.labels)
        limits = Limits(
            extra_unavailable=self._settings.extra_unavailable,
            allow_none_available=may_stop,
            respect_budgets=self._settings.respect_disruption_budgets,
        )
        return plan_freeing(found.view, stuck, limits, self._now())

    # apply

    async def apply(self, target: Target, condition: Condition, steps: Steps) -> Outcome:
        stuck = condition.detail
        if not isinstance(stuck, Stuck):
            raise FixError("ConditionCleared", f"there is no finding to act on for {target}")
        async with self._connect() as api:
            act = self._act(api, target, steps, str(uuid.uuid4()))
            return await self._guarded(act, stuck.deployment.uid, stuck.newest.uid)

    def _act(self, api: Client, target: Target, steps: Steps, holder: str) -> Act:
        return Act(
            api,
            target,
            steps,
            self._settings,
            holder=holder,
            now=self._now,
            sleep=self._sleep,
        )

    async def _guarded(self, act: Act, deployment: str, newest: str) -> Outcome:
        """Drive to the end; whatever breaks in the middle of a step is undone first."""
        try:
            async with act.steps.step(
                "claim",
                "Claim the Deployment's newest ReplicaSet",
                holder=act.holder,
                deployment=deployment,
                newest=newest,
            ):
                if not await act.claim(deployment, newest):
                    return _outcome(
                        Phase.SKIPPED,
                        "AlreadyActing",
                        "another executor is acting on this Deployment",
                    )
            outcome = await self._drive(act, deployment, newest)
        except GaveUpError as stop:
            outcome = await shielded(self._step_back(act, stop.code, str(stop)))
        except ApiError as error:
            code = "ApiUnavailable" if error.temporary else "ApiRefused"
            outcome = await shielded(self._step_back(act, code, str(error)))
        except asyncio.CancelledError:
            await shielded(self._abandon(act, deployment, newest))
            raise
        except Exception as error:  # a journal that is full, or a fault of ours
            log.exception("a fault in the middle")
            outcome = await shielded(
                self._step_back(act, "Interrupted", f"it broke off: {in_words(error)}")
            )
        failed = (
            outcome.message if outcome.phase is Phase.FAILED and outcome.reason in FINAL else ""
        )
        await shielded(self._let_go(act, deployment, newest, failed))
        return outcome

    async def _abandon(self, act: Act, deployment: str, newest: str) -> None:
        """Cancelled: undo and give the claim back in one piece, however often it is repeated."""
        await self._step_back(act, "Interrupted", "the time for the fix was up")
        await self._let_go(act, deployment, newest, "")

    async def _let_go(self, act: Act, deployment: str, newest: str, failed: str) -> None:
        try:
            await act.release(deployment, newest, failed)
        except (GaveUpError, ApiError) as error:
            # The claim ends by itself; that it failed is in the journal.
            result = f"not done: {error}"

            async def said() -> str:
                return result

            await noted(act.steps, "release", "Give the claim back", said)

    async def _step_back(self, act: Act, code: str, why: str) -> Outcome:
        """Undo the open step, if there is one, and say how it ended."""
        begun = act.open
        if begun is None:
            phase = Phase.FAILED if act.freed else Phase.SKIPPED
            if code not in SKIPPED:
                phase = Phase.FAILED
            return _outcome(phase, code, why)
        if await undo(act, begun, why):
            return _outcome(Phase.FAILED, code, f"{why}; as many pods are available as before")
        return _outcome(Phase.FAILED, "NotRestored", f"{why}; the old pods are not all back")

    async def _drive(self, act: Act, deployment: str, newest: str) -> Outcome:
        """Free, wait, and again, until the rollout is complete or can't go on."""
        ends = time.monotonic() + self._settings.come_up_timeout
        while True:
            try:
                found = await act.seen(deployment, newest, whole=False)
                if isinstance(found.stuck, Stuck):  # only then is all of the cluster worth reading
                    found = await act.seen(deployment, newest, whole=True)
            except ApiError as error:
                if not error.temporary or time.monotonic() >= ends:
                    raise
                await self._sleep(self._settings.poll)
                continue
            done = isinstance(found.stuck, Moving) and found.deployment.complete
            if done or (act.freed and _nothing_old(found)):
                return await self._done(act, found)
            if words := _opt_out(found):
                raise GaveUpError("OptedOut", f"nothing further is done: {words}")
            why = await self._next(act, found)
            if not why:
                ends = time.monotonic() + self._settings.come_up_timeout
            elif time.monotonic() >= ends:
                raise GaveUpError("StillStuck", f"the rollout doesn't go on: {why}")
            else:
                await self._sleep(self._settings.poll)

    async def _next(self, act: Act, found: Look) -> str:
        """Take one step if there is one to take; else what the rollout waits for."""
        stuck = found.stuck
        if isinstance(stuck, Moving):
            if stuck.code in {"Paused", "NoNewestReplicaSet"}:
                raise GaveUpError(stuck.code, stuck.message)
            return stuck.message
        plan = self._plan(found, stuck)
        if isinstance(plan, Refusal):
            if not act.freed and plan.code != "FitsNow":
                raise GaveUpError(plan.code, plan.message)
            return plan.message
        if not await act.claim(stuck.deployment.uid, stuck.newest.uid):
            raise GaveUpError("AlreadyActing", "another executor took over this Deployment")
        try:
            await act.free(found, stuck, plan)
        except GaveUpError as stop:
            if stop.code != "ChangedMeanwhile" or act.overtaken >= _MOST_OVERTAKEN:
                raise
            act.overtaken += 1
            if act.open is not None and not await undo(act, act.open, str(stop)):
                raise GaveUpError("NotRestored", f"{stop}; the old pods are not all back") from None
            return str(stop)
        return ""

    async def _done(self, act: Act, found: Look) -> Outcome:
        if not act.freed:
            return _outcome(
                Phase.SKIPPED, "ConditionCleared", "the rollout went on before anything was done"
            )
        deployment, kept = found.deployment, ""
        if self._settings.delete_old_replica_sets and deployment.complete:
            try:
                await self._delete_old(act, found)
            except ApiError as error:  # the rollout is healed all the same
                kept = f"; old ReplicaSets are still there: {error}"
        state = "the rollout is complete"
        if not deployment.complete:
            state = "no old pod is left, and what is not available finds no room beside the others"
        return _outcome(
            Phase.SUCCEEDED,
            "RolloutUnstuck",
            f"{state}: {act.freed} old pods were freed one step at a time, and "
            f"{deployment.available} of {deployment.replicas} pods are available{kept}",
        )

    async def _delete_old(self, act: Act, found: Look) -> None:
        newest = newest_of(found)
        for one in found.view.sets_of(found.deployment):
            if newest is None or one.uid == newest.uid or one.replicas or one.created:
                continue
            async with act.steps.step("delete", f"Delete the empty ReplicaSet {one.name}"):
                await act.api.delete(
                    decode.REPLICA_SETS,
                    one.namespace,
                    one.name,
                    uid=one.uid,
                    resource_version=one.resource_version,
                )

    # resume

    async def resume(self, target: Target, steps: Steps) -> Outcome:
        """Finish or undo what a dead owner left: its last step without an end."""
        left = left_open(steps)
        async with self._connect() as api:
            act = self._act(api, target, steps, left.holder or str(uuid.uuid4()))
            if left.begun is None:
                if left.holder:
                    await self._let_go(act, left.deployment, left.newest, "")
                return _outcome(
                    Phase.FAILED,
                    "Interrupted",
                    "the earlier owner died between two steps; nothing was left half-done",
                )
            act.open = left.begun
            return await self._guarded_resume(act, left.begun)

    async def _guarded_resume(self, act: Act, begun: Open) -> Outcome:
        try:
            async with act.steps.step(
                "come-up", f"Look after the step that an earlier owner left on {begun.newest_name}"
            ) as step:
                step.result = await act.come_up(begun)
            act.open = None
            act.freed = sum(taken.before - taken.after for taken in begun.taken)
            outcome = await self._after_resuming(act, begun)
        except GaveUpError as stop:
            outcome = await shielded(self._step_back(act, stop.code, str(stop)))
        except ApiError as error:
            outcome = await shielded(self._step_back(act, "ApiUnavailable", str(error)))
        except asyncio.CancelledError:
            await shielded(self._abandon(act, begun.deployment, begun.newest))
            raise
        except Exception as error:
            log.exception("a fault in the middle")
            outcome = await shielded(
                self._step_back(act, "Interrupted", f"it broke off: {in_words(error)}")
            )
        failed = outcome.message if outcome.reason in FINAL else ""
        await shielded(self._let_go(act, begun.deployment, begun.newest, failed))
        return outcome

    async def _after_resuming(self, act: Act, begun: Open) -> Outcome:
        """Whether that was all. A further step is for the policy to admit: much may have changed
        since it admitted this one, a pause by a person for one."""
        ends = time.monotonic() + self._settings.come_up_timeout
        while True:
            found = await act.seen(begun.deployment, begun.newest, whole=False)
            if isinstance(found.stuck, Moving) and found.deployment.complete:
                return await self._done(act, found)
            if isinstance(found.stuck, Stuck) or time.monotonic() > ends:
                return _outcome(
                    Phase.FAILED,
                    "Interrupted",
                    "the earlier owner died in the middle of a step; that one is finished, and the "
                    "rollout needs more of them",
                )
            await self._sleep(self._settings.poll)


def _nothing_old(found: Look) -> bool:
    """Whether all that still waits are pods of the newest revision, more than there is room for."""
    stuck = found.stuck
    return (
        isinstance(stuck, Stuck)
        and bool(stuck.waiting)
        and not stuck.old
        and not any(has_room(found.view, pod) for pod in stuck.waiting)
    )


def _opt_out(found: Look) -> str:
    if found.deployment.opted_out:
        return f"the Deployment {found.deployment.key} is annotated {OPT_OUT}=disabled"
    if found.namespace_opted_out:
        return f"the namespace {found.deployment.namespace} is annotated {OPT_OUT}=disabled"
    return ""


def _no(found: Look, reason: str, message: str) -> Condition:
    return Condition(broken=False, reason=reason, message=message, opted_out=_opt_out(found))


def _outcome(phase: Phase, reason: str, message: str) -> Outcome:
    return Outcome(phase=phase, reason=reason, message=message)
