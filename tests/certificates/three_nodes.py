"""The remediator by hand on nodes of a cluster, and somebody who uses that cluster meanwhile."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from exporter.checks.certificates import CertificateReader, Root
from exporter.checks.certificates.components import find_processes, served_files
from tests.cluster.api import Api, ApiError
from tests.cluster.certificates import served_certificate
from tests.cluster.kubeadm import COMPONENTS, KubeadmCluster
from tests.cluster.netns import Network
from tests.cluster.node import Node, NodeError
from tests.cluster.pki import LEAVES, read_certificates

PYTHON = Path(__file__).resolve().parents[2] / ".venv/bin/python"
_KUBERNETES = "etc/kubernetes"
_PATIENCE = 400.0
"""Seconds: a kubelet may hold a component back for 300."""


class Run:
    """`upkeep-remediator run rotate-certificates` on a node, begun."""

    def __init__(self, node: Node, *flags: str, **settings: Any) -> None:
        """settings: of the fix."""
        self.node = node
        config = node.root / "etc/upkeep.yaml"
        config.write_text(json.dumps({"fixes": {"rotate-certificates": {"settings": settings}}}))
        argv: list[str | Path] = [
            PYTHON,
            "-m",
            "remediator",
            "run",
            "rotate-certificates",
            "--output=json",
        ]
        self._process = node.popen(
            [*argv, "--config.file=/etc/upkeep.yaml", f"--node-name={node.name}", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def end(self, timeout: float = 900) -> dict[str, Any]:
        """The remediation, once it has ended."""
        out, err = self._process.communicate(timeout=timeout)
        print(f"--- {self.node.name}\n{err}\n{out}")
        answer: dict[str, Any] = json.loads(out)
        return answer


def run(node: Node, *flags: str, **settings: Any) -> dict[str, Any]:
    """One from its beginning to its end."""
    return Run(node, *flags, **settings).end()


class Client:
    """Reads and writes by the balanced address all the time, each request by a new connection,
    and never asks twice for the same."""

    def __init__(self, kubeconfig: Path) -> None:
        self._api = Api(kubeconfig)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self.asked = 0
        self.failed: list[str] = []
        self.longest = 0.0
        """Seconds."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(60)

    def _ask(self) -> None:
        place = "/api/v1/namespaces/default/configmaps"
        name = {"metadata": {"name": "upkeep-client"}}
        self._api.request("POST", place, name)
        while not self._stop.wait(0.1):
            begun = time.monotonic()
            patch = {"data": {"n": str(self.asked)}}
            try:
                if self.asked % 2:
                    self._api.request("GET", f"{place}/upkeep-client")
                else:
                    kind = "application/merge-patch+json"
                    self._api.request("PATCH", f"{place}/upkeep-client", patch, content_type=kind)
            except (ApiError, OSError) as error:
                self.failed.append(f"{datetime.now(UTC):%H:%M:%S} {type(error).__name__}: {error}")
            self.asked += 1
            self.longest = max(self.longest, time.monotonic() - begun)
        self._api.request("DELETE", f"{place}/upkeep-client")


def address(node: Node) -> str:
    return Network(node.state.network).node(node.state.index)


def serials(node: Node) -> dict[str, int]:
    """Of all that kubeadm renews."""
    found = read_certificates(node.root / _KUBERNETES)
    return {n: c.serial_number for n, c in found.items() if n in LEAVES and n != "kubelet.conf"}


def problem(node: Node, restarted: Sequence[str] = COMPONENTS) -> str:
    """Why a node doesn't use a year's certificates with every component; empty where it does.

    restarted: what has to have a process newer than the files.
    """
    root = Root(node.root)
    certificates = read_certificates(node.root / _KUBERNETES)
    for name in serials(node):
        if certificates[name].not_valid_after_utc < datetime.now(UTC) + timedelta(days=360):
            return f"{name} ends {certificates[name].not_valid_after_utc}"
    files = [file for file in served_files(root) if file.component != "kubelet"]
    if {file.name for file in files} != {"apiserver", "etcd-server", "etcd-peer"}:
        return f"it serves {files}"
    inventory = CertificateReader(root, [file.path for file in files]).read()
    on_disk = {c.path: int(c.serial, 16) for c in inventory.certificates}
    for file in files:
        served = served_certificate(address(node), int(file.endpoint.rpartition(":")[2]))
        if served is None or served.serial_number != on_disk[file.path]:
            return f"{file.endpoint} does not serve {file.path}"
    written = max((node.root / _KUBERNETES / LEAVES[n][0]).stat().st_mtime for n in serials(node))
    inside = set(node.pids)
    started = {
        p.component: p.started_at for p in find_processes(Path("/proc"), root) if p.pid in inside
    }
    for component in restarted:
        if started.get(component, 0.0) < written - 1:  # start times are right to about a second
            return f"{component} does not run, or is older than the files"
    return ""


def assert_healthy(cluster: KubeadmCluster, restarted: Sequence[str] = COMPONENTS) -> None:
    """Every node's components run with certificates of a year, and the API says all are Ready."""
    for node in cluster.nodes:
        look = partial(problem, node, restarted)
        eventually(lambda look=look: not look(), look)  # type: ignore[misc]
        # One whose etcd was away is ended by its kubelet, and needs a while to come back.
        asked = ("get", "--raw=/readyz", f"--server=https://{address(node)}:6443")
        eventually(
            lambda a=asked: cluster.kubectl(*a, check=False) == "ok",  # type: ignore[misc]
            lambda node=node: f"{node.name} is not ready",  # type: ignore[misc]
        )
    ready = '--output=jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}'
    for kind in ("nodes", "pods"):
        wanted = len(cluster.nodes) * (1 if kind == "nodes" else len(COMPONENTS))
        listing = ("get", kind, "--namespace=kube-system", ready)
        eventually(
            lambda a=listing, n=wanted: (  # type: ignore[misc]
                cluster.kubectl(*a, check=False).split() == ["True"] * n
            )
        )


def eventually(
    holds: Callable[[], bool], why: Callable[[], str] = lambda: "", pause: float = 0.5
) -> None:
    """Wait until it holds; AssertionError with `why` where it doesn't."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        with suppress(NodeError):  # an API server that doesn't answer in time
            if holds():
                return
        assert time.monotonic() < deadline, why()
        time.sleep(pause)
