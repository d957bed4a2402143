"""One rotation at a time in a cluster, and none after one that failed.

A Lease in kube-system is held for as long as a rotation runs. One that failed stays marked on it
until a person takes the mark away. The API server is restarted while the Lease is held: it needs no
renewing in that time, it only forbids others to start.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from exporter.kubernetes.access import AccessError
from exporter.kubernetes.client import ApiError
from remediator.fixes.certificates.apiserver import ApiServer
from remediator.fixes.certificates.plan import RefusedError
from remediator.model import Steps

NAME = "upkeep-rotate-certificates"
FAILED = "upkeep.dev/failed"
_COLLECTION = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases"
_PATH = f"{_COLLECTION}/{NAME}"
_PATIENCE = 60.0  # seconds
_POLL = 2.0
_RESUME = f"kubectl -n kube-system annotate lease {NAME} {FAILED}-"


class RotationLease:
    """The Lease, as one node sees it."""

    def __init__(
        self, api: ApiServer, node: str, duration: float, clock: Callable[[], float]
    ) -> None:
        """duration: seconds after which a holder that is gone may be doubted."""
        self._api = api
        self._node = node
        self._duration = int(duration)
        self._clock = clock

    async def check(self) -> None:
        """RefusedError where another node rotates, or its rotation failed. ApiError."""
        await self._refuse(await self._api.get(_PATH))

    async def acquire(self) -> None:
        """Take it. RefusedError where it can't be had. ApiError, AccessError."""
        held = await self._api.get(_PATH)
        await self._refuse(held)
        try:
            if held is None:
                await self._api.write("POST", _COLLECTION, self._body({}, holder=self._node))
            else:
                await self._api.write("PUT", _PATH, self._body(held, holder=self._node))
        except ApiError as error:
            if error.status == 409:
                raise RefusedError(
                    "AnotherRotating", "another node has just begun to rotate its certificates"
                ) from None
            raise

    async def release(self, *, failed: str = "") -> bool:
        """Give it back; `failed` marks it, in words. Whether that could be written.

        An API that is away for a moment is asked again: what is not given back stops every other
        node until a person has looked here.
        """
        ends = time.monotonic() + _PATIENCE
        while True:
            try:
                held = await self._api.get(_PATH)
                if held is not None and _holder(held) == self._node:
                    await self._api.write("PUT", _PATH, self._body(held, holder="", failed=failed))
            except (ApiError, AccessError):
                if time.monotonic() > ends:
                    return False
                await asyncio.sleep(_POLL)
            else:
                return True

    async def give_back(self, steps: Steps, *, failed: str) -> None:
        """As `release`; where it can't be written, a step says what a person has to do."""
        if not await self.release(failed=failed):
            async with steps.step("unlock", "give the Lease back") as step:
                step.result = (
                    "the API server did not take it: no other node rotates before "
                    f"kubectl -n kube-system delete lease {NAME}"
                )

    async def _refuse(self, held: Mapping[str, Any] | None) -> None:
        if held is None:
            return
        failed = (held.get("metadata", {}).get("annotations") or {}).get(FAILED, "")
        if failed and not failed.startswith(f"{self._node}:"):
            raise RefusedError(
                "AnotherFailed",
                f"a rotation failed ({failed[:300]}); once it is mended: {_RESUME}",
            )
        holder = _holder(held)
        if not holder or holder == self._node:
            return
        left = self._left(held)
        if left > 0:
            raise RefusedError(
                "AnotherRotating", f"node {holder} is rotating, for at most {left:.0f} s more"
            )
        # It has run out, but that only says that nobody wrote: the node may be half-way.
        if await self._api.get(f"/api/v1/nodes/{holder}") is not None:
            raise RefusedError(
                "AnotherRotating",
                f"node {holder} began to rotate and never ended: look there, then "
                f"kubectl -n kube-system delete lease {NAME}",
            )

    def _left(self, held: Mapping[str, Any]) -> float:
        spec = held.get("spec") or {}
        try:
            renewed = datetime.fromisoformat(str(spec.get("renewTime")))
            return renewed.timestamp() + float(spec["leaseDurationSeconds"]) - self._clock()
        except (ValueError, KeyError, TypeError):
            return 0.0

    def _body(self, held: Mapping[str, Any], *, holder: str, failed: str = "") -> dict[str, Any]:
        now = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        metadata = dict(held.get("metadata") or {"name": NAME, "namespace": "kube-system"})
        annotations = dict(metadata.get("annotations") or {})
        annotations.pop(FAILED, None)
        if failed:
            annotations[FAILED] = f"{self._node}: {failed}"
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {**metadata, "annotations": annotations},
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": self._duration,
                "acquireTime": now,
                "renewTime": now,
            },
        }


def _holder(held: Mapping[str, Any]) -> str:
    return str((held.get("spec") or {}).get("holderIdentity") or "")
