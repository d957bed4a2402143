"""From the API's JSON to `exporter.checks.objects`, decoding only the fields needed.

msgspec skips what the structs here don't name, so that a pod costs microseconds and a few hundred
bytes instead of the whole object. Fields are those of apps/v1, core/v1 and policy as they have been
from Kubernetes 1.20 to today; newer ones are optional.
"""

import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

import msgspec

from exporter.checks import objects
from exporter.checks.labels import LabelSelector
from exporter.checks.quantity import amount

T = TypeVar("T")


class _Wire(msgspec.Struct, rename="camel", gc=False):
    """Base of the wire structs: camelCase names, and never part of a reference cycle."""


class _Owner(_Wire):
    kind: str
    name: str
    uid: str
    controller: bool = False


class _Meta(_Wire):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    owner_references: list[_Owner] | None = None

    @property
    def owner(self) -> _Owner | None:
        return next((o for o in self.owner_references or () if o.controller), None)

    def annotation(self, key: str) -> str:
        return (self.annotations or {}).get(key, "")


class _Requests(_Wire):
    requests: dict[str, str] | None = None
    limits: dict[str, str] | None = None


class _Port(_Wire):
    host_port: int = 0
    protocol: str = "TCP"
    host_ip: str = msgspec.field(name="hostIP", default="")


class _Container(_Wire):
    resources: _Requests | None = None
    ports: list[_Port] | None = None
    restart_policy: str = ""


class _NodeSelector(_Wire):
    node_selector_terms: tuple[objects.NodeTerm, ...] | None = ()


class _NodeAffinity(_Wire):
    required: _NodeSelector | None = msgspec.field(
        name="requiredDuringSchedulingIgnoredDuringExecution", default=None
    )


class _PodAffinity(_Wire):
    required: tuple[objects.PodTerm, ...] | None = msgspec.field(
        name="requiredDuringSchedulingIgnoredDuringExecution", default=None
    )


class _Affinity(_Wire):
    node_affinity: _NodeAffinity | None = None
    pod_affinity: _PodAffinity | None = None
    pod_anti_affinity: _PodAffinity | None = None


class _Spread(_Wire):
    when_unsatisfiable: str = ""


class _ClaimName(_Wire):
    claim_name: str = ""


class _Volume(_Wire):
    name: str = ""
    persistent_volume_claim: _ClaimName | None = None
    ephemeral: dict[str, msgspec.Raw] | None = None


class _PodSpec(_Wire):
    node_name: str = ""
    scheduler_name: str = "default-scheduler"
    priority: int | None = None
    containers: list[_Container] | None = None
    init_containers: list[_Container] | None = None
    overhead: dict[str, str] | None = None
    resources: _Requests | None = None
    tolerations: tuple[objects.Toleration, ...] | None = None
    node_selector: dict[str, str] | None = None
    affinity: _Affinity | None = None
    topology_spread_constraints: list[_Spread] | None = None
    volumes: list[_Volume] | None = None
    resource_claims: list[msgspec.Raw] | None = None
    scheduling_gates: list[msgspec.Raw] | None = None


class _Condition(_Wire):
    type: str
    status: str
    reason: str = ""
    message: str = ""
    last_transition_time: datetime | None = None

    @property
    def since(self) -> float:
        return self.last_transition_time.timestamp() if self.last_transition_time else 0.0

    def kept(self) -> objects.DeploymentCondition:
        return objects.DeploymentCondition(self.status, self.reason, self.message, self.since)


class _Waiting(_Wire):
    reason: str = ""


class _State(_Wire):
    waiting: _Waiting | None = None


class _ContainerStatus(_Wire):
    restart_count: int = 0
    state: _State | None = None


class _PodStatus(_Wire):
    phase: str = ""
    nominated_node_name: str = ""
    conditions: list[_Condition] | None = None
    container_statuses: list[_ContainerStatus] | None = None
    init_container_statuses: list[_ContainerStatus] | None = None


class _Pod(_Wire):
    metadata: _Meta
    spec: _PodSpec
    status: _PodStatus


class _Template(_Wire):
    metadata: _Meta | None = None
    spec: _PodSpec | None = None


class _ReplicaSetSpec(_Wire):
    replicas: int = 0
    template: _Template | None = None


class _ReplicaSetStatus(_Wire):
    replicas: int = 0
    conditions: list[_Condition] | None = None


class _ReplicaSet(_Wire):
    metadata: _Meta
    spec: _ReplicaSetSpec
    status: _ReplicaSetStatus


class _RollingUpdate(_Wire):
    max_unavailable: int | str = "25%"
    max_surge: int | str = "25%"


class _Strategy(_Wire):
    type: str = "RollingUpdate"
    rolling_update: _RollingUpdate | None = None


class _DeploymentSpec(_Wire):
    replicas: int = 0
    paused: bool = False
    min_ready_seconds: int = 0
    strategy: _Strategy | None = None


class _DeploymentStatus(_Wire):
    observed_generation: int = 0
    replicas: int = 0
    updated_replicas: int = 0
    available_replicas: int = 0
    conditions: list[_Condition] | None = None


class _Deployment(_Wire):
    metadata: _Meta
    spec: _DeploymentSpec
    status: _DeploymentStatus


class _NodeSpec(_Wire):
    unschedulable: bool = False
    taints: tuple[objects.Taint, ...] | None = None


class _NodeStatus(_Wire):
    allocatable: dict[str, str] | None = None


class _Node(_Wire):
    metadata: _Meta
    spec: _NodeSpec
    status: _NodeStatus


class _BudgetSpec(_Wire):
    selector: LabelSelector | None = None


class _BudgetStatus(_Wire):
    disruptions_allowed: int = 0
    observed_generation: int = 0


class _Budget(_Wire):
    metadata: _Meta
    spec: _BudgetSpec
    status: _BudgetStatus


class _QuotaSpec(_Wire):
    scopes: list[str] | None = None
    scope_selector: msgspec.Raw | None = None


class _QuotaStatus(_Wire):
    hard: dict[str, str] | None = None
    used: dict[str, str] | None = None


class _Quota(_Wire):
    metadata: _Meta
    spec: _QuotaSpec
    status: _QuotaStatus


class _Involved(_Wire):
    uid: str = ""


class _Event(_Wire):
    metadata: _Meta
    involved_object: _Involved
    last_timestamp: datetime | None = None
    event_time: datetime | None = None


class Namespace(msgspec.Struct, frozen=True):
    """What the opt-out needs of a Namespace."""

    name: str
    opted_out: bool

    @property
    def key(self) -> str:
        return self.name


class ScaleUp(msgspec.Struct, frozen=True):
    """The cluster autoscaler's word that a node is on its way for a pod."""

    key: str
    pod_uid: str
    at: float


class _Named(_Wire):
    metadata: _Meta


_shapes: WeakValueDictionary[bytes, objects.PodShape] = WeakValueDictionary()
_labels: dict[tuple[tuple[str, str], ...], objects.Labels] = {}
_NO_LABELS: objects.Labels = {}
_pack = msgspec.msgpack.Encoder().encode


def _shared_labels(labels: dict[str, str] | None) -> objects.Labels:
    if not labels:
        return _NO_LABELS
    key = tuple(labels.items())
    known = _labels.get(key)
    if known is None:
        if len(_labels) > 50_000:  # bounded: labels that come and go must not pile up for ever
            _labels.clear()
        known = _labels[key] = labels
    return known


def _add(total: dict[str, int], more: Mapping[str, int]) -> None:
    for resource, units in more.items():
        total[resource] = total.get(resource, 0) + units


def _units(requests: dict[str, str] | None) -> dict[str, int]:
    return {name: amount(name, text) for name, text in (requests or {}).items()}


def effective(spec: _PodSpec, which: str) -> dict[str, int]:
    """What the scheduler reserves (`which` = requests) or a quota counts (limits too).

    Containers and sidecars together, or the highest moment of the init containers; overhead on top.
    """

    def units(resources: _Requests | None) -> dict[str, int]:
        return _units(getattr(resources, which)) if resources else {}

    total: dict[str, int] = {}
    for container in spec.containers or ():
        _add(total, units(container.resources))
    sidecars: dict[str, int] = {}
    highest: dict[str, int] = {}
    for container in spec.init_containers or ():
        own = units(container.resources)
        moment = dict(sidecars)
        _add(moment, own)
        if container.restart_policy == "Always":
            _add(sidecars, own)
            _add(total, own)
        for resource, amount_then in moment.items():
            highest[resource] = max(highest.get(resource, 0), amount_then)
    for resource, amount_then in highest.items():
        total[resource] = max(total.get(resource, 0), amount_then)
    total.update(units(spec.resources))  # pod-level ones (1.34) stand in for the sum
    _add(total, _units(spec.overhead))
    return total


def _unknown(spec: _PodSpec) -> str:
    """What decides on this pod's node beyond what the fit test reads."""
    affinity = spec.affinity
    claims = [v.name for v in spec.volumes or () if v.persistent_volume_claim or v.ephemeral]
    reasons = {
        f"it is placed by the scheduler {spec.scheduler_name!r}": (
            spec.scheduler_name != "default-scheduler"
        ),
        "it has scheduling gates": bool(spec.scheduling_gates),
        "it requires pod affinity": bool(
            affinity and affinity.pod_affinity and affinity.pod_affinity.required
        ),
        "it has a hard topology spread constraint": any(
            spread.when_unsatisfiable != "ScheduleAnyway"
            for spread in spec.topology_spread_constraints or ()
        ),
        f"its volumes {', '.join(claims)} are PersistentVolumeClaims": bool(claims),
        "it uses resource claims": bool(spec.resource_claims),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _shape(spec: _PodSpec) -> objects.PodShape:
    affinity = spec.affinity
    required = affinity.node_affinity.required if affinity and affinity.node_affinity else None
    repels = affinity.pod_anti_affinity.required if affinity and affinity.pod_anti_affinity else ()
    containers = [*(spec.containers or ())]
    containers += [c for c in spec.init_containers or () if c.restart_policy == "Always"]
    shape = objects.PodShape(
        requests=effective(spec, "requests"),
        limits=effective(spec, "limits"),
        host_ports=tuple(
            (port.host_ip, port.protocol, port.host_port)
            for container in containers
            for port in container.ports or ()
            if port.host_port
        ),
        tolerations=spec.tolerations or (),
        node_selector=spec.node_selector or {},
        node_terms=None if required is None else required.node_selector_terms or (),
        repels=repels or (),
        unknown=_unknown(spec),
        priority=spec.priority or 0,
    )
    return _shapes.setdefault(_pack(shape), shape)


def _pod(wire: _Pod) -> objects.Pod:
    meta, status = wire.metadata, wire.status
    unschedulable = scheduled_at = ready_since = None
    for condition in status.conditions or ():
        if condition.type == "PodScheduled":
            if condition.status == "True":
                scheduled_at = condition.since
            elif condition.reason == "Unschedulable" and not wire.spec.node_name:
                unschedulable = objects.Unschedulable(condition.since, condition.message)
        elif condition.type == "Ready" and condition.status == "True":
            ready_since = condition.since
    owner = meta.owner
    statuses = [*(status.init_container_statuses or ()), *(status.container_statuses or ())]
    waiting = next(
        (s.state.waiting.reason for s in statuses if s.state and s.state.waiting is not None), ""
    )
    return objects.Pod(
        namespace=sys.intern(meta.namespace),
        name=meta.name,
        uid=meta.uid,
        resource_version=meta.resource_version,
        labels=_shared_labels(meta.labels),
        shape=_shape(wire.spec),
        owner=sys.intern(owner.uid) if owner else "",
        owner_kind=sys.intern(owner.kind) if owner else "",
        owner_name=sys.intern(owner.name) if owner else "",
        node=sys.intern(wire.spec.node_name),
        nominated=sys.intern(status.nominated_node_name),
        phase=sys.intern(status.phase),
        deletion=meta.deletion_timestamp.timestamp() if meta.deletion_timestamp else None,
        unschedulable=unschedulable,
        scheduled_at=scheduled_at,
        ready_since=ready_since,
        restarts=sum(s.restart_count for s in statuses),
        waiting=sys.intern(waiting),
        deletion_cost=(meta.annotations or {}).get(objects.DELETION_COST),
    )


def _replica_set(wire: _ReplicaSet) -> objects.ReplicaSet:
    meta, owner = wire.metadata, wire.metadata.owner
    failure = next(
        (
            condition.kept()
            for condition in wire.status.conditions or ()
            if condition.type == "ReplicaFailure" and condition.status == "True"
        ),
        None,
    )
    template = wire.spec.template if failure else None
    return objects.ReplicaSet(
        namespace=sys.intern(meta.namespace),
        name=meta.name,
        uid=sys.intern(meta.uid),
        resource_version=meta.resource_version,
        owner=sys.intern(owner.uid) if owner and owner.kind == "Deployment" else "",
        revision=sys.intern(meta.annotation(objects.REVISION)),
        replicas=wire.spec.replicas,
        created=wire.status.replicas,
        failure=failure,
        template=_shape(template.spec) if template and template.spec else None,
        template_labels=(template.metadata.labels or {}) if template and template.metadata else {},
        unstick=meta.annotation(objects.UNSTICK),
        deleting=meta.deletion_timestamp is not None,
    )


def _deployment(wire: _Deployment) -> objects.Deployment:
    meta, spec, status = wire.metadata, wire.spec, wire.status
    strategy = spec.strategy or _Strategy()
    rolling = strategy.rolling_update or _RollingUpdate()
    progressing = next((c for c in status.conditions or () if c.type == "Progressing"), None)
    return objects.Deployment(
        namespace=sys.intern(meta.namespace),
        name=meta.name,
        uid=sys.intern(meta.uid),
        resource_version=meta.resource_version,
        labels=_shared_labels(meta.labels),
        generation=meta.generation,
        observed_generation=status.observed_generation,
        replicas=spec.replicas,
        revision=sys.intern(meta.annotation(objects.REVISION)),
        strategy=strategy.type,
        max_unavailable=rolling.max_unavailable,
        max_surge=rolling.max_surge,
        min_ready=spec.min_ready_seconds,
        paused=spec.paused,
        deleting=meta.deletion_timestamp is not None,
        opted_out=meta.annotation(objects.OPT_OUT) == "disabled",
        updated=status.updated_replicas,
        available=status.available_replicas,
        total=status.replicas,
        # A healthy Deployment's message names its ReplicaSet: nothing anybody looks at here.
        progressing=progressing.kept() if progressing and progressing.status == "False" else None,
    )


def _node(wire: _Node) -> objects.Node:
    return objects.Node(
        name=sys.intern(wire.metadata.name),
        labels=wire.metadata.labels or {},
        allocatable=_units(wire.status.allocatable),
        taints=wire.spec.taints or (),
        unschedulable=wire.spec.unschedulable,
        opted_out=wire.metadata.annotation(objects.OPT_OUT) == "disabled",
    )


def _budget(wire: _Budget) -> objects.DisruptionBudget:
    return objects.DisruptionBudget(
        namespace=wire.metadata.namespace,
        name=wire.metadata.name,
        selector=wire.spec.selector,
        allowed=wire.status.disruptions_allowed,
        current=wire.status.observed_generation >= wire.metadata.generation,
    )


def _quota_units(amounts: dict[str, str] | None) -> dict[str, int]:
    """`requests.cpu` and `limits.cpu` are counted in millicores as `cpu` is."""
    return {
        name: amount(name.removeprefix("requests.").removeprefix("limits."), text)
        for name, text in (amounts or {}).items()
    }


def _quota(wire: _Quota) -> objects.Quota:
    return objects.Quota(
        namespace=wire.metadata.namespace,
        name=wire.metadata.name,
        hard=_quota_units(wire.status.hard),
        used=_quota_units(wire.status.used),
        scoped=bool(wire.spec.scopes) or wire.spec.scope_selector is not None,
    )


def _scale_up(wire: _Event) -> ScaleUp:
    at = wire.last_timestamp or wire.event_time
    key = f"{wire.metadata.namespace}/{wire.metadata.name}"
    return ScaleUp(key, wire.involved_object.uid, at.timestamp() if at else 0.0)


def _namespace(wire: _Named) -> Namespace:
    meta = wire.metadata
    return Namespace(meta.name, meta.annotation(objects.OPT_OUT) == "disabled")


class Kind(Generic[T]):
    """A resource of the API: its name, where it is served, and how one object is read."""

    def __init__(
        self, resource: str, prefix: str, wire: Any, convert: Any, fields: str = ""
    ) -> None:
        self.resource = resource
        self.prefix = prefix
        """`api/v1`, `apis/apps/v1`, …"""
        self.fields = fields
        """The field selector that keeps out what is of no use."""
        self._decode = msgspec.json.Decoder(wire).decode
        self._convert = convert

    def read(self, raw: bytes | msgspec.Raw) -> T:
        """Decode one object; `msgspec.DecodeError` where the JSON isn't such an object."""
        value: T = self._convert(self._decode(raw))
        return value

    def path(self, namespace: str = "", name: str = "") -> str:
        """The URL path of one object, a namespace's, or (both empty) all of them."""
        scope = f"/namespaces/{namespace}" if namespace else ""
        resource, _, part = self.resource.partition("/")
        end = f"/{name}" + (f"/{part}" if part else "") if name else ""
        return f"/{self.prefix}{scope}/{resource}{end}"


_RUNNING = "status.phase!=Succeeded,status.phase!=Failed"

PODS: Kind[objects.Pod] = Kind("pods", "api/v1", _Pod, _pod, _RUNNING)
POD_STATUSES: Kind[objects.Pod] = Kind("pods/status", "api/v1", _Pod, _pod)
NODES: Kind[objects.Node] = Kind("nodes", "api/v1", _Node, _node)
REPLICA_SETS: Kind[objects.ReplicaSet] = Kind(
    "replicasets", "apis/apps/v1", _ReplicaSet, _replica_set
)
DEPLOYMENTS: Kind[objects.Deployment] = Kind(
    "deployments", "apis/apps/v1", _Deployment, _deployment
)
BUDGETS: Kind[objects.DisruptionBudget] = Kind(
    "poddisruptionbudgets", "apis/policy/v1", _Budget, _budget
)
BUDGETS_BEFORE_1_21: Kind[objects.DisruptionBudget] = Kind(
    "poddisruptionbudgets", "apis/policy/v1beta1", _Budget, _budget
)
QUOTAS: Kind[objects.Quota] = Kind("resourcequotas", "api/v1", _Quota, _quota)
SCALE_UPS: Kind[ScaleUp] = Kind("events", "api/v1", _Event, _scale_up, "reason=TriggeredScaleUp")
NAMESPACES: Kind[Namespace] = Kind("namespaces", "api/v1", _Named, _namespace)

__all__ = ["Kind", "Namespace", "ScaleUp", "effective"]
