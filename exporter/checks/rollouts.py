"""Which Deployments are stuck, since when and why: the condition behind `upkeep_rollout_*`.

Stuck means that the newest ReplicaSet stopped moving and nothing that is already under way
(terminating pods, preemption, a node being added) would move it again. Whether freeing old pods
would help is `exporter.checks.freeing`.
"""

import re
from enum import StrEnum

import msgspec

from exporter.checks.objects import Deployment, Pod, ReplicaSet
from exporter.checks.view import ClusterView

TERMINATION_SLACK = 60.0
"""Seconds past its grace period after which a terminating pod no longer counts as under way."""
SCALE_UP_PATIENCE = 600.0
"""Seconds for which a TriggeredScaleUp event counts as fresh: a node takes minutes to come."""

_INSUFFICIENT = re.compile(r"\bInsufficient ([A-Za-z0-9](?:[-A-Za-z0-9_./]*[A-Za-z0-9])?)")


class Cause(StrEnum):
    """The label `reason` of `upkeep_rollout_stuck_seconds`."""

    INSUFFICIENT_RESOURCES = "InsufficientResources"
    QUOTA_EXCEEDED = "QuotaExceeded"
    OTHER = "Other"


class Stuck(msgspec.Struct, frozen=True):
    """A Deployment whose newest ReplicaSet doesn't move."""

    deployment: Deployment
    newest: ReplicaSet
    cause: Cause
    since: float
    """Unix time of its last movement."""
    message: str
    """What Kubernetes itself says of it."""
    waiting: tuple[Pod, ...] = ()
    """Its pods that no node has room for, by name."""
    old: tuple[ReplicaSet, ...] = ()
    """The Deployment's other ReplicaSets that have pods or want some."""


class Moving(msgspec.Struct, frozen=True):
    """A Deployment that isn't stuck, or not yet."""

    code: str
    """ConditionCleared, Paused, GenerationBehind, NoNewestReplicaSet, Terminating, Nominated,
    ScaleUpTriggered."""
    message: str


def insufficient(message: str) -> tuple[str, ...]:
    """The resources that the scheduler's message calls insufficient, preemption's part left out.

    `0/6 nodes are available: 1 Too many pods, 5 Insufficient cpu. preemption: …` gives
    `("cpu", "pods")`.
    """
    filters = message.split("preemption:", 1)[0]
    found = set(_INSUFFICIENT.findall(filters))
    if "Too many pods" in filters:
        found.add("pods")
    return tuple(sorted(found))


def examine(view: ClusterView, deployment: Deployment, now: float) -> Stuck | Moving:
    """Judge one Deployment by the view. now: Unix time, by the clock the API server keeps."""
    if deployment.paused or deployment.deleting:
        state = "being deleted" if deployment.deleting else "paused"
        return Moving("Paused", f"the Deployment is {state}")
    if deployment.observed_generation < deployment.generation:
        return Moving(
            "GenerationBehind",
            "the Deployment controller has not yet acted on the latest change of the Deployment",
        )
    sets = [one for one in view.sets_of(deployment) if not one.deleting]
    newest = [one for one in sets if one.revision and one.revision == deployment.revision]
    if len(newest) != 1:
        return Moving(
            "NoNewestReplicaSet",
            f"{len(newest)} ReplicaSets carry the Deployment's revision {deployment.revision!r}",
        )
    return _examine_newest(view, deployment, newest[0], sets, now)


def _examine_newest(
    view: ClusterView,
    deployment: Deployment,
    newest: ReplicaSet,
    sets: list[ReplicaSet],
    now: float,
) -> Stuck | Moving:
    pods = view.pods_of(newest)
    waiting = tuple(pod for pod in pods if pod.unschedulable and pod.deletion is None)
    old = tuple(
        one for one in sets if one.uid != newest.uid and (one.replicas or view.pods_of(one))
    )
    if waiting:
        if moving := _under_way(view, sets, waiting, now):
            return moving
        words = next((p.unschedulable.message for p in waiting if p.unschedulable), "")
        began = min(p.unschedulable.since for p in waiting if p.unschedulable)
        placed = max((p.scheduled_at for p in pods if p.scheduled_at), default=0.0)
        cause = Cause.INSUFFICIENT_RESOURCES if insufficient(words) else Cause.OTHER
        return Stuck(deployment, newest, cause, max(began, placed), words, waiting, old)
    failure = newest.failure
    if failure is not None and newest.created < newest.replicas:
        if moving := _under_way(view, sets, (), now):
            return moving
        quota = failure.reason == "FailedCreate" and "exceeded quota" in failure.message
        cause = Cause.QUOTA_EXCEEDED if quota else Cause.OTHER
        return Stuck(deployment, newest, cause, failure.since, failure.message, (), old)
    progressing = deployment.progressing
    if progressing is not None and progressing.reason == "ProgressDeadlineExceeded":
        states = sorted({pod.waiting for pod in pods if pod.waiting})
        words = progressing.message + (f" ({', '.join(states)})" if states else "")
        return Stuck(deployment, newest, Cause.OTHER, progressing.since, words, (), old)
    return Moving("ConditionCleared", "no pod of the newest ReplicaSet waits for room")


def _under_way(
    view: ClusterView, sets: list[ReplicaSet], waiting: tuple[Pod, ...], now: float
) -> Moving | None:
    """What is already happening that may make room."""
    for one in sets:
        for pod in view.pods_of(one):
            if pod.deletion is not None and pod.node and now < pod.deletion + TERMINATION_SLACK:
                return Moving("Terminating", f"pod {pod.name} is still terminating")
    for pod in waiting:
        # Preemption goes on only while its victims end: a nomination alone may be a left-over.
        victims = [p for p in view.pods_on(pod.nominated) if p.deletion is not None]
        if any(now < (p.deletion or 0) + TERMINATION_SLACK for p in victims):
            return Moving(
                "Nominated", f"the scheduler is making room for pod {pod.name} on {pod.nominated}"
            )
        scale_up = view.scale_ups.get(pod.uid)
        if scale_up is not None and now - scale_up < SCALE_UP_PATIENCE:
            return Moving(
                "ScaleUpTriggered", f"the cluster autoscaler is adding a node for pod {pod.name}"
            )
    return None
