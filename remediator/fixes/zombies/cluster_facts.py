"""Asks the API server for what only it knows of a pod: restart policy, owner, opt-out."""

import asyncio
from collections.abc import Callable, Iterator
from urllib.parse import quote

import msgspec

from exporter.kubernetes.client import AccessError, ApiError, Client
from remediator.fixes.zombies.facts import PodFacts

ANNOTATION = "upkeep.dev/remediation"
_STATIC_POD = "kubernetes.io/config.hash"
_TIMEOUT = 10.0  # seconds for all questions together: a flood doesn't wait
_OWNERS = {  # what controls pods, directly or through another
    "ReplicaSet": "apis/apps/v1/namespaces/{}/replicasets",
    "Deployment": "apis/apps/v1/namespaces/{}/deployments",
    "StatefulSet": "apis/apps/v1/namespaces/{}/statefulsets",
    "DaemonSet": "apis/apps/v1/namespaces/{}/daemonsets",
    "Job": "apis/batch/v1/namespaces/{}/jobs",
}


class _Owner(msgspec.Struct):
    kind: str
    name: str
    controller: bool = False


class _Meta(msgspec.Struct, rename="camel"):
    uid: str = ""
    annotations: dict[str, str] = {}
    owner_references: list[_Owner] = []


class _Spec(msgspec.Struct, rename="camel"):
    restart_policy: str = ""
    node_name: str = ""
    termination_grace_period_seconds: float | None = None


class _Object(msgspec.Struct):
    metadata: _Meta = msgspec.field(default_factory=_Meta)


class _Pod(_Object):
    spec: _Spec = msgspec.field(default_factory=_Spec)


class ClusterFacts:
    """Facts from an API server; where it can't be asked nothing is known, with the reason.

    connect: a new client, as `exporter.kubernetes.client` makes it.
    """

    def __init__(self, connect: Callable[[], Client]) -> None:
        self._connect = connect

    async def pod(self, namespace: str, pod: str, uid: str) -> PodFacts:
        """Facts of exactly this pod; never raises."""
        try:
            async with asyncio.timeout(_TIMEOUT), self._connect() as client:
                return await _ask(client, namespace, pod, uid)
        except TimeoutError:
            return PodFacts(why_unknown=f"the API server did not answer within {_TIMEOUT:g} s")
        except (ApiError, AccessError, OSError, RuntimeError, msgspec.DecodeError) as error:
            # RuntimeError: no thread can be started for a name to be resolved, in a pid famine.
            return PodFacts(why_unknown=str(error))


async def _ask(client: Client, namespace: str, pod: str, uid: str) -> PodFacts:
    async def get(path: str, name: str) -> bytes:
        return await client.send("GET", f"/{path}/{quote(name, safe='')}")

    where = quote(namespace, safe="")
    found = msgspec.json.decode(await get(f"api/v1/namespaces/{where}/pods", pod), type=_Pod)
    if uid not in (found.metadata.uid, found.metadata.annotations.get(_STATIC_POD)):
        why = f"the API server knows another pod {namespace}/{pod} than the one on this node"
        return PodFacts(why_unknown=why)
    refusals = [_refusal(found, f"pod {namespace}/{pod}")]
    for path, name, what in (
        ("api/v1/namespaces", namespace, f"namespace {namespace}"),
        ("api/v1/nodes", found.spec.node_name, f"node {found.spec.node_name}"),
    ):
        above = msgspec.json.decode(await get(path, name), type=_Object)
        refusals.append(_refusal(above, what))
    workload = f"Pod/{namespace}/{pod}"
    owner = next(_controllers(found), None)
    while owner is not None:
        workload = f"{owner.kind}/{namespace}/{owner.name}"
        if owner.kind not in _OWNERS:  # a node (static pods), or a controller of somebody's own
            break
        path = _OWNERS[owner.kind].format(where)
        above = msgspec.json.decode(await get(path, owner.name), type=_Object)
        refusals.append(_refusal(above, f"{owner.kind} {namespace}/{owner.name}"))
        owner = next(_controllers(above), None)
    return PodFacts(
        restart_policy=found.spec.restart_policy,
        workload=workload,
        opted_out=next(filter(None, refusals), ""),
        grace=found.spec.termination_grace_period_seconds,
    )


def _controllers(item: _Object) -> Iterator[_Owner]:
    return (owner for owner in item.metadata.owner_references if owner.controller)


def _refusal(item: _Object, what: str) -> str:
    if item.metadata.annotations.get(ANNOTATION) == "disabled":
        return f"{what} has the annotation {ANNOTATION}: disabled"
    return ""
