"""What only the cluster knows of a pod, and what only a file remembers of a workload.

Both hold the fix back and never push it: what isn't known forbids restarting a container.
"""

import json
import os
from pathlib import Path
from typing import Protocol

import msgspec


class PodFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a pod beyond its processes. Empty means unknown."""

    restart_policy: str = ""
    """Always, OnFailure, Never."""
    workload: str = ""
    """What recreates the pod, as KIND/NAMESPACE/NAME."""
    opted_out: str = ""
    """The annotation that forbids acting, as a sentence."""
    grace: float | None = None
    """The pod's terminationGracePeriodSeconds."""
    why_unknown: str = ""
    """Why something isn't known, as a sentence."""


class FactSource(Protocol):
    """Where facts of pods come from."""

    async def pod(self, namespace: str, pod: str, uid: str) -> PodFacts:
        """Facts of exactly this pod; never raises. A static pod's uid is its manifest's hash."""


class NoFacts:
    """For hosts without an API server to ask."""

    async def pod(self, namespace: str, pod: str, uid: str) -> PodFacts:
        return PodFacts(why_unknown="no kubeconfig is given, so nobody can be asked")


class RestartHistory:
    """When containers of which workload were restarted: one JSON line each, on disk before the act.

    A file that can't be read as such counts as one that forbids: see `read`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, workload: str) -> list[float]:
        """Unix times of the restarts of a workload, oldest first.

        `OSError` where the file can't be read, `ValueError` where it isn't whole.
        """
        try:
            lines = self._path.read_text().splitlines()
        except FileNotFoundError:
            return []
        entries = [json.loads(line) for line in lines]
        return sorted(float(e["at"]) for e in entries if e["workload"] == workload)

    def add(self, workload: str, at: float, keep_after: float) -> None:
        """Add a restart, durably, and forget those before `keep_after`. Errors as for `read`."""
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        old = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in old if float(json.loads(line)["at"]) >= keep_after]
        kept.append(json.dumps({"workload": workload, "at": at}))
        whole = self._path.with_suffix(".new")
        with whole.open("w") as file:
            file.write("\n".join(kept) + "\n")
            file.flush()
            os.fsync(file.fileno())
        whole.rename(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
