"""The cluster as the rollout check sees it: objects by key, with the indexes its questions need.

The exporter keeps one up to date from watches; the remediator fills one from fresh reads each time
it looks. The same check runs on both, so a metric and a decision can't disagree. Not thread-safe:
whoever shares one holds a lock.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TypeVar

import msgspec

from exporter.checks.objects import (
    Deployment,
    DisruptionBudget,
    Node,
    Pod,
    PodTerm,
    Quota,
    ReplicaSet,
)

V = TypeVar("V")


class Room(msgspec.Struct, frozen=True):
    """What the pods of a node leave free, in the scheduler's units (negative if overcommitted)."""

    free: dict[str, int]
    ports: tuple[tuple[str, str, int], ...]
    repelling: tuple[Pod, ...]
    """Pods here whose anti-affinity keeps others away."""


class ClusterView:
    """Deployments, their ReplicaSets and pods, nodes, budgets and quotas, indexed."""

    def __init__(self) -> None:
        self.deployments: dict[str, Deployment] = {}
        self.replica_sets: dict[str, ReplicaSet] = {}
        self.pods: dict[str, Pod] = {}
        self.nodes: dict[str, Node] = {}
        self.budgets: dict[str, DisruptionBudget] = {}
        self.quotas: dict[str, Quota] = {}
        self.scale_ups: dict[str, float] = {}
        """Unix time of the last TriggeredScaleUp event, by pod uid."""
        self.honours_deletion_cost = False
        """Whether the API server is 1.22 or newer."""
        self._sets_of: defaultdict[str, dict[str, ReplicaSet]] = defaultdict(dict)
        self._pods_of: defaultdict[str, dict[str, Pod]] = defaultdict(dict)
        self._pods_on: defaultdict[str, dict[str, Pod]] = defaultdict(dict)
        self._pods_in: defaultdict[str, dict[str, Pod]] = defaultdict(dict)
        self._repelling: dict[str, Pod] = {}
        self._waiting: dict[str, Pod] = {}
        self._failing_sets: dict[str, ReplicaSet] = {}
        self._not_progressing: dict[str, Deployment] = {}
        self._by_uid: dict[str, str] = {}
        self._rooms: dict[str, Room] = {}

    # Writing. A `put` replaces what had the same key; a `drop` of what isn't there does nothing.

    def put_deployment(self, deployment: Deployment) -> None:
        self.drop_deployment(deployment.key)
        self.deployments[deployment.key] = deployment
        self._by_uid[deployment.uid] = deployment.key
        if deployment.progressing is not None:
            self._not_progressing[deployment.key] = deployment

    def drop_deployment(self, key: str) -> None:
        if (old := self.deployments.pop(key, None)) is not None:
            self._by_uid.pop(old.uid, None)
            self._not_progressing.pop(key, None)

    def put_replica_set(self, replica_set: ReplicaSet) -> None:
        self.drop_replica_set(replica_set.key)
        self.replica_sets[replica_set.key] = replica_set
        self._sets_of[replica_set.owner][replica_set.key] = replica_set
        if replica_set.failure is not None:
            self._failing_sets[replica_set.key] = replica_set

    def drop_replica_set(self, key: str) -> None:
        if (old := self.replica_sets.pop(key, None)) is not None:
            _forget(self._sets_of, old.owner, key)
            self._failing_sets.pop(key, None)

    def put_pod(self, pod: Pod) -> None:
        key = pod.key
        self.drop_pod(key)
        self.pods[key] = pod
        self._pods_of[pod.owner][key] = pod
        self._pods_in[pod.namespace][key] = pod
        if place := pod.node or pod.nominated:
            self._pods_on[place][key] = pod
            self._rooms.pop(place, None)
        if pod.shape.repels:
            self._repelling[key] = pod
        if pod.unschedulable is not None:
            self._waiting[key] = pod

    def drop_pod(self, key: str) -> None:
        old = self.pods.pop(key, None)
        if old is None:
            return
        _forget(self._pods_of, old.owner, key)
        _forget(self._pods_in, old.namespace, key)
        if place := old.node or old.nominated:
            _forget(self._pods_on, place, key)
            self._rooms.pop(place, None)
        self._repelling.pop(key, None)
        self._waiting.pop(key, None)

    def put_node(self, node: Node) -> None:
        self.nodes[node.key] = node
        self._rooms.pop(node.key, None)

    def drop_node(self, key: str) -> None:
        self.nodes.pop(key, None)
        self._rooms.pop(key, None)

    def put_budget(self, budget: DisruptionBudget) -> None:
        self.budgets[budget.key] = budget

    def drop_budget(self, key: str) -> None:
        self.budgets.pop(key, None)

    def put_quota(self, quota: Quota) -> None:
        self.quotas[quota.key] = quota

    def drop_quota(self, key: str) -> None:
        self.quotas.pop(key, None)

    def note_scale_up(self, pod_uid: str, at: float) -> None:
        """Keep the freshest: events come in no order."""
        self.scale_ups[pod_uid] = max(at, self.scale_ups.get(pod_uid, 0.0))

    # Reading.

    def suspects(self) -> list[Deployment]:
        """The Deployments that could be stuck: few, however large the cluster is."""
        keys = set(self._not_progressing)
        for pod in self._waiting.values():
            if pod.owner_kind == "ReplicaSet":
                owner = self.replica_sets.get(f"{pod.namespace}/{pod.owner_name}")
                if owner is not None and owner.owner in self._by_uid:
                    keys.add(self._by_uid[owner.owner])
        for replica_set in self._failing_sets.values():
            if replica_set.owner in self._by_uid:
                keys.add(self._by_uid[replica_set.owner])
        return [self.deployments[key] for key in sorted(keys)]

    def waiting(self) -> Iterable[Pod]:
        """Every pod that the scheduler found no node for."""
        return self._waiting.values()

    def sets_of(self, deployment: Deployment) -> list[ReplicaSet]:
        """The ReplicaSets that this very Deployment (by uid) controls."""
        owned = self._sets_of.get(deployment.uid, {})
        return sorted(owned.values(), key=lambda replica_set: replica_set.name)

    def pods_of(self, replica_set: ReplicaSet) -> list[Pod]:
        """The pods that this very ReplicaSet controls, not Succeeded or Failed."""
        return sorted(self._pods_of.get(replica_set.uid, {}).values(), key=lambda pod: pod.name)

    def pods_on(self, node: str) -> Iterable[Pod]:
        """Pods bound to the node, or that the scheduler is making room for there."""
        return self._pods_on.get(node, {}).values()

    def budgets_of(self, pod: Pod) -> Iterator[DisruptionBudget]:
        for budget in self.budgets.values():
            if (
                budget.namespace == pod.namespace
                and budget.selector is not None
                and budget.selector.matches(pod.labels)
            ):
                yield budget

    def repelling(self) -> Iterable[Pod]:
        """Every pod with required anti-affinity."""
        return self._repelling.values()

    def matched_by(self, term: PodTerm, namespace: str) -> Iterator[Pod]:
        """Placed pods that an anti-affinity term of a pod in `namespace` speaks of."""
        for space in term.namespaces or (namespace,):
            for pod in self._pods_in.get(space, {}).values():
                if (
                    (pod.node or pod.nominated)
                    and term.label_selector is not None
                    and term.label_selector.matches(pod.labels)
                ):
                    yield pod

    def room(self, node: Node) -> Room:
        """What is free on the node now; kept until a pod there, or the node, changes."""
        known = self._rooms.get(node.name)
        if known is None:
            known = self._rooms[node.name] = _left(node, list(self.pods_on(node.name)))
        return known

    def room_without(self, node: Node, gone: frozenset[str]) -> Room:
        """What would be free if the pods with the uids `gone` weren't there."""
        leaving = [pod for pod in self.pods_on(node.name) if pod.uid in gone]
        room = self.room(node)
        if any(pod.shape.host_ports or pod.shape.repels for pod in leaving):
            return _left(node, [pod for pod in self.pods_on(node.name) if pod.uid not in gone])
        free = dict(room.free)
        for pod in leaving:
            _count(free, pod, 1)
        return Room(free, room.ports, room.repelling)


def _left(node: Node, pods: list[Pod]) -> Room:
    """What `pods` leave of a node."""
    free = {"pods": 0, **node.allocatable}
    for pod in pods:
        _count(free, pod, -1)
    return Room(
        free,
        tuple(port for pod in pods for port in pod.shape.host_ports),
        tuple(pod for pod in pods if pod.shape.repels),
    )


def _count(free: dict[str, int], pod: Pod, sign: int) -> None:
    for resource, units in pod.shape.requests.items():
        free[resource] = free.get(resource, 0) + sign * units
    free["pods"] += sign


def _forget(index: defaultdict[str, dict[str, V]], bucket: str, key: str) -> None:
    inner = index.get(bucket)
    if inner is not None:
        inner.pop(key, None)
        if not inner:
            del index[bucket]
