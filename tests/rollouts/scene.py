"""A corner of a real cluster for one test: a namespace, nodes of its own, and Deployments on them.

Pods are tied to the test's nodes by a node selector, so that tests share one control plane without
meeting. Everything above the kubelet is real.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from exporter.kubernetes import Client, client
from remediator.fixes.rollouts import Settings, UnstickRollout
from remediator.model import Condition, Outcome, Step, Steps, Target
from tests.cluster.control_plane import ControlPlane
from tests.cluster.hollow import BEHAVIOUR, TERMINATION, HollowNodes

T = TypeVar("T")

PATIENCE = 120.0  # seconds; the machine may be busy
SERVICE = "akash.network/manifest-service"
MERGE = "application/merge-patch+json"
_numbers = itertools.count(1)


def wait_for(what: str, probe: Callable[[], T | None], seconds: float = PATIENCE) -> T:
    """Ask until the answer is neither None nor False nor empty; AssertionError when time is up."""
    ends = time.monotonic() + seconds
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > ends:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.1)


class Scene:
    """One test's part of the cluster."""

    def __init__(self, plane: ControlPlane, nodes: HollowNodes) -> None:
        self.plane, self.hollow = plane, nodes
        self.api = plane.api
        self.name = f"scene-{next(_numbers)}"
        self.namespace = self.name
        self.nodes: list[str] = []
        self.steps: list[Step] = []
        self.api.request("POST", "/api/v1/namespaces", {"metadata": {"name": self.namespace}})
        wait_for("the service account", self._account)

    def _account(self) -> bool:
        listed = self.api.request("GET", f"{self.space()}/serviceaccounts")
        return bool(listed["items"])

    def close(self) -> None:
        """Remove everything it made."""
        foreground = {"propagationPolicy": "Background"}
        self.api.request("DELETE", f"{self.space('apps/v1')}/deployments", foreground)
        self.api.request("DELETE", f"/api/v1/namespaces/{self.namespace}")
        for node in self.nodes:
            self.hollow.remove(node)

    def space(self, group: str = "") -> str:
        base = f"/apis/{group}" if group else "/api/v1"
        return f"{base}/namespaces/{self.namespace}"

    def node(
        self,
        cpu: str = "4",
        *,
        labels: Mapping[str, str] | None = None,
        taints: Sequence[dict[str, Any]] = (),
        sizes: Mapping[str, str] | None = None,
    ) -> str:
        """A node that only this scene's pods can use."""
        name = f"{self.name}-node-{next(_numbers)}"
        self.hollow.add(
            name,
            allocatable={"cpu": cpu, **(sizes or {})},
            labels={"scene": self.name, **(labels or {})},
            taints=taints,
        )
        self.nodes.append(name)
        return name

    def deployment(
        self,
        name: str = "web",
        *,
        cpu: str = "1",
        replicas: int = 1,
        strategy: dict[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
        pod: Mapping[str, Any] | None = None,
        requests: Mapping[str, str] | None = None,
        **annotations: str,
    ) -> dict[str, Any]:
        """A Deployment as an object; maxSurge 1 and maxUnavailable 0 unless said otherwise."""
        rolling = {"maxSurge": 1, "maxUnavailable": 0}
        container = {
            "name": "main",
            "image": "example.com/app:1",
            "resources": {"requests": {"cpu": cpu, **(requests or {})}},
        }
        return {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {
                "name": name,
                "namespace": self.namespace,
                "labels": {SERVICE: name} if labels is None else dict(labels),
            },
            "spec": {
                "replicas": replicas,
                "progressDeadlineSeconds": 600,
                "selector": {"matchLabels": {"app": name}},
                "strategy": strategy or {"type": "RollingUpdate", "rollingUpdate": rolling},
                "template": {
                    "metadata": {
                        "labels": {"app": name, SERVICE: name},
                        "annotations": {TERMINATION: "0.2"},
                    },
                    "spec": {
                        "nodeSelector": {"scene": self.name},
                        "containers": [container],
                        "terminationGracePeriodSeconds": 5,
                        **(pod or {}),
                    },
                },
            },
        }

    def run(self, deployment: dict[str, Any]) -> str:
        """Create it and wait until all of it is available; its name."""
        name: str = deployment["metadata"]["name"]
        self.api.request("POST", f"{self.space('apps/v1')}/deployments", deployment)
        self.wait_available(name)
        return name

    def wait_available(self, name: str) -> None:
        wait_for(f"{name} available", lambda: self.complete(name))

    def complete(self, name: str) -> bool:
        """Whether the rollout is complete, as `kubectl rollout status` means it."""
        found = self.get(name)
        status, wanted = found["status"], found["spec"]["replicas"]
        current: int = status.get("observedGeneration", 0)
        counts = (status.get(f, 0) for f in ("replicas", "updatedReplicas", "availableReplicas"))
        return current >= found["metadata"]["generation"] and all(n == wanted for n in counts)

    def get(self, name: str) -> dict[str, Any]:
        return self.api.request("GET", f"{self.space('apps/v1')}/deployments/{name}")

    def patch(self, name: str, change: dict[str, Any]) -> None:
        path = f"{self.space('apps/v1')}/deployments/{name}"
        self.api.request("PATCH", path, change, content_type=MERGE)

    def release(self, name: str, version: str = "2", *, behaviour: str = "", cpu: str = "") -> None:
        """Change the pod template: a new revision."""
        found = self.get(name)
        template = found["spec"]["template"]
        container = template["spec"]["containers"][0]
        container["image"] = f"example.com/app:{version}"
        if cpu:
            container["resources"]["requests"]["cpu"] = cpu
        annotations = dict(template["metadata"].get("annotations") or {})
        annotations[BEHAVIOUR] = behaviour or "ready"
        self.patch(
            name,
            {
                "spec": {
                    "template": {
                        "metadata": {"annotations": annotations},
                        "spec": {"containers": [container]},
                    }
                }
            },
        )

    def sets(self, name: str) -> dict[str, dict[str, Any]]:
        """Its ReplicaSets by revision."""
        listed = self.api.request("GET", f"{self.space('apps/v1')}/replicasets")
        return {
            one["metadata"]["annotations"]["deployment.kubernetes.io/revision"]: one
            for one in listed["items"]
            if one["metadata"]["labels"].get("app") == name
        }

    def pods(self, name: str) -> list[dict[str, Any]]:
        listed = self.api.request("GET", f"{self.space()}/pods?labelSelector=app={name}")
        items: list[dict[str, Any]] = listed["items"]
        return items

    def everything(self) -> list[dict[str, Any]]:
        """Every pod of the namespace."""
        items: list[dict[str, Any]] = self.api.request("GET", f"{self.space()}/pods")["items"]
        return items

    def available(self, name: str) -> int:
        return sum(
            any(c["type"] == "Ready" and c["status"] == "True" for c in conditions(pod))
            for pod in self.pods(name)
            if "deletionTimestamp" not in pod["metadata"]
        )

    def state(self, name: str) -> str:
        """All there is to know of it, for a failing assertion."""
        sets = {k: (v["spec"]["replicas"], v["status"]) for k, v in self.sets(name).items()}
        pods = {
            p["metadata"]["name"]: (p["spec"].get("nodeName"), p["metadata"], p["status"])
            for p in self.pods(name)
        }
        return json.dumps([self.get(name)["status"], sets, pods], indent=1)

    def wait_stuck(self, name: str) -> str:
        """Wait until a pod of it is Unschedulable and nothing terminates; the scheduler's words."""

        def probe() -> str:
            pods = self.pods(name)
            if any("deletionTimestamp" in pod["metadata"] for pod in pods):
                return ""
            for pod in pods:
                for condition in conditions(pod):
                    if condition.get("reason") == "Unschedulable":
                        return str(condition["message"])
            return ""

        return wait_for(f"{name} stuck", probe)

    def slow_to_end(self, name: str, seconds: str) -> None:
        """How long its pods of now take to end once they are deleted."""
        change = {"metadata": {"annotations": {TERMINATION: seconds}}}
        for pod in self.pods(name):
            if "deletionTimestamp" not in pod["metadata"]:
                path = f"{self.space()}/pods/{pod['metadata']['name']}"
                self.api.request("PATCH", path, change, content_type=MERGE)

    # The fix

    def target(self, name: str) -> Target:
        return Target(namespace=self.namespace, deployment=name)

    def connect(self) -> Client:
        return client(self.plane.kubeconfig, {})

    def fix(self, connect: Callable[[], Client] | None = None, **settings: Any) -> UnstickRollout:
        """The fix with waits fit for a test."""
        quick: dict[str, Any] = {
            "min_stuck": 0.0,
            "settle": 1.0,
            "come_up_timeout": 90.0,
            "undo_timeout": 120.0,
            "poll": 0.2,
        }
        return UnstickRollout(Settings(**{**quick, **settings}), connect or self.connect)

    def step_log(self, earlier: Sequence[Step] = ()) -> Steps:
        """A step log kept in memory, through JSON as a journal would."""
        self.steps = list(earlier)

        async def record(index: int, step: Step) -> None:
            json.dumps(step.data)
            self.steps[index:] = [step]

        return Steps(record, lambda: datetime.now(UTC), earlier)

    async def unstick(
        self, name: str, fix: UnstickRollout | None = None
    ) -> tuple[Condition, Outcome | None]:
        """check and, where broken, apply; as the worker does."""
        fix = fix or self.fix()
        target = self.target(name)
        condition = await fix.check(target)
        if not condition.broken:
            print(f"not broken: {condition.message}")  # for the report of a test that needs it so
            return condition, None
        return condition, await fix.apply(target, condition, self.step_log())


def conditions(pod: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pod.get("status", {}).get("conditions") or []
    return found


def uids(pods: Sequence[dict[str, Any]]) -> set[str]:
    return {pod["metadata"]["uid"] for pod in pods}
