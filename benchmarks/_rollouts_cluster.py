"""Fills a real API server with a large cluster's objects, in well under a minute.

The API server takes far longer to accept fifty thousand objects than for anything that is measured
afterwards. So it accepts one of each kind, and what it stored for that one, in its own encoding, is
written to its etcd again under other names. These have the same length, as have uids, so that the
lengths within the encoding hold: whoever lists or watches can't tell a copy from what was posted.
"""

import base64
import itertools
import json
import re
import ssl
import urllib.request
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tests.cluster.control_plane import ControlPlane

PODS_EACH = 3
NAMESPACES = 200
STUCK = 20
"""So many Deployments wait with a release that has no room; these are posted, not copied."""
_MERGE = "application/merge-patch+json"
_STAMP = "2026-01-01T00:00:00Z"
_UID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PUTS = 100  # in one etcd transaction, which may have 128

Object = dict[str, Any]


def namespace(number: int) -> str:
    return f"ns-{number % NAMESPACES:03}"


def app(number: int) -> str:
    return f"app-{number:05}"


class Filler:
    """Writes the objects. Controllers and scheduler must not run: they would tidy up."""

    def __init__(self, plane: ControlPlane, nodes: int) -> None:
        self.api = plane.api
        self.etcd = _Etcd(plane)
        self.nodes = nodes

    def fill(self, deployments: int) -> None:
        """More than `STUCK` Deployments, a ReplicaSet and three running pods each."""
        for n in range(NAMESPACES):
            self.api.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace(n)}})
        self._post_node(_node(0))
        self._copy(["minions/" + _node(0)], ({_node(0): _node(n)} for n in range(1, self.nodes)))
        for n in range(STUCK + 1):
            self._post_deployment(n)
        space, name = namespace(STUCK), app(STUCK)
        keys = [f"deployments/{space}/{name}", f"replicasets/{space}/{name}-1"]
        keys += [f"pods/{space}/{name}-1-{pod}" for pod in range(PODS_EACH)]
        self._copy(keys, (self._renamed(number) for number in range(STUCK + 1, deployments)))
        self._expect("/apis/apps/v1/deployments", deployments)
        self._expect("/apis/apps/v1/replicasets", deployments + STUCK)
        self._expect("/api/v1/pods", deployments * PODS_EACH + STUCK)
        self._expect("/api/v1/nodes", self.nodes)

    def _expect(self, path: str, count: int) -> None:
        found = self.api.request("GET", path + "?limit=1")
        there = 1 + found["metadata"].get("remainingItemCount", 0)
        if there != count:
            raise RuntimeError(f"{path}: the API server has {there} and not {count}")

    def _place(self, number: int, pod: int) -> str:
        return _node((number * PODS_EACH + pod) % self.nodes)

    def _renamed(self, number: int) -> dict[str, str]:
        names = {namespace(STUCK): namespace(number), app(STUCK): app(number)}
        for pod in range(PODS_EACH):
            names[self._place(STUCK, pod)] = self._place(number, pod)
        return names

    def _copy(self, keys: list[str], renamed: Iterable[dict[str, str]]) -> None:
        """Store what is at `keys` once more for each set of names, with uids of its own."""
        patterns = [(key.encode(), self.etcd.read(key)) for key in keys]
        uids = {uid for _, value in patterns for uid in _UID.findall(value)}

        def copies() -> Iterator[tuple[bytes, bytes]]:
            for names in renamed:
                instead = {old.encode(): new.encode() for old, new in names.items()}
                instead |= {old: str(uuid.uuid4()).encode() for old in uids}
                for key, value in patterns:
                    yield _replaced(key, instead), _replaced(value, instead)

        self.etcd.write(copies())

    def _post(self, path: str, body: Object, status: Object) -> str:
        """Make an object and then its status, as two writes of the cluster's own would; its uid."""
        made = self.api.request("POST", path, body)
        one = f"{path}/{made['metadata']['name']}/status"
        self.api.request("PATCH", one, {"status": status}, content_type=_MERGE)
        uid: str = made["metadata"]["uid"]
        return uid

    def _post_node(self, name: str) -> None:
        labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}
        sizes = {"cpu": "6100m", "memory": "64Gi", "pods": "110"}  # 60 pods and not quite one more
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady"}
        status = {"capacity": sizes, "allocatable": sizes, "conditions": [ready]}
        self._post("/api/v1/nodes", {"metadata": {"name": name, "labels": labels}}, status)
        untainted = {"spec": {"taints": None}}  # a node starts as not-ready
        self.api.request("PATCH", f"/api/v1/nodes/{name}", untainted, content_type=_MERGE)

    def _post_deployment(self, number: int) -> None:
        space, name, stuck = namespace(number), app(number), number < STUCK
        account = f"/api/v1/namespaces/{space}/serviceaccounts"
        self.api.request("POST", account, {"metadata": {"name": "default"}})
        counts = ("replicas", "updatedReplicas", "availableReplicas", "readyReplicas")
        owner = self._post(
            f"/apis/apps/v1/namespaces/{space}/deployments",
            {
                "metadata": {
                    "name": name,
                    "labels": {"akash.network/manifest-service": "web"},
                    "annotations": _revision(2 if stuck else 1),
                },
                "spec": {
                    "replicas": PODS_EACH,
                    "selector": {"matchLabels": {"app": name}},
                    "template": _template(name, "100m"),
                },
            },
            {"observedGeneration": 1, **dict.fromkeys(counts, PODS_EACH)},
        )
        places = [self._place(number, pod) for pod in range(PODS_EACH)]
        self._post_replica_set(space, name, owner, revision=1, cpu="100m", places=places)
        if stuck:  # more than a full node has left, less than one with an old pod gone
            self._post_replica_set(space, name, owner, revision=2, cpu="110m", places=[""])

    def _post_replica_set(
        self, space: str, app_name: str, owner: str, *, revision: int, cpu: str, places: list[str]
    ) -> None:
        """With a pod at each of `places`; an empty one waits."""
        name, template = f"{app_name}-{revision}", _template(app_name, cpu)
        uid = self._post(
            f"/apis/apps/v1/namespaces/{space}/replicasets",
            {
                "metadata": {
                    "name": name,
                    "labels": {"app": app_name},
                    "annotations": _revision(revision),
                    "ownerReferences": _owner("Deployment", app_name, owner),
                },
                "spec": {
                    "replicas": len(places),
                    "selector": {"matchLabels": {"app": app_name}},
                    "template": template,
                },
            },
            {"replicas": len(places), "observedGeneration": 1},
        )
        for number, place in enumerate(places):
            metadata = {
                "name": f"{name}-{number}",
                "labels": template["metadata"]["labels"],
                "ownerReferences": _owner("ReplicaSet", name, uid),
            }
            spec = {**template["spec"], **({"nodeName": place} if place else {})}
            self._post(
                f"/api/v1/namespaces/{space}/pods",
                {"metadata": metadata, "spec": spec},
                pod_status(place),
            )


class _Etcd:
    """The API server's store, by etcd's JSON gateway and with the API server's credentials."""

    def __init__(self, plane: ControlPlane) -> None:
        pki = plane.pki_dir
        self._url = f"https://127.0.0.1:{plane.ports.etcd_client}/v3/kv/"
        tls = ssl.create_default_context(cafile=str(pki / "etcd/ca.crt"))
        tls.load_cert_chain(pki / "apiserver-etcd-client.crt", pki / "apiserver-etcd-client.key")
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls)
        )

    def read(self, key: str) -> bytes:
        found = self._send("range", {"key": _base64(_stored_at(key.encode()))})
        return base64.b64decode(found["kvs"][0]["value"])

    def write(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        several = iter(pairs)
        while batch := list(itertools.islice(several, _PUTS)):
            puts = [
                {"requestPut": {"key": _base64(_stored_at(key)), "value": _base64(value)}}
                for key, value in batch
            ]
            self._send("txn", {"success": puts})

    def _send(self, method: str, body: Object) -> Object:
        request = urllib.request.Request(  # noqa: S310 - our own etcd
            self._url + method, json.dumps(body).encode()
        )
        with self._opener.open(request, timeout=60) as answer:
            found: Object = json.load(answer)
            return found


def _replaced(text: bytes, instead: Mapping[bytes, bytes]) -> bytes:
    assert all(len(old) == len(new) for old, new in instead.items())
    any_of = re.compile(b"|".join(map(re.escape, instead)))
    return any_of.sub(lambda found: instead[found[0]], text)


def _stored_at(key: bytes) -> bytes:
    return b"/registry/" + key


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _node(number: int) -> str:
    return f"node-{number:04}"


def _revision(number: int) -> dict[str, str]:
    return {"deployment.kubernetes.io/revision": str(number)}


def _owner(kind: str, name: str, uid: str) -> list[Object]:
    return [{"apiVersion": "apps/v1", "kind": kind, "name": name, "uid": uid, "controller": True}]


def _template(name: str, cpu: str) -> Object:
    sizes = {"cpu": cpu, "memory": "64Mi"}
    return {
        "metadata": {"labels": {"app": name, "akash.network/manifest-service": "web"}},
        "spec": {
            "automountServiceAccountToken": False,
            "containers": [
                {
                    "name": "main",
                    "image": f"registry.example.com/tenant/{name}:v1.2.3",
                    "env": [{"name": f"SETTING_{n}", "value": f"{name}-{n}"} for n in range(8)],
                    "ports": [{"containerPort": 8080, "name": "http"}],
                    "resources": {"requests": sizes, "limits": sizes},
                    "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
                }
            ],
            "volumes": [{"name": "scratch", "emptyDir": {}}],
        },
    }


def pod_status(node: str) -> dict[str, Any]:
    """A running pod's status as a kubelet writes it, or a waiting one's as the scheduler does."""
    if not node:
        waiting = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/500 nodes are available: 500 Insufficient cpu.",
            "lastTransitionTime": _STAMP,
        }
        return {"phase": "Pending", "conditions": [waiting]}
    kinds = ("Initialized", "Ready", "ContainersReady", "PodScheduled")
    return {
        "phase": "Running",
        "hostIP": "192.0.2.1",
        "podIP": "198.51.100.1",
        "startTime": _STAMP,
        "conditions": [
            {"type": kind, "status": "True", "lastTransitionTime": _STAMP} for kind in kinds
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
                "state": {"running": {"startedAt": _STAMP}},
            }
        ],
    }
