"""Rotation on a real kubeadm node: real kubelet, real static pods, real etcd.

The order of the tests is that of the file: each leaves a healthy cluster with a year to live.
"""

import json
import os
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from exporter.checks.certificates import Root
from remediator.fixes.certificates.apiserver import ApiServer
from remediator.fixes.certificates.cluster import refuse_unready_peers
from remediator.fixes.certificates.lease import FAILED, NAME, RotationLease
from remediator.fixes.certificates.plan import RefusedError
from tests.certificates.rounds import (
    BACKUPS,
    PYTHON,
    assert_healthy,
    drive,
    exporter_check,
    make_patient,
    newest_backup,
    no_lingering,
    serials,
)
from tests.cluster.certificates import component_pid, expire_certificates
from tests.cluster.kubeadm import COMPONENTS, KubeadmCluster
from tests.cluster.pki import AUTHORITIES, LEAVES, read_certificates

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.cluster]


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


def _rolled_back(cluster: KubeadmCluster, folder: Path, component: str, **settings: Any) -> None:
    make_patient(cluster)
    before = serials(cluster)
    answer = drive(cluster, folder, force=True, sabotage=component, settings=settings)
    assert (answer["phase"], answer["reason"]) == ("Failed", "RolledBack")
    assert f"kube-{component}" in answer["message"]
    assert serials(cluster) == before
    assert_healthy(cluster)


def test_c12_a_component_that_does_not_come_up_is_rolled_back(
    no_lease: KubeadmCluster, tmp_path: Path, *, soak: bool
) -> None:
    _rolled_back(no_lease, tmp_path, "scheduler", component_timeout=60, restart="needed")
    if soak:  # its back-off alone takes minutes
        _rolled_back(no_lease, tmp_path / "again", "apiserver", component_timeout=90)


def _stale(cluster: KubeadmCluster) -> set[str]:
    """Which components the exporter says still use older certificates."""
    notes = [note for note in exporter_check(cluster)["notes"] if "older certificate" in note]
    return {name for name in COMPONENTS if any(name in note for note in notes)}


def _serves_by_itself(cluster: KubeadmCluster, port: int) -> x509.Certificate:
    """What a component serves on its own loopback port."""
    ask = f"import ssl; print(ssl.get_server_certificate(('127.0.0.1', {port})))"
    pem = cluster.nodes[0].run([PYTHON, "-c", ask]).stdout
    return x509.load_pem_x509_certificate(pem.encode())


def test_c18_what_no_renewal_touches_is_not_stale(no_lease: KubeadmCluster, tmp_path: Path) -> None:
    make_patient(no_lease)
    served = {port: _serves_by_itself(no_lease, port) for port in (10257, 10259)}
    done = drive(no_lease, tmp_path / "files", force=True, settings={"restart": "none"})
    assert done["phase"] == "Succeeded"
    # Not by what they serve, which is as it was, but by when they started.
    assert _stale(no_lease) >= {"kube-controller-manager", "kube-scheduler"}
    assert served == {port: _serves_by_itself(no_lease, port) for port in served}

    done = drive(no_lease, tmp_path / "all", force=True, settings={"restart": "needed"})
    assert done["phase"] == "Succeeded"
    assert not _stale(no_lease) & {"kube-controller-manager", "kube-scheduler"}
    cluster_ca = read_certificates(no_lease.nodes[0].root / "etc/kubernetes")["ca"].subject
    for port in served:
        assert _serves_by_itself(no_lease, port).issuer != cluster_ca
    assert_healthy(no_lease, within=90)


def _scheduler(cluster: KubeadmCluster) -> dict[str, Any]:
    pod = f"kube-scheduler-{cluster.nodes[0].name}"
    found = cluster.get("pod", pod, "--namespace=kube-system")
    status: dict[str, Any] = found["status"]["containerStatuses"][0]
    return status


def test_c17_a_component_in_its_back_off_is_waited_for(
    no_lease: KubeadmCluster, tmp_path: Path
) -> None:
    make_patient(no_lease)
    node = no_lease.nodes[0]

    def is_back_off() -> bool:
        if (pid := component_pid(node, "kube-scheduler")) is not None:
            os.kill(pid, signal.SIGKILL)
        waiting = _scheduler(no_lease)["state"].get("waiting", {})
        # The third: longer than a slow machine takes to renew the files.
        return waiting.get("reason") == "CrashLoopBackOff" and "40s" in waiting.get("message", "")

    no_lease.wait("CrashLoopBackOff of the scheduler", is_back_off, timeout=240)
    restarts = _scheduler(no_lease)["restartCount"]

    settings = {"restart": "needed", "etcd_snapshot": False}
    done = drive(no_lease, tmp_path, force=True, settings=settings)

    assert done["phase"] == "Succeeded"
    (step,) = (s for s in done["steps"] if s["name"] == "restart kube-scheduler")
    assert "needs no restart" in step["result"], step
    no_lease.wait("the scheduler Ready", lambda: bool(_scheduler(no_lease)["ready"]))
    assert _scheduler(no_lease)["restartCount"] == restarts + 1
    assert_healthy(no_lease, within=90)


def test_c31_an_annotation_on_the_node_forbids_it(no_lease: KubeadmCluster, tmp_path: Path) -> None:
    node = no_lease.nodes[0].name
    before = serials(no_lease)
    no_lease.kubectl("annotate", "node", node, "upkeep.dev/remediation=disabled")
    try:
        said = drive(no_lease, tmp_path, force=True, settings={"restart": "none"})
    finally:
        no_lease.kubectl("annotate", "node", node, "upkeep.dev/remediation-")
    assert (said["phase"], said["reason"]) == ("Skipped", "OptedOut")
    assert node in said["message"]
    assert serials(no_lease) == before


async def test_a_restore_waits_for_no_other_and_is_in_use(
    no_lease: KubeadmCluster, tmp_path: Path
) -> None:
    make_patient(no_lease)
    first = drive(no_lease, tmp_path / "first", force=True, settings={"restart": "needed"})
    assert first["phase"] == "Succeeded"
    newer = serials(no_lease)
    backup = newest_backup(no_lease)
    typed: list[str | Path] = [
        PYTHON,
        "-m",
        "remediator",
        "restore",
        backup,
        f"--journal={tmp_path}/journal.db",
    ]

    await lease(no_lease, "node-b").acquire()
    refused = no_lease.nodes[0].run(typed, check=False, timeout=120)
    assert refused.returncode == 1
    assert "(AnotherRotating)" in refused.stdout
    assert serials(no_lease) == newer
    await lease(no_lease, "node-b").release()

    with no_lingering(no_lease):
        done = no_lease.nodes[0].run(typed, timeout=600)
    assert "Succeeded (Restored)" in done.stdout, done.stdout
    folder = no_lease.nodes[0].root / BACKUPS / backup
    index = json.loads((folder / "index.json").read_bytes())
    kept = {name: int(serial, 16) for name, serial in index["serials"].items()}
    assert serials(no_lease) == kept
    assert not newer.items() & kept.items()
    assert_healthy(no_lease)
    status = ["etcdctl", "snapshot", "status", "--write-out=json", f"/{BACKUPS}/{backup}"]
    status[-1] += "/etcd-snapshot.db"
    said = no_lease.nodes[0].run(status, env={"ETCDCTL_API": "3"}).stdout
    assert json.loads(said)["totalKey"] > 50


def test_c13_expired_certificates_are_recovered(no_lease: KubeadmCluster, tmp_path: Path) -> None:
    node = no_lease.nodes[0]
    expire_certificates(no_lease, node, timedelta(days=-1))
    assert no_lease.kubectl("get", "--raw=/readyz", check=False, timeout=20) != "ok"
    left_to_people = drive(no_lease, tmp_path / "first", settings={"recovery": "person"})
    assert left_to_people.get("reason") == "RecoveryByPerson", left_to_people
    assert f"members are {node.name}." in left_to_people["message"]
    answer = drive(no_lease, tmp_path / "log")  # by itself: etcd has no other member
    assert answer["phase"] == "Succeeded", answer
    assert any("stop etcd" in sentence for sentence in answer["condition"]["plan"])
    assert_healthy(no_lease)
    left = [
        c.not_valid_after_utc - datetime.now(UTC)
        for n, c in read_certificates(node.root / "etc/kubernetes").items()
        if n in LEAVES
    ]
    assert min(left) > timedelta(days=360)
