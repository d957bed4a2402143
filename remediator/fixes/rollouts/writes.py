"""The fix's writes: each names the uid and resourceVersion of what was looked at."""

import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

from exporter.checks.objects import DELETION_COST, UNSTICK, Pod, ReplicaSet
from exporter.kubernetes import ApiError, Client, decode
from remediator.fixes.rollouts.settings import Settings
from remediator.fixes.rollouts.step import GaveUpError

LOWEST_COST = "-2147483647"
"""The deletion cost by which a ReplicaSet controller (1.22 and newer) is made to choose a pod."""
_RESERVE_TRIES = 5
NUDGE_EVERY = 3.0  # seconds between two nudges of a controller that backs off


class Writes:
    """Changes to ReplicaSets and pods. `ApiError` where the API server refuses one."""

    def __init__(
        self,
        api: Client,
        settings: Settings,
        *,
        now: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._api, self._settings, self._now, self._sleep = api, settings, now, sleep
        self._nudged: dict[str, float] = {}

    async def set_replicas(self, replica_set: ReplicaSet, replicas: int) -> None:
        """Scale exactly the ReplicaSet that was looked at; 409 where it has changed since."""
        await self._api.patch(
            decode.REPLICA_SETS,
            replica_set.namespace,
            replica_set.name,
            uid=replica_set.uid,
            resource_version=replica_set.resource_version,
            change={"spec": {"replicas": replicas}},
        )

    async def scale(self, replica_set: ReplicaSet, replicas: int) -> None:
        """The same, and an answer that was lost is asked after until it is known.

        Raises `GaveUpError` where somebody else changed the ReplicaSet or the API refuses.
        """
        ends = time.monotonic() + self._settings.come_up_timeout
        current = replica_set
        while True:
            try:
                await self.set_replicas(current, replicas)
            except ApiError as error:
                if error.status == 409 and current is replica_set:
                    raise GaveUpError(
                        "ChangedMeanwhile", f"ReplicaSet {replica_set.name} was changed meanwhile"
                    ) from None
                if error.status != 409 and not error.temporary:
                    raise GaveUpError("ApiRefused", str(error)) from None
            else:
                return
            # The write may be done, lost, or still on its way: look, and if it isn't done send it
            # again with the version just seen, which the one on its way then can't have.
            current = await self._again(replica_set, ends)
            if current.replicas == replicas:
                return

    async def _again(self, replica_set: ReplicaSet, ends: float) -> ReplicaSet:
        """Read a ReplicaSet again, through whatever the API server goes through."""
        while True:
            await self._sleep(self._settings.poll)
            try:
                current = await self._api.get(
                    decode.REPLICA_SETS, replica_set.namespace, replica_set.name
                )
            except ApiError as error:
                if not error.temporary or time.monotonic() > ends:
                    raise GaveUpError("ApiUnavailable", str(error)) from None
                continue
            if current.uid != replica_set.uid or time.monotonic() > ends:
                raise GaveUpError(
                    "ChangedMeanwhile", f"ReplicaSet {replica_set.name} was changed meanwhile"
                )
            return current

    async def reserve(self, pod: Pod, node: str | None) -> None:
        """Have the scheduler keep room on `node` for this waiting pod; None ends that.

        `nominatedNodeName` is what preemption itself sets: pods of the same or a lower priority
        are then not placed into that room. Where it may not be set, the room is open to others.
        """
        current = pod
        for _ in range(_RESERVE_TRIES):
            try:
                await self._api.patch(
                    decode.POD_STATUSES,
                    pod.namespace,
                    pod.name,
                    uid=pod.uid,
                    resource_version=current.resource_version,
                    change={"status": {"nominatedNodeName": node}},
                )
            except ApiError as error:
                if error.status != 409:
                    return
            else:
                return
            # The scheduler writes to a waiting pod each time it tries it.
            with contextlib.suppress(ApiError):
                current = await self._api.get(decode.PODS, pod.namespace, pod.name)
            if current.uid != pod.uid or current.node:
                return

    async def nudge(self, pod: Pod) -> None:
        """Have the scheduler try a waiting pod again.

        After each try in vain it waits longer, up to ten seconds, and where nothing happens that it
        takes for an event (a reservation given back is none) a minute or more. A change of the pod
        itself ends both, on most versions.
        """
        if time.monotonic() - self._nudged.get(pod.uid, 0.0) < NUDGE_EVERY:
            return
        self._nudged[pod.uid] = time.monotonic()
        with contextlib.suppress(ApiError):
            await self._annotate(pod, {UNSTICK: f"{self._now():.0f}"})

    async def set_cost(self, pod: Pod, cost: str | None) -> None:
        """Set or remove a pod's deletion cost."""
        await self._annotate(pod, {DELETION_COST: cost})

    async def delete(self, pod: Pod) -> None:
        """Delete exactly the pod that was looked at."""
        await self._api.delete(
            decode.PODS,
            pod.namespace,
            pod.name,
            uid=pod.uid,
            resource_version=pod.resource_version,
        )

    async def _annotate(self, pod: Pod, annotations: dict[str, Any]) -> None:
        await self._api.patch(
            decode.PODS,
            pod.namespace,
            pod.name,
            uid=pod.uid,
            resource_version=pod.resource_version,
            change={"metadata": {"annotations": annotations}},
        )
