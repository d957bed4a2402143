"""Rounds on one real cluster: something is begun on a node, killed at a point, and taken up again.

Each round leaves a healthy cluster whose certificates live a year. What makes it cheap: nothing is
built again, certificates are signed anew by the cluster's own CAs, and a kubelet that was started
anew has no back-off left for the components that are restarted.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from exporter.checks.certificates import CertificateReader, Root
from exporter.checks.certificates.components import find_processes, served_files
from remediator.fixes.certificates.lease import NAME
from remediator.fixes.certificates.restore import PUT_BACK
from tests.cluster.certificates import component_pid, served_certificate
from tests.cluster.kubeadm import COMPONENTS, KubeadmCluster
from tests.cluster.pki import LEAVES, read_certificates, set_remaining

PYTHON = Path(__file__).resolve().parents[2] / ".venv/bin/python"
BACKUPS = "var/lib/upkeep/backups"


def drive(
    cluster: KubeadmCluster, folder: Path, *, timeout: float = 900, **options: Any
) -> dict[str, Any]:
    """One run of the driver on the node: the remediation, or {} where it was killed."""
    folder.mkdir(exist_ok=True)
    command: list[str | Path] = [PYTHON, "-m", "tests.certificates.driver", folder]
    command.append(json.dumps(options))
    with no_lingering(cluster):
        done = cluster.nodes[0].run(command, check=False, timeout=timeout)
    for line in done.stderr.splitlines():
        if "event=step" not in line and 'event="step' not in line:  # said in plain words as well
            print(line)
    if not done.stdout.strip():
        return {}
    answer: dict[str, Any] = json.loads(done.stdout)
    print(answer["phase"], answer["reason"], answer["message"])
    return answer


@contextmanager
def no_lingering(cluster: KubeadmCluster) -> Iterator[None]:
    """End an API server that listens no more and only waits, a minute long, for open watches."""
    address = cluster.server.removeprefix("https://").rpartition(":")[0]
    stop = threading.Event()

    def watch() -> None:
        served: set[int] = set()
        while not stop.wait(1):
            pid = component_pid(cluster.nodes[0], "kube-apiserver")
            if served_certificate(address, 6443) is not None:
                served.add(pid or 0)
            elif pid in served and pid == component_pid(cluster.nodes[0], "kube-apiserver"):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def exporter_check(cluster: KubeadmCluster) -> dict[str, Any]:
    """What `upkeep-exporter --check certificates` says on the node."""
    done = cluster.nodes[0].run(
        [PYTHON, "-m", "exporter", "--check", "certificates", "-o", "json"], timeout=120
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def serials(cluster: KubeadmCluster) -> dict[str, int]:
    """Of what kubeadm can renew, by its names."""
    found = read_certificates(cluster.nodes[0].root / "etc/kubernetes")
    return {n: c.serial_number for n, c in found.items() if n in LEAVES and n != "kubelet.conf"}


def assert_healthy(cluster: KubeadmCluster, *, within: float = 0) -> None:
    """Everything runs, serves what is on disk, and nothing is stale.

    within: seconds for servers to look at files that nobody has restarted them for.
    """
    assert cluster.kubectl("get", "--raw=/readyz", timeout=120) == "ok"
    ends = time.monotonic() + within
    while others := _served_otherwise(cluster):
        assert time.monotonic() < ends, others
        time.sleep(1)
    report = exporter_check(cluster)
    assert not [note for note in report["notes"] if "older certificate" in note]
    root = Root(cluster.nodes[0].root)
    assert {p.component for p in find_processes(Path("/proc"), root)} >= set(COMPONENTS)


def _served_otherwise(cluster: KubeadmCluster) -> list[str]:
    """Endpoints that serve another certificate than the one on disk, or none."""
    root = Root(cluster.nodes[0].root)
    files = [file for file in served_files(root) if file.component != "kubelet"]
    assert {file.name for file in files} == {"apiserver", "etcd-server", "etcd-peer"}
    inventory = CertificateReader(root, [file.path for file in files]).read()
    on_disk = {c.path: c.serial for c in inventory.certificates}
    address = cluster.server.removeprefix("https://").rpartition(":")[0]
    others = []
    for file in files:
        served = served_certificate(address, int(file.endpoint.rpartition(":")[2]))
        if served is None or served.serial_number != int(on_disk[file.path], 16):
            others.append(file.endpoint)
    return others


def make_patient(cluster: KubeadmCluster) -> None:
    """A kubelet without a back-off."""
    node = cluster.nodes[0]
    node.stop("kubelet")
    node.start("kubelet")
    cluster.wait("kubelet", lambda: node.service_pid("kubelet") is not None)


def sign_anew(cluster: KubeadmCluster, left: timedelta) -> None:
    """Other certificates on disk, with so much life left; nothing is restarted."""
    set_remaining(cluster.nodes[0].root / "etc/kubernetes", left)


def newest_backup(cluster: KubeadmCluster) -> str:
    """The name of the newest backup that a rotation made; empty where there is none."""
    here = cluster.nodes[0].root / BACKUPS
    found = sorted(p.name for p in here.glob("2*Z") if (p / "index.json").is_file())
    return found[-1] if found else ""


def _prepare_restore(cluster: KubeadmCluster, folder: Path) -> dict[str, Any]:
    settings = {"restart": "needed"}
    renewed = drive(cluster, folder / "first", force=True, settings=settings)
    assert renewed["phase"] == "Succeeded"
    return {"restore": newest_backup(cluster)}


def _prepare_recovery(cluster: KubeadmCluster, folder: Path) -> dict[str, Any]:
    # Running components go on with what they have; nobody gets in with the new ones.
    sign_anew(cluster, timedelta(days=-1))
    return {"force": True}


def _prepare_nothing(cluster: KubeadmCluster, folder: Path) -> dict[str, Any]:
    return {"force": True}


@dataclass(frozen=True)
class Scenario:
    """Something that can be killed after any record of its step log."""

    points: range
    """Which records: one when a step begins, one when it ends."""
    prepare: Callable[[KubeadmCluster, Path], dict[str, Any]] = _prepare_nothing
    options: dict[str, Any] = field(default_factory=dict)


SCENARIOS = {
    "rotation": Scenario(range(1, 23)),
    "roll-back": Scenario(range(8, 21), options={"sabotage": "half"}),
    "roll-back-in-use": Scenario(
        range(14, 23),
        options={
            "sabotage": "scheduler",
            "settings": {"component_timeout": 45, "restart": "needed"},
        },
    ),
    "restore": Scenario(range(1, 17), _prepare_restore),
    "recovery": Scenario(range(1, 25), _prepare_recovery),
}


def crash_round(cluster: KubeadmCluster, folder: Path, name: str, point: int) -> None:
    """Kill it there, take it up again, and see that nothing is half-way."""
    scenario = SCENARIOS[name]
    folder.mkdir(exist_ok=True)
    make_patient(cluster)
    options = scenario.prepare(cluster, folder) | scenario.options
    before = serials(cluster)
    print(f"{name}, killed after record {point} of its step log: {options}")
    assert drive(cluster, folder, kill_after=point, **options) == {}
    ended = drive(cluster, folder, resume=True)
    after = serials(cluster)
    same = {n for n in before if before[n] == after[n]}
    assert same in (set(), set(before)), same
    if ended["phase"] == "Succeeded":
        assert not same
    elif name == "recovery" and same:  # died before it changed any: a person asks again
        assert ended["reason"] == "Interrupted"
        assert drive(cluster, folder, force=True)["phase"] == "Succeeded"
    else:
        assert ended["reason"] == "Interrupted"
        assert same
    touched = any(step["name"] in ("renew", PUT_BACK) for step in ended["steps"])
    assert_healthy(cluster, within=0 if touched else 90)
    lease = cluster.kubectl(
        *("get", "lease", NAME, "--namespace=kube-system", "--ignore-not-found"),
        "--output=jsonpath={.spec.holderIdentity}",
    )
    assert not lease
