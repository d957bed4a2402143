"""The real kubeadm cluster: it is one, the conditions in it are real, and it leaves no trace."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.cluster import lifetime
from tests.cluster.certificates import (
    component_pid,
    expire_certificates,
    served_certificate,
)
from tests.cluster.kubeadm import COMPONENTS, KubeadmCluster
from tests.cluster.netns import Network
from tests.cluster.node import PROJECT, inner_pid
from tests.cluster.pki import read_certificates
from tests.cluster.stuck import KINDS, SERVICE_LABEL, deployment, namespace, stuck_deployment
from tests.cluster.test_containerd import eventually, traces
from tests.cluster.zombie_makers import KINDS as ZOMBIE_KINDS
from tests.cluster.zombie_makers import descendants, zombie_maker, zombies
from tests.cluster.zombie_pods import zombie_pod

pytestmark = [pytest.mark.root, pytest.mark.cluster]


def test_the_control_plane_is_static_pods_of_a_real_kubelet(
    kubeadm_cluster: KubeadmCluster,
) -> None:
    node = kubeadm_cluster.nodes[0]
    assert kubeadm_cluster.kubectl("get", "nodes", "--no-headers").split()[:2] == [
        node.name,
        "Ready",
    ]
    pods = kubeadm_cluster.get("pods", "--namespace=kube-system")["items"]
    assert {pod["metadata"]["name"] for pod in pods} == {f"{c}-{node.name}" for c in COMPONENTS}
    for component in COMPONENTS:
        pid = component_pid(node, component)
        assert pid is not None
        assert "/kubepods/burstable/pod" in Path(f"/proc/{pid}/cgroup").read_text()
    # One for each container there was: more than four once a test has restarted a component.
    links = [path.name for path in (node.root / "var/log/containers").glob("*_kube-system_*")]
    assert {link.partition("-upkeep-")[0] for link in links} == set(COMPONENTS)


def test_an_ended_component_is_started_again_by_the_kubelet(
    kubeadm_cluster: KubeadmCluster,
) -> None:
    node = kubeadm_cluster.nodes[0]
    before = component_pid(node, "kube-scheduler")
    assert before is not None
    os.kill(before, signal.SIGTERM)
    kubeadm_cluster.wait(
        "a new scheduler",
        lambda: component_pid(node, "kube-scheduler") not in {None, before},
    )


def test_ordinary_pods_have_addresses_that_the_machine_reaches(
    kubeadm_cluster: KubeadmCluster,
) -> None:
    with namespace(kubeadm_cluster) as where:
        pod = deployment(where, "web")
        page = "mkdir /www; echo hello > /www/index.html; httpd -f -p 8080 -h /www"
        container = pod["spec"]["template"]["spec"]["containers"][0]
        container["command"] = ["sh", "-c", page]
        kubeadm_cluster.apply(pod)
        selector = [f"--selector={SERVICE_LABEL}=web", f"--namespace={where}"]
        kubeadm_cluster.kubectl(
            "wait", "pod", "--for=condition=Ready", "--timeout=60s", *selector, timeout=90
        )
        address = kubeadm_cluster.get("pods", *selector)["items"][0]["status"]["podIP"]
        fetch = [sys.executable, "-c", _FETCH, f"http://{address}:8080/"]
        assert eventually(lambda: subprocess.check_output(fetch, text=True) == "hello\n")
        assert kubeadm_cluster.nodes[0].run(fetch).stdout == "hello\n"


_FETCH = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode(), end='')"


def test_programs_in_the_node_see_a_node_like_any_other(kubeadm_cluster: KubeadmCluster) -> None:
    node = kubeadm_cluster.nodes[0]
    done = node.run(["kubectl", "--kubeconfig=/etc/kubernetes/admin.conf", "get", "nodes"])
    assert node.name in done.stdout
    etcd = component_pid(node, "etcd")
    assert etcd is not None
    inner = inner_pid(etcd)
    assert node.run(["cat", f"/proc/{inner}/comm"]).stdout == "etcd\n"
    seen = node.run(["cat", f"/proc/{inner}/cgroup"]).stdout
    assert ":/kubepods/burstable/pod" in seen
    assert (node.root / "etc/kubernetes/manifests/etcd.yaml").exists()
    assert not Path("/etc/kubernetes/manifests/etcd.yaml").exists()


@pytest.mark.parametrize("kind", ZOMBIE_KINDS)
def test_pods_leave_zombies_of_every_kind(kubeadm_cluster: KubeadmCluster, kind: str) -> None:
    with zombie_pod(kubeadm_cluster, zombie_maker(kind, 6)) as pod:
        below = descendants(pod.pid)
        assert len(zombies(pod.pid)) == (0 if kind in {"leader", "imitation"} else 6)
        assert sum(p.is_lookalike for p in below) == (6 if kind == "leader" else 0)
        link = f"{pod.name}_{pod.namespace}_{pod.container}-{pod.container_id}.log"
        assert (kubeadm_cluster.nodes[0].root / "var/log/containers" / link).is_symlink()
    assert eventually(lambda: not Path(f"/proc/{pod.pid}").exists())


@pytest.mark.parametrize("kind", KINDS)
def test_deployments_get_stuck_in_every_way_while_the_old_pods_serve(
    kubeadm_cluster: KubeadmCluster, kind: str
) -> None:
    replicas = 2 if kind == "cpu" else 1
    with stuck_deployment(kubeadm_cluster, kind, replicas=replicas) as stuck:
        assert KINDS[kind] in stuck.message
        there = kubeadm_cluster.get(f"deployment/{stuck.name}", f"--namespace={stuck.namespace}")
        assert there["status"]["availableReplicas"] == replicas
        assert there["status"].get("updatedReplicas", 0) == (0 if kind == "quota" else 1)
        if stuck.freeable:
            _scale_old_replica_set(kubeadm_cluster, stuck.namespace, replicas - 1)
            kubeadm_cluster.wait(
                "the new pod available",
                lambda: _new_available(kubeadm_cluster, stuck.namespace) == 1,
            )
    capacity = kubeadm_cluster.get("nodes")["items"][0]["status"]["capacity"]
    assert not [name for name in capacity if "upkeep" in name]


def _replica_sets(cluster: KubeadmCluster, where: str) -> list[dict[str, object]]:
    """Of "web", the oldest revision first."""
    selector = f"--selector={SERVICE_LABEL}=web"
    listed = cluster.get("replicasets", f"--namespace={where}", selector)["items"]
    revision = "deployment.kubernetes.io/revision"
    return sorted(listed, key=lambda item: int(item["metadata"]["annotations"][revision]))


def _scale_old_replica_set(cluster: KubeadmCluster, where: str, replicas: int) -> None:
    metadata = _replica_sets(cluster, where)[0]["metadata"]
    assert isinstance(metadata, dict)
    target = f"replicaset/{metadata['name']}"
    cluster.kubectl("scale", target, f"--namespace={where}", f"--replicas={replicas}")


def _new_available(cluster: KubeadmCluster, where: str) -> int:
    status = _replica_sets(cluster, where)[-1]["status"]
    assert isinstance(status, dict)
    return int(status.get("availableReplicas", 0))


def test_certificates_end_when_wanted_and_are_served(kubeadm_cluster: KubeadmCluster) -> None:
    cluster, node = kubeadm_cluster, kubeadm_cluster.nodes[0]
    address = Network(node.state.network).node(1)
    signed = expire_certificates(cluster, node, timedelta(days=3))
    assert len(signed) == 10
    for port, name in ((6443, "apiserver"), (2379, "etcd-server"), (2380, "etcd-peer")):
        assert served_certificate(address, port) == signed[name]
    said = node.run(["kubeadm", "certs", "check-expiration"], cwd="/").stdout
    ends = signed["apiserver"].not_valid_after_utc.strftime("%b %d, %Y %H:%M UTC")
    assert said.count(ends) == 10

    expire_certificates(cluster, node, -timedelta(days=1))
    served = served_certificate(address, 2379)
    assert served is not None
    assert served.not_valid_after_utc < datetime.now(UTC)
    assert cluster.kubectl("get", "--raw=/readyz", check=False, timeout=30) != "ok"

    node.run(["kubeadm", "certs", "renew", "all", "--config=/etc/kubernetes/kubeadm.yaml"], cwd="/")
    renewed = read_certificates(node.root / "etc/kubernetes")
    assert renewed["apiserver"].not_valid_after_utc > datetime.now(UTC) + timedelta(days=360)
    expire_certificates(cluster, node, timedelta(days=365))
    assert cluster.kubectl("get", "--raw=/readyz") == "ok"
    ca = (node.root / "etc/kubernetes/pki/ca.crt").read_text()
    context = ssl.create_default_context(cadata=ca)
    with socket.create_connection((address, 6443), 10) as connection:
        context.wrap_socket(connection, server_hostname=address).close()


def test_up_leaves_a_cluster_running_and_down_removes_it() -> None:
    """Beside the cluster of the other tests: two never meet."""
    command = [sys.executable, "-m", "tests.cluster"]
    up = subprocess.run([*command, "up"], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert up.returncode == 0, up.stderr
    last = up.stdout.splitlines()[-1]
    assert last.startswith("KUBECONFIG=/")
    kubeconfig = Path(last.removeprefix("KUBECONFIG="))
    node = kubeconfig.parent.name
    state = next(state for state in lifetime.states() if state.name == node)
    assert state.detached
    assert kubeconfig.stat().st_mode & 0o077 == 0
    kubectl = next(line.split()[2] for line in up.stdout.splitlines() if "kubectl is" in line)
    nodes = [kubectl.rstrip(";"), f"--kubeconfig={kubeconfig}", "get", "nodes", "--no-headers"]
    assert subprocess.check_output(nodes, text=True).split()[:2] == [node, "Ready"]
    assert traces(node, []) != []
    down = subprocess.run([*command, "down", state.cluster], cwd=PROJECT, check=False)
    assert down.returncode == 0
    assert traces(node, []) == []
    assert not kubeconfig.parent.exists()


def test_down_names_a_cluster_that_is_not_there() -> None:
    command = [sys.executable, "-m", "tests.cluster", "down", "upkeep-never"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no cluster upkeep-never runs" in done.stdout
