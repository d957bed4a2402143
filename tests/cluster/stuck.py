"""Deployments that are really stuck, on a real API server with the real scheduler and controllers.

Each is in a namespace of its own, and gone with all that was changed for it when the context is
left.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from exporter.checks.quantity import amount
from tests.cluster.api import Api
from tests.cluster.images import WORKLOAD
from tests.cluster.node import NodeError

SERVICE_LABEL = "akash.network/manifest-service"
EXTENDED_RESOURCE = "upkeep.test/gpu"

Object = dict[str, Any]


class Cluster(Protocol):
    """A kubeadm cluster, or a control plane with stand-in nodes."""

    @property
    def api(self) -> Api:
        """A client with the administrator's rights."""
        ...

    def apply(self, *objects: Object) -> None:
        """Create or change objects."""
        ...


@dataclass(frozen=True)
class StuckDeployment:
    """A Deployment that serves with its old pods while its new one can't come."""

    namespace: str
    name: str
    kind: str
    freeable: bool
    """Whether the new pod could run if an old one went."""
    message: str
    """What Kubernetes says of it: of the new pod (Unschedulable), or its ReplicaSet (quota)."""


KINDS: dict[str, str] = {
    "cpu": "Insufficient cpu",
    "memory": "Insufficient memory",
    "extended": f"Insufficient {EXTENDED_RESOURCE}",
    "pods": "Too many pods",
    "quota": "exceeded quota",
    "unsatisfiable": "Insufficient cpu",
}
"""Kind -> what Kubernetes says."""


@contextmanager
def namespace(cluster: Cluster, name: str = "") -> Iterator[str]:
    """A namespace for as long as the context, whose pods have left the node when it's over.

    The namespace itself is left to its controller, which takes up to minutes over it.
    """
    name = name or f"tenant-{secrets.token_hex(3)}"
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    _wait(f"service account of {name}", lambda: bool(_account(cluster, name)))
    try:
        yield name
    finally:
        _wait(f"pods of {name} gone", lambda: _emptied(cluster, name))
        cluster.api.request("DELETE", f"/api/v1/namespaces/{name}")


def _emptied(cluster: Cluster, name: str) -> bool:
    """Delete what makes pods, and pods at once: a kubelet that is asked politely takes 10 s."""
    pods = f"/api/v1/namespaces/{name}/pods"
    for kind in ("deployments", "replicasets"):
        cluster.api.request("DELETE", f"/apis/apps/v1/namespaces/{name}/{kind}")
    cluster.api.request("DELETE", f"{pods}?gracePeriodSeconds=0")
    return not _items(cluster, pods)


@contextmanager
def stuck_deployment(
    cluster: Cluster, kind: str, *, name: str = "web", replicas: int = 1, timeout: float = 120
) -> Iterator[StuckDeployment]:
    """A Deployment that is stuck in the way of `kind` (KINDS), its old pods serving.

    The cluster must have one node that takes ordinary pods: what is asked for follows from what
    that one has left. Raises NodeError if the rollout doesn't get stuck within `timeout` s.
    """
    with ExitStack() as stack:
        where = stack.enter_context(namespace(cluster))
        request = _prepare(cluster, kind, where, replicas, stack)
        old = deployment(where, name, replicas=replicas, requests=request)
        cluster.apply(old)
        _wait(
            f"{replicas} available of {name}",
            lambda: _status(cluster, where, name).get("availableReplicas") == replicas,
            timeout=timeout,
        )
        if kind == "pods":
            stack.enter_context(_filled_with_pods(cluster))
        if kind == "unsatisfiable":
            request = {"cpu": "1000"}
        cluster.apply(
            deployment(where, name, replicas=replicas, requests=request, version="2"),
        )
        said: list[str] = []

        def stuck() -> bool:
            said[:] = [text for text in _complaints(cluster, where, name) if KINDS[kind] in text]
            return bool(said)

        _wait(f"{KINDS[kind]!r} in {where}/{name}", stuck, timeout=timeout)
        freeable = kind != "unsatisfiable"
        yield StuckDeployment(where, name, kind, freeable, said[0])


def deployment(
    where: str,
    name: str,
    *,
    replicas: int = 1,
    requests: dict[str, str] | None = None,
    version: str = "1",
) -> Object:
    """A tenant's Deployment as Akash makes them, that surges by one and never falls short."""
    labels = {"akash.network": "true", SERVICE_LABEL: name}
    resources = {"requests": requests, "limits": _extended(requests)} if requests else {}
    container = {
        "name": "main",
        "image": WORKLOAD,
        "command": ["sleep", "1000000"],
        "env": [{"name": "VERSION", "value": version}],
        "resources": resources,
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": where, "labels": labels},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
            },
            "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [container], "terminationGracePeriodSeconds": 1},
            },
        },
    }


def _extended(requests: dict[str, str]) -> dict[str, str]:
    """Extended resources can't be overcommitted: they need a limit of the same height."""
    return {name: value for name, value in requests.items() if "/" in name}


def _prepare(
    cluster: Cluster, kind: str, where: str, replicas: int, stack: ExitStack
) -> dict[str, str]:
    """What each pod has to request, so that `replicas` of them fit and one more doesn't."""
    room = replicas + 0.5
    if kind == "cpu":
        return {"cpu": f"{int(_free(cluster, 'cpu') / room)}m"}
    if kind == "memory":
        return {"memory": str(int(_free(cluster, "memory") / room))}
    if kind == "extended":
        stack.enter_context(_extended_resource(cluster, replicas))
        return {EXTENDED_RESOURCE: "1"}
    if kind == "quota":
        quota = {"hard": {"requests.cpu": f"{10 * replicas + 5}m"}}
        metadata = {"name": "tenant", "namespace": where}
        cluster.apply(
            {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": quota}
        )
    return {"cpu": "10m"}


def _free(cluster: Cluster, resource: str) -> int:
    """What the one node has left of a resource: millicores or bytes."""
    node = _only_node(cluster)
    free = amount(resource, node["status"]["allocatable"][resource])
    for pod in _pods_on(cluster, node["metadata"]["name"]):
        for container in pod["spec"]["containers"]:
            requests = container.get("resources", {}).get("requests", {})
            free -= amount(resource, requests.get(resource, "0"))
    return free


@contextmanager
def _extended_resource(cluster: Cluster, count: int) -> Iterator[None]:
    """The node has so many of an extended resource, as a device plugin would say."""
    path = f"/api/v1/nodes/{_only_node(cluster)['metadata']['name']}/status"

    def patch(value: str | None) -> None:
        change = {
            "status": {key: {EXTENDED_RESOURCE: value} for key in ("capacity", "allocatable")}
        }
        cluster.api.request("PATCH", path, change, content_type="application/merge-patch+json")

    patch(str(count))
    try:
        yield
    finally:
        patch(None)


@contextmanager
def _filled_with_pods(cluster: Cluster) -> Iterator[None]:
    """The node has as many pods as it may."""
    node = _only_node(cluster)
    taken = len(_pods_on(cluster, node["metadata"]["name"]))
    count = int(node["status"]["allocatable"]["pods"]) - taken
    with namespace(cluster, f"filler-{secrets.token_hex(3)}") as where:
        cluster.apply(deployment(where, "filler", replicas=count))
        _wait(
            f"{count} pods on {node['metadata']['name']}",
            lambda: _status(cluster, where, "filler").get("availableReplicas") == count,
            timeout=300,
        )
        yield


def _only_node(cluster: Cluster) -> Object:
    nodes = _items(cluster, "/api/v1/nodes")
    if len(nodes) != 1:
        raise NodeError(f"made for a cluster of one node, not {len(nodes)}")
    return nodes[0]


def _pods_on(cluster: Cluster, node: str) -> list[Object]:
    pods = _items(cluster, "/api/v1/pods", fields=f"spec.nodeName={node}")
    return [pod for pod in pods if pod["status"].get("phase") not in {"Succeeded", "Failed"}]


def _account(cluster: Cluster, where: str) -> list[Object]:
    return _items(cluster, f"/api/v1/namespaces/{where}/serviceaccounts", name="default")


def _items(cluster: Cluster, path: str, *, name: str = "", fields: str = "") -> list[Object]:
    selector = fields or (f"metadata.name={name}" if name else "")
    query = f"?fieldSelector={selector.replace('=', '%3D')}" if selector else ""
    items: list[Object] = cluster.api.request("GET", path + query)["items"]
    return items


def _status(cluster: Cluster, where: str, name: str) -> Object:
    path = f"/apis/apps/v1/namespaces/{where}/deployments"
    status: Object = next(iter(_items(cluster, path, name=name)))["status"]
    return status


def _complaints(cluster: Cluster, where: str, name: str) -> list[str]:
    """What the conditions of its ReplicaSets and unscheduled pods say."""
    sets = _items(cluster, f"/apis/apps/v1/namespaces/{where}/replicasets")
    pods = _items(cluster, f"/api/v1/namespaces/{where}/pods")
    waiting = [pod for pod in pods if not pod["spec"].get("nodeName")]
    return [
        condition["message"]
        for item in [*sets, *waiting]
        if item["metadata"]["labels"].get(SERVICE_LABEL) == name
        for condition in item["status"].get("conditions", [])
        if condition.get("message")
    ]


def _wait(what: str, condition: Callable[[], bool], *, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise NodeError(f"not seen within {timeout:.0f} s: {what}")
        time.sleep(0.3)
