"""Taking a step back: the old pods again, as they were before it.

Goes round until all is restored or the time is up. Each round looks at the cluster first, so that
it goes on after a crash, a lost answer, or a controller that had other ideas in between.
"""

import time

from exporter.checks.objects import Pod, ReplicaSet
from exporter.kubernetes import ApiError
from remediator.fixes.rollouts.act import Act
from remediator.fixes.rollouts.look import Look, look
from remediator.fixes.rollouts.step import Open, Taken, newest_of, noted
from remediator.fixes.rollouts.writes import LOWEST_COST

_RESTORED = "as many pods are available as before"


async def undo(act: Act, begun: Open, why: str) -> bool:
    """Bring the old pods back; True once as many are seen available as before."""
    names = ", ".join(f"{taken.name} to {taken.before}" for taken in begun.taken)
    ends = time.monotonic() + act.settings.undo_timeout

    async def rounds() -> str:
        state = "nothing was seen yet"
        while time.monotonic() < ends:
            try:
                state = await _round(act, begun)
            except ApiError as error:
                state = str(error)
            if not state:
                return _RESTORED
            await act.sleep(act.settings.poll)
        return f"not restored: {state}"

    result = await noted(act.steps, "undo", f"Scale back {names}: {why}", rounds)
    act.open = None
    return result == _RESTORED


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
    # Where somebody changed the Deployment its controller has spread the pods anew, and where the
    # new pod came up after all it isn't taken away. With as many serving nothing is left to undo.
    overtaken = begun.overtaken(found.deployment)
    came_up, serving = _serving(act, begun, found)
    enough = bool(begun.serving) and serving >= min(begun.serving, found.deployment.replicas)
    if enough and (overtaken or came_up):
        return ""
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


def _serving(act: Act, begun: Open, found: Look) -> tuple[int, int]:
    """Pods available for as long as a new one must be: new ones since the step began, and all."""
    settle = max(act.settings.settle, float(found.deployment.min_ready))
    came_up = serving = 0
    for one in found.view.sets_of(found.deployment):
        for pod in found.view.pods_of(one):
            new = one.uid == begun.newest and pod.uid not in begun.come_up
            if pod.available(act.now(), settle) and not (
                new and pod.restarts >= act.settings.most_restarts
            ):
                came_up += new
                serving += 1
    return came_up, serving


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
