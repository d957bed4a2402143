"""Taking a step back: the old pods again, as they were before it.

Goes round until all is restored or the time is up. Each round looks at the cluster first, so that
it goes on after a crash, a lost answer, or a controller that had other ideas in between.
"""

import time

from exporter.checks.objects import Pod, ReplicaSet
from exporter.kubernetes import ApiError
from remediator.fixes.rollouts.act import Act
from remediator.fixes.rollouts.look import Look, look
from remediator.fixes.rollouts.step import Open, Taken, newest_of
from remediator.fixes.rollouts.writes import LOWEST_COST


async def undo(act: Act, begun: Open, why: str) -> bool:
    """Bring the old pods back; True once they are seen available again."""
    names = ", ".join(f"{taken.name} to {taken.before}" for taken in begun.taken)
    async with act.steps.step("undo", f"Scale back {names}: {why}") as step:
        ends = time.monotonic() + act.settings.undo_timeout
        state = "nothing was seen yet"
        while state and time.monotonic() < ends:
            try:
                state = await _round(act, begun)
            except ApiError as error:
                state = str(error)
            if state:
                await act.sleep(act.settings.poll)
        act.open = None
        step.result = f"not restored: {state}" if state else "the old pods are available again"
        return not state


async def _round(act: Act, begun: Open) -> str:
    """Do what is to be done now; empty when all is restored, else what is still missing."""
    found = await look(act.api, act.target, act.now(), whole=False)
    if found is None or found.deployment.uid != begun.deployment:
        return ""  # deleted with everything it owned: nothing of ours is left to restore
    sets = {one.uid: one for one in found.view.sets_of(found.deployment)}
    newest = newest_of(found)
    ours = newest if newest is not None and newest.uid == begun.newest else None
    if ours is not None:
        # Two reservations for one room would keep both out: the new pod's goes first.
        for pod in found.view.pods_of(ours):
            if pod.nominated and not pod.node:
                await act.writes.reserve(pod, None)
    for pod in found.view.pods.values():
        if pod.deletion_cost == LOWEST_COST and pod.uid in begun.costs:
            await act.writes.set_cost(pod, begun.costs[pod.uid])
    overtaken = begun.overtaken(found.deployment)
    if overtaken and _serving(act, found) >= min(begun.serving, found.deployment.replicas):
        return ""  # spread anew by its controller, and serving: there is nothing to go back to
    missing: list[str] = []
    for taken in begun.taken:
        old = sets.get(taken.uid)
        if old is None:
            return f"ReplicaSet {taken.name} was deleted meanwhile"
        if newest is None or newest.uid != old.uid:  # else: rolled back, and the controller's job
            before = min(taken.before, found.deployment.replicas) if overtaken else taken.before
            missing.append(await _restore(act, begun, found, taken=taken, old=old, before=before))
    missing = [words for words in missing if words]
    if ours is not None and not missing and not overtaken and ours.replicas > begun.newest_replicas:
        # The Deployment controller filled the gap with new pods that now only wait.
        await act.writes.set_replicas(ours, begun.newest_replicas)
    return "; ".join(missing)


def _serving(act: Act, found: Look) -> int:
    """How many pods of every ReplicaSet have been available for as long as a new one must."""
    settle = max(act.settings.settle, float(found.deployment.min_ready))
    pods = [p for one in found.view.sets_of(found.deployment) for p in found.view.pods_of(one)]
    return sum(pod.available(act.now(), settle) for pod in pods)


async def _restore(
    act: Act, begun: Open, found: Look, *, taken: Taken, old: ReplicaSet, before: int
) -> str:
    """Bring one old ReplicaSet back to `before` pods; empty when it is."""
    pods = found.view.pods_of(old)
    if old.replicas < before:
        await act.writes.set_replicas(old, before)
        return f"{taken.name} is being scaled back to {before}"
    available = sum(p.available(act.now(), found.deployment.min_ready) for p in pods)
    if available >= min(taken.available, before):
        return ""
    waiting = [p for p in pods if p.unschedulable and not p.deletion]
    if waiting:
        await _give_room(act, begun, found, waiting)
    return f"{available} of {taken.available} pods of {old.name} available"


async def _give_room(act: Act, begun: Open, found: Look, waiting: list[Pod]) -> None:
    """Reserve the room for the old pods and take it from new ones that hold it unserving."""
    for pod, node in zip(waiting, begun.nodes, strict=False):
        if pod.nominated != node:
            await act.writes.reserve(pod, node)
        else:
            await act.writes.nudge(pod)
    newest = newest_of(found)
    for pod in found.view.pods_of(newest) if newest else ():
        if pod.node and pod.deletion is None and pod.ready_since is None:
            await act.writes.delete(pod)
