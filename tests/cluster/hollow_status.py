"""What a kubelet writes to the API about its node and its pods, as plain values.

Shapes of core/v1 as a 1.20 kubelet fills them in; times are RFC 3339 in UTC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from tests.cluster.api import Object

LEASE_SECONDS = 40


def now() -> str:
    """The time as metav1.Time has it: whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def lease(node: str) -> Object:
    """The Lease by which a node says that it lives; also the patch that renews it."""
    return {
        "metadata": {"name": node},
        "spec": {
            "holderIdentity": node,
            "leaseDurationSeconds": LEASE_SECONDS,
            "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        },
    }


def node(name: str, labels: Mapping[str, str], taints: Sequence[Object]) -> Object:
    """A Node as a kubelet registers it."""
    own = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}
    return {
        "metadata": {"name": name, "labels": {**own, **labels}},
        "spec": {"taints": list(taints)},
    }


def node_status(sizes: Mapping[str, str], address: str) -> Object:
    """The patch that makes a Node Ready with these resources."""
    moment = now()
    pressures = ("MemoryPressure", "DiskPressure", "PIDPressure")
    conditions = [_condition("Ready", ready=True, moment=moment, reason="KubeletReady")]
    conditions += [_condition(kind, ready=False, moment=moment) for kind in pressures]
    return {
        "status": {
            "capacity": dict(sizes),
            "allocatable": dict(sizes),
            "addresses": [{"type": "InternalIP", "address": address}],
            "conditions": [{**condition, "lastHeartbeatTime": moment} for condition in conditions],
        }
    }


def running(
    pod: Object, addresses: tuple[str, str], *, ready: bool, started: str, restarts: int = 0
) -> Object:
    """Containers that run since `started`. `addresses`: of the node and of the pod."""
    state = {"running": {"startedAt": started}}
    last_exit = 1 if restarts else None
    return _status(
        pod, "Running", state, addresses, ready=ready, restarts=restarts, last_exit=last_exit
    )


def crash_loop(pod: Object, addresses: tuple[str, str], *, restarts: int) -> Object:
    """Containers that ended with exit code 1 and wait to be started again."""
    state = {
        "waiting": {"reason": "CrashLoopBackOff", "message": "back-off restarting failed container"}
    }
    return _status(pod, "Running", state, addresses, ready=False, restarts=restarts, last_exit=1)


def refused(pod: Object, addresses: tuple[str, str], message: str) -> Object:
    """Containers that can't be made, for the reason in `message`."""
    state = {"waiting": {"reason": "CreateContainerConfigError", "message": message}}
    return _status(pod, "Pending", state, addresses, ready=False)


def terminated(pod: Object, addresses: tuple[str, str]) -> Object:
    """Containers that obeyed SIGTERM."""
    state = {"terminated": {"exitCode": 0, "reason": "Completed", "finishedAt": now()}}
    return _status(pod, "Running", state, addresses, ready=False)


def _status(
    pod: Object,
    phase: str,
    state: Object,
    addresses: tuple[str, str],
    *,
    ready: bool,
    restarts: int = 0,
    last_exit: int | None = None,
) -> Object:
    uid = pod["metadata"]["uid"]
    last = {} if last_exit is None else {"terminated": {"exitCode": last_exit, "reason": "Error"}}
    before = {known["type"]: known for known in pod["status"].get("conditions", [])}
    after = {"Initialized": True, "Ready": ready, "ContainersReady": ready}
    conditions = {
        kind: _condition(kind, ready=value, moment=now()) for kind, value in after.items()
    }
    changed = {
        kind: condition
        for kind, condition in conditions.items()
        if before.get(kind, {}).get("status") != condition["status"]
    }
    host_address, pod_address = addresses
    return {
        "metadata": {"uid": uid},  # makes the API refuse it for a successor of the same name
        "status": {
            "phase": phase,
            "hostIP": host_address,
            "podIP": pod_address,
            "podIPs": [{"ip": pod_address}],
            "startTime": pod["status"].get("startTime", now()),
            "conditions": list({**before, **changed}.values()),
            "containerStatuses": [
                {
                    "name": container["name"],
                    "image": container["image"],
                    "imageID": f"hollow://{container['image']}",
                    "containerID": f"hollow://{uid}/{container['name']}/{restarts}",
                    "ready": ready,
                    "started": "running" in state,
                    "restartCount": restarts,
                    "state": state,
                    "lastState": last,
                }
                for container in pod["spec"]["containers"]
            ],
        },
    }


def _condition(kind: str, *, ready: bool, moment: str, reason: str = "") -> Object:
    condition = {"type": kind, "status": str(ready), "lastTransitionTime": moment}
    return {**condition, "reason": reason} if reason else condition
