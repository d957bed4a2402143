"""The few facts of Kubernetes objects that the rollout check needs, as small frozen values.

A cluster has tens of thousands of pods and most of their JSON is of no use here. What pods of one
ReplicaSet share (their shape, their labels) is one object in memory; `exporter.kubernetes.decode`
makes these values and sees to that.
"""

from collections.abc import Mapping

import msgspec

from exporter.checks.labels import LabelSelector, Requirement

REVISION = "deployment.kubernetes.io/revision"
OPT_OUT = "upkeep.dev/remediation"
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
UNSTICK = "upkeep.dev/unstick-rollout"

Labels = Mapping[str, str]


class Toleration(msgspec.Struct, frozen=True):
    key: str = ""
    operator: str = "Equal"
    value: str = ""
    effect: str = ""


class Taint(msgspec.Struct, frozen=True):
    key: str
    effect: str
    value: str = ""


class NodeTerm(msgspec.Struct, frozen=True, rename="camel"):
    """One alternative of a required node affinity; its requirements hold together."""

    match_expressions: tuple[Requirement, ...] = ()
    match_fields: tuple[Requirement, ...] = ()


class PodTerm(msgspec.Struct, frozen=True, rename="camel"):
    """One term of a required pod anti-affinity."""

    topology_key: str
    label_selector: LabelSelector | None = None
    namespaces: tuple[str, ...] = ()
    namespace_selector: LabelSelector | None = None
    match_label_keys: tuple[str, ...] = ()
    mismatch_label_keys: tuple[str, ...] = ()


class PodShape(msgspec.Struct, frozen=True, weakref=True):
    """What a pod asks of a node; shared by all pods of a template."""

    requests: dict[str, int] = {}
    """Effective requests in the scheduler's units (`exporter.checks.quantity.amount`)."""
    limits: dict[str, int] = {}
    """The same of its limits, which quotas may count too."""
    host_ports: tuple[tuple[str, str, int], ...] = ()
    """(host IP, protocol, port)."""
    tolerations: tuple[Toleration, ...] = ()
    node_selector: dict[str, str] = {}
    node_terms: tuple[NodeTerm, ...] | None = None
    """Required node affinity: any of these; None where there is none."""
    repels: tuple[PodTerm, ...] = ()
    """Required pod anti-affinity."""
    unknown: str = ""
    """What about its placement this program can't judge, as a phrase; empty if nothing."""
    priority: int = 0


class Unschedulable(msgspec.Struct, frozen=True, gc=False):
    """The scheduler's own word that it found no node."""

    since: float
    """Unix time of the condition's last transition."""
    message: str


class Pod(msgspec.Struct, frozen=True, gc=False):
    """A pod that isn't Succeeded or Failed. Times are Unix times."""

    namespace: str
    name: str
    uid: str
    resource_version: str
    labels: Labels
    shape: PodShape
    owner: str = ""
    """The controlling owner's uid."""
    owner_kind: str = ""
    owner_name: str = ""
    node: str = ""
    nominated: str = ""
    """The node on which the scheduler is making room for it by preemption."""
    phase: str = ""
    deletion: float | None = None
    """When its grace period ends, once somebody deleted it."""
    unschedulable: Unschedulable | None = None
    scheduled_at: float | None = None
    ready_since: float | None = None
    restarts: int = 0
    waiting: str = ""
    """Why a container doesn't run: CrashLoopBackOff, ImagePullBackOff, …"""
    deletion_cost: str | None = None

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    def available(self, now: float, min_ready: float) -> bool:
        """Ready for at least `min_ready` seconds, and not on its way out."""
        return (
            self.deletion is None
            and self.ready_since is not None
            and (min_ready <= 0 or now - self.ready_since >= min_ready)
        )


class Node(msgspec.Struct, frozen=True):
    name: str
    labels: Labels
    allocatable: dict[str, int]
    taints: tuple[Taint, ...] = ()
    unschedulable: bool = False
    opted_out: bool = False

    @property
    def key(self) -> str:
        return self.name


class DeploymentCondition(msgspec.Struct, frozen=True):
    status: str
    reason: str
    message: str
    since: float


class Deployment(msgspec.Struct, frozen=True):
    namespace: str
    name: str
    uid: str
    resource_version: str
    labels: Labels
    generation: int
    observed_generation: int
    replicas: int
    revision: str
    strategy: str = "RollingUpdate"
    max_unavailable: int | str = "25%"
    max_surge: int | str = "25%"
    min_ready: int = 0
    paused: bool = False
    deleting: bool = False
    opted_out: bool = False
    updated: int = 0
    """status.updatedReplicas"""
    available: int = 0
    """status.availableReplicas"""
    total: int = 0
    """status.replicas, those of every revision"""
    progressing: DeploymentCondition | None = None

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    def unavailable_allowed(self, of: int) -> int:
        """maxUnavailable in pods, as the Deployment controller resolves it for `of` replicas."""
        allowed = _scaled(self.max_unavailable, of, up=False)
        if allowed == 0 and _scaled(self.max_surge, of, up=True) == 0:
            return 1
        return allowed

    @property
    def complete(self) -> bool:
        """Every replica is of the newest revision and available, none of another is left."""
        return (
            self.observed_generation >= self.generation
            and self.updated == self.replicas == self.total == self.available
        )


def _scaled(value: int | str, replicas: int, *, up: bool) -> int:
    if isinstance(value, int):
        return value
    percent = int(value.removesuffix("%")) * replicas
    return -(-percent // 100) if up else percent // 100


class ReplicaSet(msgspec.Struct, frozen=True):
    namespace: str
    name: str
    uid: str
    resource_version: str
    owner: str
    """The controlling Deployment's uid, or empty."""
    revision: str
    replicas: int
    """spec.replicas"""
    created: int = 0
    """status.replicas: pods that exist"""
    failure: DeploymentCondition | None = None
    """Its ReplicaFailure condition, where that is True."""
    template: PodShape | None = None
    """Kept only while `failure` is there: there is no pod to look at then."""
    template_labels: Labels = {}
    unstick: str = ""
    """The annotation in which the remediator keeps its claim, or that it failed here."""
    deleting: bool = False

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


class DisruptionBudget(msgspec.Struct, frozen=True):
    namespace: str
    name: str
    selector: LabelSelector | None
    allowed: int
    """status.disruptionsAllowed"""
    current: bool = True
    """Whether the status speaks of this generation of the budget."""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


class Quota(msgspec.Struct, frozen=True):
    namespace: str
    name: str
    hard: dict[str, int]
    """Limits in `amount`'s units, by the quota's own names: `pods`, `requests.cpu`, …"""
    used: dict[str, int]
    scoped: bool = False

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"
