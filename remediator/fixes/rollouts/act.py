"""Freeing room for one stuck Deployment, step by step.

One step: note what is about to change, scale one old ReplicaSet down by the least that lets one
new pod run, and wait until that pod has stayed available. `undo` takes a step back.
"""

import contextlib
import time
from collections.abc import Awaitable, Callable

import msgspec

from exporter.checks.freeing import Freeing
from exporter.checks.objects import Pod
from exporter.checks.rollouts import Stuck
from exporter.checks.scheduling import has_room
from exporter.kubernetes import ApiError, Client, decode
from remediator.fixes.rollouts.look import Look, look
from remediator.fixes.rollouts.mark import Mark, annotation, mark_of
from remediator.fixes.rollouts.settings import Settings
from remediator.fixes.rollouts.step import GaveUpError, Open, Taken, newest_of
from remediator.fixes.rollouts.writes import LOWEST_COST, NUDGE_EVERY, Writes
from remediator.model import Steps, Target

_HOPELESS = frozenset(
    {"ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError"}
)
_HOPELESS_AFTER = 30.0  # seconds in such a state; a registry may just hiccup
_MARK_TIMEOUT = 90.0  # seconds to get past conflicts and an API server that restarts
_NO_ROOM_AFTER = 20.0  # seconds the scheduler gets to use the room before anybody looks who did


class Act:
    """The work on one Deployment, from claim to release."""

    def __init__(
        self,
        api: Client,
        target: Target,
        steps: Steps,
        settings: Settings,
        *,
        holder: str,
        now: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self.api, self.target, self.steps, self.settings = api, target, steps, settings
        self.holder, self.now, self.sleep = holder, now, sleep
        self.open: Open | None = None
        """The step under way; whoever is interrupted with one undoes it."""
        self.writes = Writes(api, settings, now=now, sleep=sleep)
        self.overtaken = 0
        """Steps taken back because somebody changed the Deployment meanwhile."""
        self.freed = 0
        """Pods freed so far, each replaced by a new one that came up."""

    # Looking

    async def seen(self, deployment: str, newest: str, *, whole: bool) -> Look:
        """Look again; `GaveUpError` where the Deployment or its newest ReplicaSet changed."""
        found = await look(self.api, self.target, self.now(), whole=whole)
        if found is None or found.deployment.uid != deployment:
            raise GaveUpError("TargetReplaced", f"{self.target} was deleted or recreated meanwhile")
        current = newest_of(found)
        if current is None or current.uid != newest:
            raise GaveUpError("Superseded", f"{self.target} was given another revision meanwhile")
        return found

    # Claim and mark

    async def mark(self, deployment: str, newest: str, change: Callable[[Mark], Mark]) -> bool:
        """Rewrite the mark by compare-and-swap; False where another executor holds it."""
        ends = time.monotonic() + _MARK_TIMEOUT
        while True:
            try:
                found = await self.seen(deployment, newest, whole=False)
                replica_set = newest_of(found)
                assert replica_set is not None  # noqa: S101 - seen() made sure
                mark = mark_of(replica_set)
                if mark.holder not in {"", self.holder} and mark.until > self.now():
                    return False
                await self.api.patch(
                    decode.REPLICA_SETS,
                    replica_set.namespace,
                    replica_set.name,
                    uid=replica_set.uid,
                    resource_version=replica_set.resource_version,
                    change=annotation(change(mark)),
                )
            except ApiError as error:
                if time.monotonic() > ends or (error.status != 409 and not error.temporary):
                    raise
                await self.sleep(self.settings.poll)
                continue
            return True

    async def claim(self, deployment: str, newest: str) -> bool:
        """Take or renew the claim; False where another executor has it."""
        patience = self.settings.come_up_timeout + self.settings.undo_timeout
        until = self.now() + patience
        return await self.mark(
            deployment,
            newest,
            lambda mark: msgspec.structs.replace(mark, holder=self.holder, until=until),
        )

    async def release(self, deployment: str, newest: str, failed: str = "") -> None:
        """Give the claim back and, where acting failed, say so for good."""
        await self.mark(
            deployment,
            newest,
            lambda mark: Mark(mark.replica_set, failed=failed or mark.failed),
        )

    # One step

    async def free(self, found: Look, stuck: Stuck, plan: Freeing) -> None:
        """Scale down what the plan says and wait for the new pod. Leaves `open` set on failure."""
        min_ready, now = stuck.deployment.min_ready, self.now()
        available = {p.uid for p in found.view.pods_of(stuck.newest) if p.available(now, min_ready)}
        begun = Open(
            deployment=stuck.deployment.uid,
            newest=stuck.newest.uid,
            newest_name=stuck.newest.name,
            newest_replicas=stuck.newest.replicas,
            come_up=tuple(sorted(available)),
            taken=tuple(
                Taken(
                    name=take.replica_set.name,
                    uid=take.replica_set.uid,
                    before=take.before,
                    after=take.after,
                    available=sum(
                        p.available(now, min_ready) for p in found.view.pods_of(take.replica_set)
                    ),
                )
                for take in plan.takes
            ),
            nodes=tuple(sorted({p.node for take in plan.takes for p in take.pods if p.node})),
            costs={p.uid: p.deletion_cost for t in plan.takes if t.steered for p in t.pods},
            generation=stuck.deployment.generation,
            serving=plan.available_before,
        )
        data = msgspec.to_builtins(begun)
        async with self.steps.step("free", sentence(plan), **data) as step:
            self.open = begun
            if plan.node and stuck.waiting:
                await self.writes.reserve(stuck.waiting[0], plan.node)
            for take in plan.takes:
                if take.steered:  # those without a node go first anyhow
                    await self._steer([pod for pod in take.pods if pod.node])
                await self.writes.scale(take.replica_set, take.after)
            step.result = "scaled down"
        async with self.steps.step(
            "come-up", f"Wait for a new pod of {begun.newest_name} to be available"
        ) as step:
            step.result = await self.come_up(begun)
        self.open = None
        self.freed += sum(len(take.pods) for take in plan.takes)

    async def _steer(self, pods: list[Pod]) -> None:
        """Make the ReplicaSet controller choose these pods."""
        for pod in pods:
            try:
                await self.writes.set_cost(pod, LOWEST_COST)
            except ApiError as error:
                code = "ChangedMeanwhile" if error.status == 409 else "ApiRefused"
                raise GaveUpError(code, f"pod {pod.name} can't be chosen: {error}") from None

    async def come_up(self, begun: Open) -> str:
        """Wait until a further pod of the newest ReplicaSet stayed available; say which."""
        settings = self.settings
        ends = time.monotonic() + settings.come_up_timeout
        ready_from: dict[tuple[str, int], float] = {}
        hopeless_from = unplaced_from = nudged_at = 0.0
        code, why = "ApiUnavailable", "it was not seen yet"
        while time.monotonic() < ends:
            try:
                found = await self.seen(begun.deployment, begun.newest, whole=False)
            except ApiError as error:
                code, why = "ApiUnavailable", str(error)
                await self.sleep(settings.poll)
                continue
            clock = time.monotonic()
            pods = [p for p in _newest_pods(found) if p.uid not in begun.come_up]
            settle = max(settings.settle, float(found.deployment.min_ready))
            ready = {(p.uid, p.restarts): p for p in pods if p.ready_since and not p.deletion}
            ready_from = {key: ready_from.get(key, clock) for key in ready}
            for key, since in ready_from.items():
                if clock - since >= settle:
                    return f"pod {ready[key].name} is available on {ready[key].node}"
            crashing = [p for p in pods if p.restarts >= settings.most_restarts]
            if crashing:
                raise GaveUpError(
                    "NewPodCrashes",
                    f"the new pod {crashing[0].name} restarted {crashing[0].restarts} times",
                )
            hopeless = [p for p in pods if p.waiting in _HOPELESS]
            hopeless_from = (hopeless_from or clock) if hopeless else 0.0
            if hopeless and clock - hopeless_from >= _HOPELESS_AFTER:
                raise GaveUpError(
                    "NewPodDoesNotStart",
                    f"the new pod {hopeless[0].name} can't start: {hopeless[0].waiting}",
                )
            if not pods and clock - nudged_at >= NUDGE_EVERY:
                # After a refusal by quota the ReplicaSet controller backs off for minutes; an
                # update of its ReplicaSet (here: the renewed claim) makes it try again at once.
                nudged_at = clock
                with contextlib.suppress(ApiError):
                    await self.claim(begun.deployment, begun.newest)
            leaving = any(p.deletion for p in found.view.pods.values() if p.node)
            unplaced = not leaving and not any(p.node for p in pods)
            waiting = [p for p in pods if p.unschedulable and p.deletion is None]
            if unplaced and waiting:
                # Reserving made the scheduler try at once, in vain, and so wait for some seconds.
                await self.writes.nudge(next((p for p in waiting if p.nominated), waiting[0]))
            unplaced_from = (unplaced_from or clock) if unplaced else 0.0
            if unplaced and clock - unplaced_from >= _NO_ROOM_AFTER:
                await self._still_has_room(begun)
                unplaced_from = clock
            # That somebody's change left no room is no fault of the new ReplicaSet; a pod of it
            # that has a node and doesn't become available is.
            changed = begun.overtaken(found.deployment) and not any(p.node for p in pods)
            code = "ChangedMeanwhile" if changed else "NewPodNotAvailable"
            why = _state_of(pods)
            await self.sleep(settings.poll)
        raise GaveUpError(
            code,
            f"no new pod became available within {settings.come_up_timeout:g} s: {why}",
        )

    async def _still_has_room(self, begun: Open) -> None:
        """`GaveUpError` where the new pod no longer fits; a slow scheduler gets more time."""
        with contextlib.suppress(ApiError):
            found = await self.seen(begun.deployment, begun.newest, whole=True)
            waiting = [pod for pod in _newest_pods(found) if pod.unschedulable]
            # Several may wait, and the room is for one.
            if waiting and not any(has_room(found.view, pod) for pod in waiting):
                if begun.overtaken(found.deployment):
                    raise GaveUpError(
                        "ChangedMeanwhile",
                        f"{self.target} was changed meanwhile and the freed room is gone",
                    )
                raise GaveUpError("RoomTaken", "the freed room was taken by another pod")


def _newest_pods(found: Look) -> list[Pod]:
    newest = newest_of(found)
    return found.view.pods_of(newest) if newest else []


def _state_of(pods: list[Pod]) -> str:
    if not pods:
        return "there is none"
    states = []
    for pod in pods:
        if pod.unschedulable:
            states.append(f"{pod.name} waits for a node")
        elif pod.waiting:
            states.append(f"{pod.name}: {pod.waiting}")
        else:
            states.append(f"{pod.name} is {pod.phase or 'unknown'} and not ready long enough")
    return ", ".join(states)


def sentence(plan: Freeing) -> str:
    """What a plan would do, for people."""
    parts = [
        f"Scale ReplicaSet {take.replica_set.name} from {take.before} to {take.after}"
        for take in plan.takes
    ]
    where = f" on {plan.node}" if plan.node else ""
    return (
        f"{' and '.join(parts)}, which makes room for a new pod{where} "
        f"({plan.available_before} pods available, then at least {plan.available_after})"
    )
