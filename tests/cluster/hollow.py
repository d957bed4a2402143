"""Nodes without machines: stand-ins at the kubelet's boundary.

Deployments that get stuck on cpu, memory or extended resources need many nodes of chosen sizes,
which one machine can't be. Everything above the kubelet is real here (API server, scheduler,
controllers); this plays what a kubelet *reports*: its Node with a fresh lease, and for each pod
bound to it the status of containers that start, get ready, crash or end. No container runs. What
depends on a real kubelet is tested on a real one (kubeadm.py).

A pod says how it behaves by annotations:

    hollow.upkeep.dev/behaviour: see BEHAVIOURS; "ready" if there is none
    hollow.upkeep.dev/termination-seconds: how long it takes to end once deleted
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from tests.cluster import hollow_status as status
from tests.cluster.api import Api, ApiError, Object

BEHAVIOUR = "hollow.upkeep.dev/behaviour"
TERMINATION = "hollow.upkeep.dev/termination-seconds"

BEHAVIOURS = {
    "ready": "Ready soon after it is bound",
    "never-ready": "runs, but its readiness probe never succeeds",
    "slow-ready": "`slow-ready=SECONDS`: runs at once, Ready after that long",
    "crash": "its containers end again and again, and never were Ready (they have a probe)",
    "ready-then-crash": "`ready-then-crash=SECONDS`: Ready that long, each time (no probe)",
}

HEARTBEAT_SECONDS = 10
CRASH_BACK_OFF_SECONDS = (10, 20, 40, 80, 160, 300)
_LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
_MERGE = "application/merge-patch+json"

log = logging.getLogger(__name__)


class _GoneError(Exception):
    """What was to be changed isn't there any more, or is another of the same name."""


@dataclass
class _Pod:
    task: asyncio.Task[None] | None
    addresses: tuple[str, str]
    """The node's and its own."""
    ending: bool = False


class HollowNodes:
    """Hollow nodes on one cluster: a context manager; nothing reports for them once it ends.

    `start_delay` and `grace` (seconds) are how long containers take to start and to end; a pod's
    own grace period can only shorten the latter.
    """

    def __init__(self, kubeconfig: Path, *, start_delay: float = 0.2, grace: float = 0.3) -> None:
        self._api = Api(kubeconfig)
        self._start_delay = start_delay
        self._grace = grace
        self._nodes: dict[str, str] = {}
        self._pods: dict[str, _Pod] = {}
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._main(),), daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        if self._thread.is_alive():
            raise RuntimeError("the hollow nodes' thread did not end within 30 s")
        self._loop.close()

    def add(
        self,
        name: str,
        *,
        allocatable: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        taints: Sequence[Object] = (),
    ) -> None:
        """Make a Ready node; pods land there a moment later.

        `allocatable` adds to or replaces 4 cpus, 8Gi of memory and 110 pods; extended resources
        are named like "example.com/gpu". Raises ApiError if there is a node of that name.
        """
        address = f"192.0.2.{next(self._numbers)}"
        sizes = {"cpu": "4", "memory": "8Gi", "pods": "110", **(allocatable or {})}
        self._nodes[name] = address  # before it exists, or its first pods could be missed
        try:
            self._api.request("POST", "/api/v1/nodes", status.node(name, labels or {}, taints))
        except Exception:
            del self._nodes[name]
            raise
        self._api.request("POST", _LEASES, status.lease(name))
        self.resize(name, sizes)

    def resize(self, name: str, sizes: Mapping[str, str]) -> None:
        """Set capacity and allocatable of a node, and the rest of its status to Ready."""
        path = f"/api/v1/nodes/{name}/status"
        body = status.node_status(sizes, self._nodes[name])
        self._api.request("PATCH", path, body, content_type=_MERGE)

    def remove(self, name: str) -> None:
        """Take a node away, as if its machine were gone; its pods are the cluster's to clean up."""
        self._api.request("DELETE", f"/api/v1/nodes/{name}")
        del self._nodes[name]

    async def _main(self) -> None:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._api.tls, limit=20),
            headers=self._api.headers,
            read_bufsize=2**22,  # one event is one line
        ) as self._session:
            loops = [
                asyncio.create_task(self._forever(self._follow_pods)),
                asyncio.create_task(self._forever(self._heartbeat)),
            ]
            await self._stop.wait()
            tasks = loops + [pod.task for pod in self._pods.values() if pod.task]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _forever(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except (aiohttp.ClientError, ApiError, OSError, TimeoutError) as error:
                log.info("hollow nodes: %s; trying again", error)  # an API server that restarts
                await asyncio.sleep(0.5)
            except Exception:
                log.exception("hollow nodes: a fault")
                await asyncio.sleep(1)

    async def _heartbeat(self) -> None:
        for name in list(self._nodes):
            with contextlib.suppress(_GoneError):
                await self._send("PATCH", f"{_LEASES}/{name}", status.lease(name))
        await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _follow_pods(self) -> None:
        """List every bound pod, then watch; returns when the watch ends."""
        bound = "/api/v1/pods?fieldSelector=spec.nodeName!="
        listed = await self._send("GET", bound)
        for uid in set(self._pods) - {pod["metadata"]["uid"] for pod in listed["items"]}:
            self._forget(uid)
        for pod in listed["items"]:
            self._see(pod)
        version = listed["metadata"]["resourceVersion"]
        url = f"{self._api.server}{bound}&watch=true&timeoutSeconds=300&resourceVersion={version}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        async with self._session.get(url, timeout=timeout) as response:
            response.raise_for_status()
            async for line in response.content:
                event = json.loads(line)
                if event["type"] == "ERROR":  # 410 Gone: list again
                    return
                if event["type"] == "DELETED":
                    self._forget(event["object"]["metadata"]["uid"])
                else:
                    self._see(event["object"])

    def _see(self, pod: Object) -> None:
        metadata = pod["metadata"]
        node = self._nodes.get(pod["spec"]["nodeName"])
        if node is None:  # somebody else's node
            return
        known = self._pods.get(metadata["uid"])
        if known is None:
            number = next(self._numbers)
            known = _Pod(None, (node, f"10.244.{number >> 8 & 255}.{number & 255}"))
            self._pods[metadata["uid"]] = known
            if pod["status"].get("phase") == "Pending" and "deletionTimestamp" not in metadata:
                known.task = self._loop.create_task(self._quietly(self._live(pod, known)))
        if "deletionTimestamp" in metadata and not known.ending:
            known.ending = True
            if known.task:
                known.task.cancel()
            known.task = self._loop.create_task(self._quietly(self._end(pod, known)))

    def _forget(self, uid: str) -> None:
        gone = self._pods.pop(uid, None)
        if gone and gone.task:
            gone.task.cancel()

    async def _quietly(self, life: Coroutine[Any, Any, None]) -> None:
        try:
            await life
        except _GoneError:
            pass
        except Exception:
            log.exception("hollow nodes: a pod's life ended in a fault")

    async def _live(self, pod: Object, known: _Pod) -> None:
        text = pod["metadata"].get("annotations", {}).get(BEHAVIOUR, "ready")
        behaviour, _, argument = text.partition("=")
        addresses = known.addresses
        try:
            seconds = float(argument or 1)
        except ValueError:
            behaviour = ""
        if behaviour not in BEHAVIOURS:
            known_ones = ", ".join(BEHAVIOURS)
            message = f"{BEHAVIOUR} is {text!r}; known: {known_ones}"
            await self._report(pod, status.refused(pod, addresses, message))
            return
        await asyncio.sleep(self._start_delay)
        ready = behaviour in {"ready", "ready-then-crash"}
        started = status.now()
        pod = await self._report(pod, status.running(pod, addresses, ready=ready, started=started))
        if behaviour == "slow-ready":
            await asyncio.sleep(seconds)
            await self._report(pod, status.running(pod, addresses, ready=True, started=started))
        elif behaviour in {"crash", "ready-then-crash"}:
            for restarts in itertools.count():
                await asyncio.sleep(seconds)
                pod = await self._report(pod, status.crash_loop(pod, addresses, restarts=restarts))
                wait = CRASH_BACK_OFF_SECONDS[min(restarts, len(CRASH_BACK_OFF_SECONDS) - 1)]
                await asyncio.sleep(wait)
                again = status.running(
                    pod, addresses, ready=ready, started=status.now(), restarts=restarts + 1
                )
                pod = await self._report(pod, again)

    async def _end(self, pod: Object, known: _Pod) -> None:
        metadata = pod["metadata"]
        own = metadata.get("annotations", {}).get(TERMINATION)
        allowed = metadata.get("deletionGracePeriodSeconds", self._grace)
        await asyncio.sleep(float(own) if own else min(self._grace, allowed))
        await self._report(pod, status.terminated(pod, known.addresses))
        now = {"gracePeriodSeconds": 0, "preconditions": {"uid": metadata["uid"]}}
        await self._until_answered("DELETE", _path(pod), now)

    async def _report(self, pod: Object, body: Object) -> Object:
        """Write its status; the pod as it is then."""
        return await self._until_answered("PATCH", _path(pod) + "/status", body)

    async def _until_answered(self, method: str, path: str, body: Object) -> Object:
        """A kubelet doesn't give up because the API server is away for a while."""
        while True:
            try:
                return await self._send(method, path, body)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                log.info("hollow nodes: %s %s: %s; trying again", method, path, error)
                await asyncio.sleep(0.5)

    async def _send(self, method: str, path: str, body: Object | None = None) -> Object:
        async with self._session.request(
            method,
            self._api.server + path,
            json=body,
            headers={"Content-Type": _MERGE if method == "PATCH" else "application/json"},
            timeout=aiohttp.ClientTimeout(total=30),
        ) as response:
            if response.status in {404, 409}:
                raise _GoneError(path)
            if response.status == 422:
                raise ApiError(422, f"{method} {path}: {await response.text()}")
            response.raise_for_status()
            answer: Object = await response.json()
            return answer


def _path(pod: Object) -> str:
    metadata = pod["metadata"]
    return f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
