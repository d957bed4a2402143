"""Rotation and restore on Kubespray's layout: etcd on the host, the PKI in /etc/kubernetes/ssl.

All parts are real but systemd (see tests/cluster/systemctl.py). The order of the tests is that of
the file: the second one restores what the first one backed up.
"""

import json
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.debian import binary
from exporter.checks.certificates import Root
from exporter.checks.certificates.components import find_processes
from tests.cluster.certificates import served_certificate
from tests.cluster.kubeadm import KubeadmCluster
from tests.cluster.kubespray import (
    ENVIRONMENT,
    ETCD_SSL,
    STATIC_PODS,
    kubespray_cluster,
    write_certificates,
)
from tests.cluster.netns import Network
from tests.cluster.node import Node
from tests.conftest import SOAK

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.cluster]

KUBEADMS = {
    "admin.conf",
    "apiserver",
    "apiserver-kubelet-client",
    "controller-manager.conf",
    "front-proxy-client",
    "scheduler.conf",
}
BACKUPS = "var/lib/upkeep/backups"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeadmCluster]:
    with kubespray_cluster(tmp_path_factory.mktemp("kubespray")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def node(cluster: KubeadmCluster) -> Node:
    return cluster.nodes[0]


def address(node: Node) -> str:
    return Network(node.state.network).node(node.state.index)


def set_remaining(node: Node, days: int) -> None:
    """In the node, where the link `pki` leads where it should."""
    script = (
        "from datetime import timedelta; from pathlib import Path\n"
        "from tests.cluster.pki import set_remaining\n"
        f"set_remaining(Path('/etc/kubernetes'), timedelta(days={days}))\n"
    )
    node.run([sys.executable, "-c", script])


def on_disk(node: Node) -> dict[str, bytes]:
    """etcd's own files."""
    folder = node.root / ETCD_SSL.lstrip("/")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kubeadms(node: Node) -> dict[str, str]:
    """Serials of what kubeadm manages, by name, as the exporter sees them."""
    done = node.run([sys.executable, "-m", "exporter", "--check", "certificates", "-o", "json"])
    report = json.loads(done.stdout)
    return {f["name"]: f["serial"] for f in report["findings"] if f["managed_by"] == "kubeadm"}


def etcd_pid(node: Node) -> str:
    return node.run(["systemctl", "show", "etcd", "--property=MainPID", "--value"]).stdout


def restarts(node: Node) -> list[str]:
    """What etcd's unit was asked to do, but for questions."""
    calls = (node.logs / "systemctl.log").read_text().splitlines()
    return [call for call in calls if "etcd" in call and call.split()[0] != "show"]


def by_hand(node: Node, *arguments: str) -> dict[str, Any]:
    """One command of the remediator, as an operator types it on the node."""
    command = [sys.executable, "-m", "remediator", *arguments, "-o", "json"]
    done = node.run(command, check=False, timeout=900)
    print(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


Samples = dict[str, list[tuple[dict[str, str], float]]]


@pytest.fixture(scope="module")
def scrape(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Samples]]:
    """What the node's own exporter publishes."""
    log = (tmp_path_factory.mktemp("exporter") / "log").open("w")
    flags = ["--no-collector.zombies", "--no-collector.rollouts"]
    process = node.popen(
        [sys.executable, "-m", "exporter", "--web.listen-address=0.0.0.0:9790", *flags],
        stdout=log,
        stderr=log,
    )

    def read() -> Samples:
        url = f"http://{address(node)}:9790/metrics"
        ends = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(url, timeout=30) as answer:
                    text = answer.read().decode()
                break
            except OSError:
                assert time.monotonic() < ends, log.name
                time.sleep(0.5)
        found: Samples = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
        return found

    yield read
    process.terminate()
    process.wait(30)


def await_scrape(read: Callable[[], Samples], wanted: Callable[[Samples], bool]) -> Samples:
    """A scrape for which it holds; endpoints are looked at once a minute."""
    ends = time.monotonic() + 150
    while not wanted(found := read()):
        assert time.monotonic() < ends, found.get("upkeep_certificate_stale")
        time.sleep(2)
    return found


def stale(samples: Samples) -> set[str]:
    """Components that use an older certificate than the one on disk."""
    found = samples.get("upkeep_certificate_stale", [])
    return {labels["component"] for labels, value in found if value == 1}


def served(samples: Samples) -> dict[str, str]:
    """Port to the name of the certificate there; one that was down a moment ago may be missing."""
    found = samples.get("upkeep_certificate_served_not_after_timestamp_seconds", [])
    return {labels["endpoint"].rpartition(":")[2]: labels["name"] for labels, _ in found}


def assert_in_use(node: Node, cluster: KubeadmCluster) -> None:
    """Every component is younger than the files, or serves them."""
    root = Root(node.root)
    found = served_certificate(address(node), 6443)
    path = node.root / "etc/kubernetes/ssl/apiserver.crt"
    assert found == x509.load_pem_x509_certificate(path.read_bytes())
    for port in (2379, 2380):
        found = served_certificate(address(node), port)
        assert found == x509.load_pem_x509_certificate(on_disk(node)[f"member-{node.name}.pem"])
    written = max(p.stat().st_mtime for p in (node.root / "etc/kubernetes").glob("*.conf"))
    processes = {p.component: p for p in find_processes(Path("/proc"), root)}
    assert set(processes) >= set(STATIC_PODS)
    assert all(processes[name].started_at >= written - 1 for name in STATIC_PODS)
    assert cluster.kubectl("get", "--raw=/readyz", timeout=60) == "ok"


def test_c32_rotation_renews_kubeadms_and_leaves_etcds_own_alone(
    cluster: KubeadmCluster, node: Node, scrape: Callable[[], Samples]
) -> None:
    set_remaining(node, 3)
    etcd_before, pid_before = on_disk(node), etcd_pid(node)
    serials = kubeadms(node)
    assert set(serials) == KUBEADMS

    seen = await_scrape(scrape, lambda s: {"kube-controller-manager", "kube-scheduler"} <= stale(s))
    days = seen["upkeep_certificate_expiry_days"]
    expiring = {labels["name"] for labels, value in days if value < 14}
    assert expiring == KUBEADMS
    assert {labels["managed_by"] for labels, value in days if value < 14} == {"kubeadm"}
    kubespray = {labels["name"]: v for labels, v in days if labels["managed_by"] == "kubespray"}
    assert set(kubespray) == {f"{kind}-{node.name}" for kind in ("admin", "member", "node")}
    assert min(kubespray.values()) > 36000

    plan = by_hand(node, "run", "rotate-certificates", "--dry-run")
    assert plan["phase"] == "Skipped"
    assert "snapshot of etcd" in json.dumps(plan)

    found = by_hand(node, "run", "rotate-certificates")

    assert (found["phase"], found["reason"]) == ("Succeeded", "Renewed"), found
    results = {step["name"]: step["result"] for step in found["steps"]}
    assert "needs no restart" in results["restart etcd"]
    after = kubeadms(node)
    assert set(after) == KUBEADMS
    assert not serials.items() & after.items()
    assert on_disk(node) == etcd_before
    assert etcd_pid(node) == pid_before
    assert restarts(node) == ["start etcd"]  # when the node was made
    assert_in_use(node, cluster)
    member = f"member-{node.name}"
    wanted = {"6443": "apiserver", "2379": member, "2380": member, "10250": "kubelet"}
    seen = await_scrape(scrape, lambda s: not stale(s) and served(s) == wanted)
    days = seen["upkeep_certificate_expiry_days"]
    assert min(value for labels, value in days if labels["name"] in KUBEADMS) > 360


def test_the_backup_holds_the_snapshot_and_both_pkis(node: Node) -> None:
    (backup,) = (node.root / BACKUPS).glob("2*")
    index = json.loads((backup / "index.json").read_bytes())
    assert index["etcd"]["snapshot"]["by"] == "gateway"
    assert [member["name"] for member in index["etcd"]["members"]] == ["etcd1"]
    assert index["etcd"]["unhealthy"] == []
    assert index["etcd"]["status"]["version"].startswith("3.")
    said = subprocess.run(
        [binary("etcdctl"), "snapshot", "status", backup / "etcd-snapshot.db", "--write-out=json"],
        env={"ETCDCTL_API": "3"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert json.loads(said)["totalKey"] > 50
    with tarfile.open(backup / "files.tar.gz") as archive:
        members = {member.name: member for member in archive}
    assert members["etc/kubernetes/pki"].issym()
    for path in ("etc/kubernetes/ssl/ca.key", "etc/kubernetes/ssl/sa.key", ENVIRONMENT[1:]):
        assert members[path].isreg(), path
    for name in on_disk(node):
        assert members[f"{ETCD_SSL[1:]}/{name}"].isreg(), name


def test_c32_restore_puts_back_etcds_own_too_and_restarts_its_unit(
    cluster: KubeadmCluster, node: Node, scrape: Callable[[], Samples]
) -> None:
    """Kubespray has renewed etcd's certificates since the backup was made."""
    (backup,) = (node.root / BACKUPS).glob("2*")
    wanted = json.loads((backup / "index.json").read_bytes())["serials"]
    etcd_before, pid_before = on_disk(node), etcd_pid(node)
    write_certificates(node.root / ETCD_SSL.lstrip("/"), node.name, address(node))
    assert on_disk(node) != etcd_before
    assert kubeadms(node) != wanted

    plan = by_hand(node, "restore", backup.name, "--dry-run")
    assert "have systemd restart etcd.service" in json.dumps(plan)
    found = by_hand(node, "restore", backup.name)

    assert (found["phase"], found["reason"]) == ("Succeeded", "Restored"), found
    assert kubeadms(node) == wanted
    assert on_disk(node) == etcd_before
    assert etcd_pid(node) != pid_before
    assert restarts(node) == ["start etcd", "restart etcd.service"]
    assert_in_use(node, cluster)
    await_scrape(scrape, lambda s: not stale(s))
    path = node.root / "etc/kubernetes/ssl/apiserver.crt"
    left = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=2) < left < timedelta(days=3)
    assert str((node.root / "etc/kubernetes/pki").readlink()) == "/etc/kubernetes/ssl"


if SOAK:  # a minute or two; the stacked layout's is in every run

    def test_c13_expired_certificates_are_recovered_with_etcd_running_on(
        cluster: KubeadmCluster, node: Node
    ) -> None:
        """etcd's own have not: so there is a snapshot, and etcd is not stopped for a copy."""
        etcd_before, pid_before = on_disk(node), etcd_pid(node)
        set_remaining(node, -1)

        # One member of an etcd on the host says nothing of how many control planes use it.
        left_to_people = by_hand(node, "run", "rotate-certificates")
        assert left_to_people["reason"] == "RecoveryByPerson", left_to_people
        found = by_hand(node, "run", "rotate-certificates", "--force")

        assert (found["phase"], found["reason"]) == ("Succeeded", "Renewed"), found
        assert set(kubeadms(node)) == KUBEADMS
        assert on_disk(node) == etcd_before
        assert etcd_pid(node) == pid_before
        assert_in_use(node, cluster)
        newest = max((node.root / BACKUPS).glob("2*Z"))
        assert json.loads((newest / "index.json").read_bytes())["etcd"]["snapshot"]["size"] > 0
