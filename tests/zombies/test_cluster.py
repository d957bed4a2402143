"""On the real kubeadm cluster: a real kubelet starts again what Upkeep stops, and only that.

Facts come from the real API server.
"""

from pathlib import Path

import pytest
import yaml

from exporter.kubernetes import client
from remediator.fixes.zombies import ReapZombies, Settings
from remediator.fixes.zombies.cluster_facts import ClusterFacts
from remediator.model import Phase, Target
from tests.cluster.kubeadm import KubeadmCluster
from tests.cluster.stuck import namespace
from tests.cluster.zombie_makers import zombie_maker, zombies
from tests.cluster.zombie_pods import ZombiePod, container_init, zombie_pod
from tests.zombies.conftest import QUICK, Log
from tests.zombies.node import until

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.cluster]


def facts(cluster: KubeadmCluster) -> ClusterFacts:
    return ClusterFacts(lambda: client(cluster.kubeconfig))


def reaper(cluster: KubeadmCluster, tmp_path: Path) -> ReapZombies:
    settings = {**QUICK, "wait_restart": 120.0, "state_file": str(tmp_path / "restarts.jsonl")}
    return ReapZombies(
        Settings(**settings),  # type: ignore[arg-type]
        rootfs=cluster.nodes[0].root,
        facts=facts(cluster),
    )


def target(pod: ZombiePod) -> Target:
    return Target(node="n1", namespace=pod.namespace, pod=pod.name, container=pod.container)


def container_id(cluster: KubeadmCluster, pod: ZombiePod) -> str:
    found = cluster.get(f"pod/{pod.name}", f"--namespace={pod.namespace}")
    (status,) = found["status"]["containerStatuses"]
    return str(status["containerID"]).rpartition("/")[2]


async def test_z11_the_kubelet_starts_the_container_again_and_once_is_enough(
    kubeadm_cluster: KubeadmCluster, tmp_path: Path
) -> None:
    with zombie_pod(kubeadm_cluster, zombie_maker("pid1", 60)) as pod:
        fix, log = reaper(kubeadm_cluster, tmp_path), Log()
        condition = await fix.check(target(pod))
        assert condition.workload == f"Pod/{pod.namespace}/{pod.name}"
        outcome = await fix.apply(target(pod), condition, log.steps)
        assert (outcome.phase, outcome.reason) == (Phase.SUCCEEDED, "ContainerRestarted")
        assert log.names == ["sigchld", "stop-container", "await-container"]
        assert not (await fix.verify(target(pod), condition)).broken
        until(lambda: container_id(kubeadm_cluster, pod) != pod.container_id, 60)
        new = container_id(kubeadm_cluster, pod)
        first = container_init(kubeadm_cluster.nodes[0], new)
        until(lambda: len(zombies(first)) == 60, 60)
        condition = await fix.check(target(pod))
        outcome = await fix.apply(target(pod), condition, Log().steps)
        assert (outcome.phase, outcome.reason) == (Phase.FAILED, "NeedsPeople")
        assert container_id(kubeadm_cluster, pod) == new


async def test_z10_restart_policy_never_is_respected(
    kubeadm_cluster: KubeadmCluster, tmp_path: Path
) -> None:
    maker = zombie_maker("pid1", 60)
    with zombie_pod(kubeadm_cluster, maker, restart_policy="Never") as pod:
        fix = reaper(kubeadm_cluster, tmp_path)
        condition = await fix.check(target(pod))
        assert condition.plan[-1].startswith("The container is not restarted")
        outcome = await fix.apply(target(pod), condition, Log().steps)
        assert (outcome.phase, outcome.reason) == (Phase.SKIPPED, "RestartNotAllowed")
        assert "restartPolicy is Never" in outcome.message
        assert len(zombies(pod.pid)) == 60


async def test_z13_annotations_of_pod_namespace_and_node_opt_out(
    kubeadm_cluster: KubeadmCluster, tmp_path: Path
) -> None:
    cluster, off = kubeadm_cluster, "upkeep.dev/remediation=disabled"
    with zombie_pod(cluster, zombie_maker("parent", 60)) as pod:
        fix = reaper(cluster, tmp_path)
        assert (await fix.check(target(pod))).opted_out == ""
        node = cluster.get(f"pod/{pod.name}", f"--namespace={pod.namespace}")["spec"]["nodeName"]
        for what in (
            (f"--namespace={pod.namespace}", f"pod/{pod.name}"),
            (f"namespace/{pod.namespace}",),
            (f"node/{node}",),
        ):
            cluster.kubectl("annotate", *what, off)
            try:
                condition = await fix.check(target(pod))
                assert "has the annotation upkeep.dev/remediation" in condition.opted_out
                outcome = await fix.apply(target(pod), condition, Log().steps)
                assert (outcome.phase, outcome.reason) == (Phase.SKIPPED, "OptedOut")
            finally:
                cluster.kubectl("annotate", *what, "upkeep.dev/remediation-")
        assert len(zombies(pod.pid)) == 60


async def test_what_recreates_a_pod_is_its_workload(kubeadm_cluster: KubeadmCluster) -> None:
    with namespace(kubeadm_cluster) as where:
        labels = {"app": "web"}
        deployment = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "web", "namespace": where},
            "spec": {
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {"containers": [{"name": "main", "image": "upkeep.test/none:1"}]},
                },
            },
        }
        kubeadm_cluster.apply(deployment)
        found: list[dict[str, dict[str, str]]] = []

        def there() -> bool:
            found[:] = kubeadm_cluster.get("pods", f"--namespace={where}")["items"]
            return len(found) == 1

        until(there, 60)
        meta = found[0]["metadata"]
        known = await facts(kubeadm_cluster).pod(where, meta["name"], meta["uid"])
        assert (known.restart_policy, known.workload) == ("Always", f"Deployment/{where}/web")
        off = "upkeep.dev/remediation=disabled"
        kubeadm_cluster.kubectl("annotate", f"--namespace={where}", "deployment/web", off)
        known = await facts(kubeadm_cluster).pod(where, meta["name"], meta["uid"])
        assert known.opted_out.endswith("has the annotation upkeep.dev/remediation: disabled")
        other = await facts(kubeadm_cluster).pod(where, meta["name"], "another-uid")
        assert other.restart_policy == ""
        assert "knows another pod" in other.why_unknown


async def test_a_static_pod_is_known_by_the_hash_of_its_manifest(
    kubeadm_cluster: KubeadmCluster,
) -> None:
    (pod,) = kubeadm_cluster.get("pods", "--namespace=kube-system", "-lcomponent=etcd")["items"]
    digest = pod["metadata"]["annotations"]["kubernetes.io/config.hash"]
    known = await facts(kubeadm_cluster).pod("kube-system", pod["metadata"]["name"], digest)
    assert known.restart_policy == "Always"
    assert known.workload.startswith("Node/")


async def test_an_api_server_that_is_away_or_refuses_leaves_everything_unknown(
    tmp_path: Path,
) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    cluster = {"name": "c", "cluster": {"server": "https://127.0.0.1:9"}}
    context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
    config = {"clusters": [cluster], "users": [{"name": "u", "user": {"token": "t"}}]}
    kubeconfig.write_text(yaml.safe_dump({**config, "contexts": [context], "current-context": "x"}))
    known = await ClusterFacts(lambda: client(kubeconfig)).pod("shop", "web-0", "uid")
    assert (known.restart_policy, known.opted_out) == ("", "")
    assert "can't reach https://127.0.0.1:9" in known.why_unknown
    kubeconfig.write_text("{")
    known = await ClusterFacts(lambda: client(kubeconfig)).pod("shop", "web-0", "uid")
    assert known.restart_policy == ""
    assert str(kubeconfig) in known.why_unknown
