"""A dry run through the real chain: everything is seen and said, nothing is touched."""

from pathlib import Path

import pytest

from deploy.local.node_stack import node_settings
from deploy.local.observe import remediation
from deploy.local.stack import Stack
from tests.cluster.conditions import stuck_deployment, zombie_maker, zombie_pod
from tests.cluster.kubeadm import KubeadmCluster
from tests.cluster.zombie_makers import descendants
from tests.end_to_end.conftest import records_of, until

pytestmark = [pytest.mark.root, pytest.mark.cluster]


def test_e14_a_dry_run_says_what_it_would_do_and_does_nothing(
    kubeadm_cluster: KubeadmCluster, tmp_path: Path
) -> None:
    with (
        Stack(tmp_path / "stack", node_settings(kubeadm_cluster, enforce=False)) as stack,
        zombie_pod(kubeadm_cluster, zombie_maker("parent", 60, parents=3)) as pod,
        stuck_deployment(kubeadm_cluster, "cpu") as stuck,
    ):
        family = {process.pid for process in descendants(pod.pid)}
        sets = replica_sets(kubeadm_cluster, stuck.namespace)

        def refused(fix: str, where: str) -> bool:
            return [r.reason for r in records_of(stack, fix, where)] == ["DryRun"]

        until("the zombies' refusal", lambda: refused("reap-zombies", pod.namespace), stack)
        until("the rollout's", lambda: refused("unstick-rollout", stuck.namespace), stack)
        for record in records_of(stack):
            assert record.phase == "Skipped"
            assert "nothing done. Would: " in record.message
            assert not remediation(stack.url("remediator"), record.id, stack.token).steps
        assert {process.pid for process in descendants(pod.pid)} == family
        assert replica_sets(kubeadm_cluster, stuck.namespace) == sets


def replica_sets(cluster: KubeadmCluster, namespace: str) -> list[tuple[str, int, str]]:
    """Name, wanted replicas and resourceVersion: the last moves with any write."""
    items = cluster.get("replicasets", f"--namespace={namespace}")["items"]
    return sorted(
        (i["metadata"]["name"], i["spec"]["replicas"], i["metadata"]["resourceVersion"])
        for i in items
    )
