"""Would the scheduler place this pod on that node? The rules of its filters, over a view.

It answers with the scheduler's own kind of sentence, or None where the pod fits. What it can't
judge (claims, spread constraints, pod affinity, other schedulers) is named by `unjudgeable`, and
then nobody should act on its answers.

Source: kube-scheduler's plug-ins NodeUnschedulable, NodeName, TaintToleration, NodeAffinity,
NodePorts, NodeResourcesFit and InterPodAffinity, v1.20 to v1.36.
"""

from collections.abc import Iterable

from exporter.checks.labels import Requirement
from exporter.checks.objects import Node, Pod, PodShape, PodTerm, Taint, Toleration
from exporter.checks.quantity import display
from exporter.checks.view import ClusterView, Room

_UNSCHEDULABLE = Taint(key="node.kubernetes.io/unschedulable", effect="NoSchedule")


def unjudgeable(view: ClusterView, pod: Pod) -> str:
    """Why the fit test can't speak for this pod, as a phrase; empty where it can."""
    if pod.shape.unknown:
        return pod.shape.unknown
    for term in pod.shape.repels:
        if reason := _unjudgeable_term(term):
            return reason
    for other in view.repelling():
        for term in other.shape.repels:
            if reason := _unjudgeable_term(term):
                return f"pod {other.key} is near, and {reason}"
    return ""


def _unjudgeable_term(term: PodTerm) -> str:
    if term.namespace_selector is not None:
        return "an anti-affinity term selects namespaces by label"
    if term.match_label_keys or term.mismatch_label_keys:
        return "an anti-affinity term uses matchLabelKeys"
    return ""


def has_room(view: ClusterView, pod: Pod) -> Node | None:
    """A node where `pod` fits as things are, or None.

    On a full cluster nearly every node lacks the same resource, which is asked first: this runs
    over every node for every stuck Deployment at each scrape.
    """
    wanted = [(resource, units) for resource, units in pod.shape.requests.items() if units > 0]
    for node in view.nodes.values():
        free = view.room(node).free
        for resource, units in wanted:
            if free.get(resource, 0) < units and pod.nominated != node.name:
                break
        else:
            if why_not(view, pod, node) is None:
                return node
    return None


def why_not(
    view: ClusterView,
    pod: Pod,
    node: Node,
    gone: frozenset[str] = frozenset(),
    placed: int = 0,
) -> str | None:
    """Why `pod` can't be placed on `node` once the pods `gone` (uids) have left; None if it can.

    `placed` pods of the same shape are reckoned as already there. A preemptor's claim on the node
    (`nominated`) counts as taken.
    """
    shape = pod.shape
    if pod.nominated:
        gone |= {pod.uid}  # what is reserved for this very pod is not taken from it
    affected = gone and any(other.uid in gone for other in view.pods_on(node.name))
    room = view.room_without(node, gone) if affected else view.room(node)
    return (
        _taint(shape, node)
        or _affinity(shape, node)
        or _resources(shape, room, placed)
        or _ports(shape, room, placed)
        or _repelled(view, pod, node, gone)
    )


def _taint(shape: PodShape, node: Node) -> str | None:
    taints: Iterable[Taint] = node.taints
    if node.unschedulable:
        taints = (*node.taints, _UNSCHEDULABLE)
    for taint in taints:
        if taint.effect in {"NoSchedule", "NoExecute"} and not any(
            _tolerates(toleration, taint) for toleration in shape.tolerations
        ):
            return f"untolerated taint {taint.key}"
    return None


def _tolerates(toleration: Toleration, taint: Taint) -> bool:
    if toleration.effect and toleration.effect != taint.effect:
        return False
    if toleration.key and toleration.key != taint.key:
        return False
    match toleration.operator or "Equal":
        case "Exists":
            return True
        case "Equal":
            return bool(toleration.key) and toleration.value == taint.value
    return False


def _affinity(shape: PodShape, node: Node) -> str | None:
    if any(node.labels.get(key) != value for key, value in shape.node_selector.items()):
        return "node selector"
    if shape.node_terms is None:
        return None
    fields = {"metadata.name": node.name}
    for term in shape.node_terms:
        expressions: tuple[Requirement, ...] = term.match_expressions
        if not expressions and not term.match_fields:
            continue  # an empty term matches no node
        if all(requirement.matches(node.labels) for requirement in expressions) and all(
            requirement.matches(fields) for requirement in term.match_fields
        ):
            return None
    return "node affinity"


def _resources(shape: PodShape, room: Room, placed: int) -> str | None:
    if room.free["pods"] - placed < 1:
        return "Too many pods"
    short = [
        f"Insufficient {resource} (needs {display(resource, units)},"
        f" {display(resource, max(0, room.free.get(resource, 0) - units * placed))} free)"
        for resource, units in shape.requests.items()
        if units > 0 and units * (placed + 1) > room.free.get(resource, 0)
    ]
    return ", ".join(short) or None


def _ports(shape: PodShape, room: Room, placed: int) -> str | None:
    if placed and shape.host_ports:
        return "host ports taken by its own kind"
    for address, protocol, port in shape.host_ports:
        for other, other_protocol, other_port in room.ports:
            if (protocol, port) == (other_protocol, other_port) and (
                _any(address) or _any(other) or address == other
            ):
                return f"host port {port}/{protocol} taken"
    return None


def _any(address: str) -> bool:
    return address in {"", "0.0.0.0"}  # noqa: S104 (compared, not bound)


def _repelled(view: ClusterView, pod: Pod, node: Node, gone: frozenset[str]) -> str | None:
    for term in pod.shape.repels:
        domain = node.labels.get(term.topology_key)
        if domain is None:
            continue
        for other in view.matched_by(term, pod.namespace):
            if other.uid not in gone and _domain(view, other, term) == domain:
                return f"anti-affinity with pod {other.key}"
    for other in view.repelling():
        if other.uid in gone or not (other.node or other.nominated):
            continue
        for term in other.shape.repels:
            if (
                pod.namespace in (term.namespaces or (other.namespace,))
                and term.label_selector is not None
                and term.label_selector.matches(pod.labels)
                and (domain := node.labels.get(term.topology_key)) is not None
                and _domain(view, other, term) == domain
            ):
                return f"anti-affinity of pod {other.key}"
    return None


def _domain(view: ClusterView, pod: Pod, term: PodTerm) -> str | None:
    node = view.nodes.get(pod.node or pod.nominated)
    return node.labels.get(term.topology_key) if node else None


def over_quota(view: ClusterView, pod: Pod, gone: Iterable[Pod] = ()) -> str | None:
    """Which ResourceQuota would refuse the pod once the pods `gone` have left; None if none."""
    gone = list(gone)
    for quota in view.quotas.values():
        if quota.namespace != pod.namespace:
            continue
        for name, hard in quota.hard.items():
            more = _counted(pod.shape, name)
            freed = sum(_counted(one.shape, name) for one in gone)
            if more and quota.used.get(name, 0) - freed + more > hard:
                return f"quota {quota.name}: {name}"
    return None


def _counted(shape: PodShape, name: str) -> int:
    """How much of a quota's resource `name` a pod uses."""
    if name in {"pods", "count/pods"}:
        return 1
    if name.startswith("limits."):
        return shape.limits.get(name.removeprefix("limits."), 0)
    return shape.requests.get(name.removeprefix("requests."), 0)
