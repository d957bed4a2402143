"""Pods on a real cluster that leave zombies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.images import WORKLOAD
from tests.cluster.kubeadm import KubeadmCluster
from tests.cluster.node import Node, NodeError, inner_pid
from tests.cluster.stuck import namespace
from tests.cluster.zombie_makers import READY_FILE, ZombieMaker, descendants


@dataclass(frozen=True)
class ZombiePod:
    """A pod whose container has left its zombies."""

    namespace: str
    name: str
    uid: str
    container: str
    container_id: str
    pid: int
    """The container's PID 1, as the machine counts."""


@contextmanager
def zombie_pod(
    cluster: KubeadmCluster,
    maker: ZombieMaker,
    *,
    name: str = "maker",
    restart_policy: str = "Always",
    annotations: dict[str, str] | None = None,
    timeout: float = 120,
) -> Iterator[ZombiePod]:
    """A pod with one container "main" that runs a maker, in a namespace of its own."""
    probe = {"exec": {"command": ["test", "-e", READY_FILE]}, "periodSeconds": 1}
    container = {
        "name": "main",
        "image": WORKLOAD,
        "command": list(maker.argv),
        "readinessProbe": probe,
    }
    with namespace(cluster) as where:
        metadata = {"name": name, "namespace": where, "annotations": annotations or {}}
        spec = {
            "containers": [container],
            "restartPolicy": restart_policy,
            "terminationGracePeriodSeconds": 1,
        }
        cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        pod: dict[str, Any] = {}

        def ready() -> bool:
            pod.update(cluster.get(f"pod/{name}", f"--namespace={where}"))
            conditions = pod["status"].get("conditions", [])
            return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

        cluster.wait(f"pod {where}/{name} ready", ready, timeout=timeout)
        if maker.executed:
            cluster.kubectl("exec", f"--namespace={where}", name, "--", *maker.executed)
        identity = pod["status"]["containerStatuses"][0]["containerID"].rpartition("/")[2]
        pid = container_init(cluster.nodes[0], identity)

        def made() -> bool:
            return sum(process.is_zombie for process in descendants(pid)) == maker.zombies

        cluster.wait(f"{maker.zombies} zombies in {where}/{name}", made, timeout=timeout)
        yield ZombiePod(where, name, pod["metadata"]["uid"], "main", identity, pid)


def container_init(node: Node, identity: str) -> int:
    """The PID 1 of a node's container, as the machine counts, by the container's id.

    Raises NodeError if there is none.
    """
    for pid in node.pids:
        if inner_pid(pid, 2) == 1 and identity in _cgroup(pid):
            return pid
    raise NodeError(f"{node.name} has no container {identity}")


def _cgroup(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cgroup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
