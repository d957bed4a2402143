"""How soon and how cheaply a large cluster is seen, measured against kubectl on the same cluster.

    python -m benchmarks.rollouts [--deployments 10000] [--nodes 500]

A real API server is filled with Deployments, a ReplicaSet each, three pods each, and nodes; then
the exporter starts beside `kubectl get deployments,replicasets,pods,nodes -A -o json`. It prints
the ratio of the two times, and fails (exit code 1) where a limit is missed:

* ready in at most half the time that kubectl takes;
* peak resident memory under 250 MB;
* one scrape under 50 ms of CPU;
* a pod's change visible in the metric within 1 s.
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.cluster.api import Api
from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.ports import reserved_ports

PODS_EACH = 3
NAMESPACES = 200
STUCK = 20
WRITERS = 24
MERGE = "application/merge-patch+json"
STAMP = "2026-01-01T00:00:00Z"


def _meta(name: str, namespace: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "namespace": namespace, **more}


def _template(number: int) -> dict[str, Any]:
    environment = [{"name": f"SETTING_{n}", "value": f"value-{number}-{n}"} for n in range(8)]
    return {
        "metadata": {"labels": {"app": f"app-{number}", "akash.network/manifest-service": "web"}},
        "spec": {
            "automountServiceAccountToken": False,
            "containers": [
                {
                    "name": "main",
                    "image": f"registry.example.com/tenant/app-{number}:v1.2.3",
                    "env": environment,
                    "ports": [{"containerPort": 8080, "name": "http"}],
                    "resources": {
                        "requests": {"cpu": "100m", "memory": "64Mi"},
                        "limits": {"cpu": "100m", "memory": "64Mi"},
                    },
                    "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
                }
            ],
            "volumes": [{"name": "scratch", "emptyDir": {}}],
        },
    }


def _owner(kind: str, name: str, uid: str) -> list[dict[str, Any]]:
    return [{"apiVersion": "apps/v1", "kind": kind, "name": name, "uid": uid, "controller": True}]


class Filler:
    """Writes the objects, many requests at a time."""

    def __init__(self, plane: ControlPlane, nodes: int) -> None:
        self.api = Api(plane.kubeconfig)
        self.nodes = nodes
        self.done = 0

    async def fill(self, deployments: int) -> None:
        connector = aiohttp.TCPConnector(ssl=self.api.tls, limit=WRITERS)
        async with aiohttp.ClientSession(
            self.api.server, connector=connector, headers=self.api.headers
        ) as self.session:
            for n in range(NAMESPACES):
                await self.send("POST", "/api/v1/namespaces", {"metadata": {"name": f"ns-{n}"}})
                path = f"/api/v1/namespaces/ns-{n}/serviceaccounts"
                await self.send("POST", path, {"metadata": {"name": "default"}})
            await self._each(self._node, self.nodes)
            await self._each(self._deployment, deployments)

    async def _each(self, make: Any, count: int) -> None:
        numbers = iter(range(count))

        async def worker() -> None:
            for number in numbers:
                await make(number)
                self.done += 1
                if self.done % 1000 == 0:
                    print(f"  {make.__name__[1:]} {self.done} written", flush=True)

        self.done = 0
        await asyncio.gather(*(worker() for _ in range(WRITERS)))

    async def send(
        self, method: str, path: str, body: Any, content_type: str = "application/json"
    ) -> dict[str, Any]:
        async with self.session.request(
            method, path, data=json.dumps(body), headers={"Content-Type": content_type}
        ) as response:
            if response.status >= 300:
                raise RuntimeError(f"{method} {path}: {await response.text()}")
            answer: dict[str, Any] = await response.json()
            return answer

    async def _node(self, number: int) -> None:
        name = f"node-{number}"
        labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}
        await self.send("POST", "/api/v1/nodes", {"metadata": {"name": name, "labels": labels}})
        sizes = {"cpu": str(6.1), "memory": "64Gi", "pods": "110"}
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady"}
        untainted = {"spec": {"taints": None}}  # a node starts as not-ready
        await self.send("PATCH", f"/api/v1/nodes/{name}", untainted, MERGE)
        status = {"capacity": sizes, "allocatable": sizes, "conditions": [ready]}
        await self.send("PATCH", f"/api/v1/nodes/{name}/status", {"status": status}, MERGE)

    async def _deployment(self, number: int) -> None:
        space, name = f"ns-{number % NAMESPACES}", f"app-{number}"
        template, stuck = _template(number), number < STUCK
        selector = {"matchLabels": {"app": name}}
        revision = {"deployment.kubernetes.io/revision": "2" if stuck else "1"}
        labels = {"akash.network/manifest-service": "web"}
        made = await self.send(
            "POST",
            f"/apis/apps/v1/namespaces/{space}/deployments",
            {
                "metadata": _meta(name, space, labels=labels, annotations=revision),
                "spec": {"replicas": PODS_EACH, "selector": selector, "template": template},
            },
        )
        counts = {
            "observedGeneration": 1,
            "replicas": PODS_EACH,
            "updatedReplicas": PODS_EACH,
            "availableReplicas": PODS_EACH,
            "readyReplicas": PODS_EACH,
        }
        path = f"/apis/apps/v1/namespaces/{space}/deployments/{name}/status"
        await self.send("PATCH", path, {"status": counts}, MERGE)
        uid = made["metadata"]["uid"]
        await self._replica_set(space, name, uid, number=number, revision="1", pods=PODS_EACH)
        if stuck:  # a release that has no room
            await self._replica_set(space, name, uid, number=number, revision="2", pods=1)

    async def _replica_set(
        self, space: str, deployment: str, uid: str, *, number: int, revision: str, pods: int
    ) -> None:
        name, template = f"{deployment}-{revision}", _template(number)
        if revision == "2":  # needs more than the full nodes have left, less than with one gone
            template["spec"]["containers"][0]["resources"]["requests"]["cpu"] = "110m"
            template["spec"]["containers"][0]["resources"]["limits"]["cpu"] = "110m"
        made = await self.send(
            "POST",
            f"/apis/apps/v1/namespaces/{space}/replicasets",
            {
                "metadata": _meta(
                    name,
                    space,
                    labels={"app": deployment},
                    annotations={"deployment.kubernetes.io/revision": revision},
                    ownerReferences=_owner("Deployment", deployment, uid),
                ),
                "spec": {
                    "replicas": pods,
                    "selector": {"matchLabels": {"app": deployment}},
                    "template": template,
                },
            },
        )
        owners = _owner("ReplicaSet", name, made["metadata"]["uid"])
        for n in range(pods):
            place = "" if revision == "2" else f"node-{(number * PODS_EACH + n) % self.nodes}"
            await self._pod(space, f"{name}-{n}", owners=owners, template=template, node=place)

    async def _pod(
        self, space: str, name: str, *, owners: Any, template: dict[str, Any], node: str
    ) -> None:
        spec = {**template["spec"], **({"nodeName": node} if node else {})}
        metadata = _meta(
            name,
            space,
            labels=template["metadata"]["labels"],
            ownerReferences=owners,
        )
        path = f"/api/v1/namespaces/{space}/pods"
        await self.send("POST", path, {"metadata": metadata, "spec": spec})
        await self.send("PATCH", f"{path}/{name}/status", {"status": pod_status(node)}, MERGE)


def pod_status(node: str) -> dict[str, Any]:
    """A running pod's status as a kubelet writes it, or a waiting one's as the scheduler does."""
    if not node:
        waiting = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/500 nodes are available: 500 Insufficient cpu.",
            "lastTransitionTime": STAMP,
        }
        return {"phase": "Pending", "conditions": [waiting]}
    kinds = ("Initialized", "Ready", "ContainersReady", "PodScheduled")
    return {
        "phase": "Running",
        "hostIP": "192.0.2.1",
        "podIP": "198.51.100.1",
        "startTime": STAMP,
        "conditions": [
            {"type": kind, "status": "True", "lastTransitionTime": STAMP} for kind in kinds
        ],
        "containerStatuses": [
            {
                "name": "main",
                "ready": True,
                "started": True,
                "restartCount": 0,
                "image": "registry.example.com/tenant/app:v1.2.3",
                "imageID": "registry.example.com/tenant/app@sha256:" + "0" * 64,
                "containerID": "containerd://" + "0" * 64,
                "state": {"running": {"startedAt": STAMP}},
            }
        ],
    }


def time_kubectl(plane: ControlPlane) -> float:
    """Seconds kubectl takes to read the same objects."""
    began = time.monotonic()
    subprocess.run(
        [
            str(plane.binaries.kubectl),
            *("--kubeconfig", str(plane.kubeconfig)),
            *("get", "deployments,replicasets,pods,nodes", "-A", "-o", "json"),
        ],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.monotonic() - began


class Exporter:
    """The exporter as a process of its own, with the rollouts collector alone."""

    def __init__(self, plane: ControlPlane, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/metrics"
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "exporter", "--rollouts.selector="),
                *("--no-collector.certificates", "--no-collector.zombies"),
                *("--kubeconfig", str(plane.kubeconfig)),
                *("--web.listen-address", f"127.0.0.1:{port}"),
            ],
        )

    def scrape(self) -> str:
        with urllib.request.urlopen(self.url, timeout=30) as answer:  # noqa: S310 - our own
            text: str = answer.read().decode()
            return text

    def wait_for(self, text: str, seconds: float = 300) -> float:
        """Seconds since the call until a scrape has `text`."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if self.process.poll() is not None:
                raise RuntimeError("the exporter ended")
            try:
                if text in self.scrape():
                    return time.monotonic() - began
            except OSError:
                pass
            time.sleep(0.02)
        raise RuntimeError(f"no {text!r} within {seconds} s")

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_megabytes(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024


@contextmanager
def exporter(plane: ControlPlane) -> Iterator[Exporter]:
    """An exporter, ended with the block."""
    with reserved_ports(1) as (port,):
        running = Exporter(plane, port)
        try:
            yield running
        finally:
            running.process.terminate()
            running.process.wait(30)


def measure(plane: ControlPlane) -> bool:
    """Print every figure beside its limit; whether all are kept."""
    kubectl = [time_kubectl(plane)]
    print(f"kubectl get deployments,replicasets,pods,nodes -A -o json: {kubectl[0]:.1f} s")
    with exporter(plane) as running:
        running.wait_for("upkeep_rollout_view_age_seconds")
        ready = time.monotonic() - running.began
        running.wait_for("upkeep_rollout_unstickable{", 30)
        stuck = running.scrape().count("upkeep_rollout_stuck_seconds{")
        scrapes = 40
        before = running.cpu_seconds()
        for _ in range(scrapes):
            running.scrape()
        scrape = (running.cpu_seconds() - before) / scrapes
        path = "/api/v1/namespaces/ns-0/pods/app-0-2-0/status"
        placed: dict[str, Any] = {"status": {"conditions": []}}
        gone = 'deployment="app-0",namespace="ns-0",reason='
        plane.api.request("PATCH", path, placed, content_type=MERGE)
        while gone in running.scrape():
            time.sleep(0.02)
        plane.api.request("PATCH", path, {"status": pod_status("")}, content_type=MERGE)
        visible = running.wait_for(gone, 30)
        peak = running.peak_megabytes()
    kubectl.append(time_kubectl(plane))
    reference = sum(kubectl) / len(kubectl)
    rows = [
        ("ready, of kubectl's time", ready / reference, 0.5, f"{ready:.1f} of {reference:.1f} s"),
        ("peak resident memory", peak, 250, "MB"),
        ("CPU of one scrape", scrape * 1000, 50, f"ms, with {stuck} stuck rollouts"),
        ("a pod's change is visible after", visible, 1, "s"),
    ]
    for what, value, limit, unit in rows:
        verdict = "ok" if value <= limit else "MISSED"
        print(f"{verdict:7} {what}: {value:.2f} (limit {limit}) {unit}")
    return all(value <= limit for _, value, limit, _ in rows)


def main() -> int:
    """Fill, measure, say; 0 where every limit is kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollouts")
    parser.add_argument("--deployments", type=int, default=10_000)
    parser.add_argument("--nodes", type=int, default=500)
    chosen = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    memory = Path("/dev/shm")  # noqa: S108 - etcd's fsyncs are not what is measured
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
        control_plane(Path(folder)) as plane,
    ):
        plane.stop("kube-controller-manager")  # they would tidy up what is written here
        plane.stop("kube-scheduler")
        print(f"writing {chosen.deployments} Deployments with {PODS_EACH} pods each …", flush=True)
        asyncio.run(Filler(plane, chosen.nodes).fill(chosen.deployments))
        return 0 if measure(plane) else 1


if __name__ == "__main__":
    sys.exit(main())
