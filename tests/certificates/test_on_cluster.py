"""Rotation on a real kubeadm node: real kubelet, real static pods, real etcd.

The order of the tests is that of the file: each leaves a healthy cluster with a year to live.
"""

import json
import random
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from deploy.local.debian import binary
from exporter.checks.certificates import CertificateReader, Root
from exporter.checks.certificates.components import find_processes, served_files
from remediator.fixes.certificates.apiserver import ApiServer
from remediator.fixes.certificates.cluster import refuse_unready_peers
from remediator.fixes.certificates.lease import FAILED, NAME, RotationLease
from remediator.fixes.certificates.plan import RefusedError
from tests.cluster.certificates import expire_certificates, served_certificate
from tests.cluster.kubeadm import COMPONENTS, KubeadmCluster
from tests.cluster.pki import AUTHORITIES, LEAVES, read_certificates

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.cluster]

# How many records of the step log a whole rotation makes: two for each step.
RECORDS = 22
PYTHON = Path(__file__).resolve().parents[2] / ".venv/bin/python"


def drive(
    cluster: KubeadmCluster, log: Path, *, timeout: float = 900, **options: Any
) -> dict[str, Any]:
    """One run of the fix on the node; what it said, or {} where it was killed."""
    node = cluster.nodes[0]
    command: list[str | Path] = [PYTHON, "-m", "tests.certificates.driver", log]
    command.append(json.dumps(options))
    done = node.run(command, check=False, timeout=timeout)
    print(done.stderr)
    if not done.stdout.strip():
        return {}
    answer: dict[str, Any] = json.loads(done.stdout)
    print(answer)
    return answer


def exporter_check(cluster: KubeadmCluster) -> dict[str, Any]:
    done = cluster.nodes[0].run(
        [PYTHON, "-m", "exporter", "--check", "certificates", "-o", "json"], timeout=120
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def serials(cluster: KubeadmCluster) -> dict[str, int]:
    found = read_certificates(cluster.nodes[0].root / "etc/kubernetes")
    return {n: c.serial_number for n, c in found.items() if n in LEAVES and n != "kubelet.conf"}


def assert_healthy(cluster: KubeadmCluster) -> None:
    """Everything runs, serves what is on disk, and nothing is stale."""
    assert cluster.kubectl("get", "--raw=/readyz", timeout=120) == "ok"
    node = cluster.nodes[0]
    root = Root(node.root)
    files = [file for file in served_files(root) if file.component != "kubelet"]
    assert {file.name for file in files} == {"apiserver", "etcd-server", "etcd-peer"}
    address = cluster.server.removeprefix("https://").rpartition(":")[0]
    inventory = CertificateReader(root, [file.path for file in files]).read()
    on_disk = {c.path: c.serial for c in inventory.certificates}
    for file in files:
        port = int(file.endpoint.rpartition(":")[2])
        served = served_certificate(address, port)
        assert served is not None, file.endpoint
        assert served.serial_number == int(on_disk[file.path], 16), file.endpoint
    report = exporter_check(cluster)
    assert not [note for note in report["notes"] if "older certificate" in note]
    assert {p.component for p in find_processes(Path("/proc"), root)} >= set(COMPONENTS)


def test_the_same_dates_as_kubeadm_and_what_it_does_not_know(
    kubeadm_cluster: KubeadmCluster,
) -> None:
    node = kubeadm_cluster.nodes[0]
    said = node.run(["kubeadm", "certs", "check-expiration"], timeout=120).stdout
    kubeadm = {}
    for line in said.splitlines():
        name, _, rest = line.partition(" ")
        if rest.strip() and name and "UTC" in rest:
            kubeadm[name] = datetime.strptime(
                rest.split(" UTC")[0].strip(), "%b %d, %Y %H:%M"
            ).replace(tzinfo=UTC)
    assert len(kubeadm) == 13, said
    findings = exporter_check(kubeadm_cluster)["findings"]
    for name, minute in kubeadm.items():
        of_name = [f for f in findings if f["name"] == name]
        wanted = [
            f
            for f in of_name
            if (f["usage"] == "ca") == (name in ("ca", "etcd-ca", "front-proxy-ca"))
        ]
        assert wanted, name
        for found in wanted:
            exact = datetime.fromtimestamp(found["not_after"], UTC)
            assert exact.replace(second=0) == minute, name
    managed = {f["name"] for f in findings if f["managed_by"] == "kubeadm"}
    assert managed == set(kubeadm) - set(AUTHORITIES)
    others = {f["name"] for f in findings} - set(kubeadm)
    assert {"kubelet-client-current", "kubelet"} <= others


def test_c2_killed_at_a_step_and_resumed_ends_whole(
    kubeadm_cluster: KubeadmCluster, tmp_path: Path, seed: int, *, soak: bool
) -> None:
    points = list(range(1, RECORDS + 1)) if soak else [random.Random(seed).randint(7, 16)]
    for point in points:
        log = tmp_path / f"log{point}"
        before = serials(kubeadm_cluster)
        print(f"killed after record {point} of the step log")
        killed = drive(kubeadm_cluster, log, force=True, kill_after=point)
        if killed:  # it had ended before
            assert killed["phase"] == "Succeeded"
            continue
        resumed = drive(kubeadm_cluster, log, resume=True)
        after = serials(kubeadm_cluster)
        renewed = {name for name in before if before[name] != after[name]}
        if resumed["phase"] == "Succeeded":
            assert renewed == set(before)
        else:
            assert resumed["reason"] == "Interrupted"
            assert not renewed
        assert_healthy(kubeadm_cluster)
        lease = kubeadm_cluster.get("lease", NAME, "--namespace=kube-system")
        assert not lease["spec"].get("holderIdentity")
        marked = FAILED in (lease["metadata"].get("annotations") or {})
        assert marked == (resumed["phase"] != "Succeeded" and bool(renewed or point > 6))
    snapshots = sorted(
        (kubeadm_cluster.nodes[0].root / "var/lib/upkeep/backups").glob("2*/etcd-snapshot.db")
    )
    if snapshots:
        said = subprocess.run(
            [binary("etcdctl"), "snapshot", "status", snapshots[-1], "--write-out=json"],
            env={"ETCDCTL_API": "3"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert json.loads(said)["totalKey"] > 50


def lease(cluster: KubeadmCluster, node: str, now: datetime | None = None) -> RotationLease:
    moment = (now or datetime.now(UTC)).timestamp()
    return RotationLease(ApiServer(Root(cluster.nodes[0].root)), node, 600, lambda: moment)


@pytest.fixture
def no_lease(kubeadm_cluster: KubeadmCluster) -> KubeadmCluster:
    kubeadm_cluster.kubectl(
        "delete", "lease", NAME, "--namespace=kube-system", "--ignore-not-found"
    )
    return kubeadm_cluster


async def test_c6_two_nodes_at_once_one_rotates(no_lease: KubeadmCluster) -> None:
    await lease(no_lease, "node-a").acquire()
    with pytest.raises(RefusedError, match="node node-a is rotating") as caught:
        await lease(no_lease, "node-b").acquire()
    assert caught.value.reason == "AnotherRotating"
    await lease(no_lease, "node-a").acquire()  # its own, after a crash
    assert await lease(no_lease, "node-b").release()  # not its own: nothing happens
    with pytest.raises(RefusedError):
        await lease(no_lease, "node-b").check()
    assert await lease(no_lease, "node-a").release()
    await lease(no_lease, "node-b").acquire()


async def test_c7_after_a_failure_no_other_node_rotates(no_lease: KubeadmCluster) -> None:
    await lease(no_lease, "node-a").acquire()
    await lease(no_lease, "node-a").release(failed="kube-apiserver did not come back")
    with pytest.raises(RefusedError, match="did not come back") as caught:
        await lease(no_lease, "node-b").acquire()
    assert caught.value.reason == "AnotherFailed"
    no_lease.kubectl("-n", "kube-system", "annotate", "lease", NAME, f"{FAILED}-")
    await lease(no_lease, "node-b").acquire()


async def test_c19_a_holder_that_is_gone_is_taken_over_after_proof(
    no_lease: KubeadmCluster,
) -> None:
    later = datetime.now(UTC) + timedelta(hours=2)
    living = no_lease.nodes[0].name
    await lease(no_lease, living).acquire()
    with pytest.raises(RefusedError, match="never ended"):  # it ran out, but the node is there
        await lease(no_lease, "node-b", later).acquire()
    await lease(no_lease, living).release()
    await lease(no_lease, "node-gone").acquire()
    with pytest.raises(RefusedError, match="is rotating"):  # no such node, but not run out
        await lease(no_lease, "node-b").acquire()
    await lease(no_lease, "node-b", later).acquire()


async def test_c5_a_peer_that_is_not_ready_is_named(kubeadm_cluster: KubeadmCluster) -> None:
    peer = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "peer", "labels": {"node-role.kubernetes.io/master": ""}},
    }
    kubeadm_cluster.apply(peer)
    try:
        api = ApiServer(Root(kubeadm_cluster.nodes[0].root))
        with pytest.raises(RefusedError, match="not Ready: peer"):
            await refuse_unready_peers(api, kubeadm_cluster.nodes[0].name)
    finally:
        kubeadm_cluster.kubectl("delete", "node", "peer")


def test_c12_a_component_that_does_not_come_up_is_rolled_back(
    no_lease: KubeadmCluster, tmp_path: Path
) -> None:
    before = serials(no_lease)
    answer = drive(
        no_lease,
        tmp_path / "log",
        force=True,
        sabotage=True,
        settings={"component_timeout": 90},
    )
    assert (answer["phase"], answer["reason"]) == ("Failed", "RolledBack")
    assert "kube-apiserver" in answer["message"]
    assert serials(no_lease) == before
    assert_healthy(no_lease)


def test_c13_expired_certificates_are_recovered(no_lease: KubeadmCluster, tmp_path: Path) -> None:
    node = no_lease.nodes[0]
    expire_certificates(no_lease, node, timedelta(days=-1))
    assert no_lease.kubectl("get", "--raw=/readyz", check=False, timeout=20) != "ok"
    left_to_people = drive(no_lease, tmp_path / "first")
    assert left_to_people.get("reason") == "RecoveryByPerson", left_to_people
    answer = drive(no_lease, tmp_path / "log", settings={"recovery": "single"})
    assert answer["phase"] == "Succeeded", answer
    assert any("stop etcd" in sentence for sentence in answer["plan"])
    assert_healthy(no_lease)
    left = [
        c.not_valid_after_utc - datetime.now(UTC)
        for n, c in read_certificates(node.root / "etc/kubernetes").items()
        if n in LEAVES
    ]
    assert min(left) > timedelta(days=360)
