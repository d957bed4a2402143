"""A dry run through the real chain: everything is seen and said, nothing is touched."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from deploy.local.observe import remediation
from deploy.local.stack import Settings, Stack
from tests.cluster.conditions import stuck_deployment, zombie_maker, zombie_pod
from tests.cluster.kubeadm import KubeadmCluster
from tests.cluster.zombie_makers import descendants
from tests.end_to_end.conftest import records_of, until

pytestmark = [pytest.mark.root, pytest.mark.cluster]


@pytest.fixture
def dry(stack: Stack) -> Iterator[Stack]:
    """The stack, with its remediator started again as a dry run."""
    settings = stack.settings
    restart(stack, replace(settings, enforce=False))
    yield stack
    restart(stack, settings)


def restart(stack: Stack, settings: Settings) -> None:
    stack.stop("remediator")
    stack.settings = settings
    stack.start("remediator")


def test_e14_a_dry_run_says_what_it_would_do_and_does_nothing(
    dry: Stack, kubeadm_cluster: KubeadmCluster
) -> None:
    with (
        zombie_pod(kubeadm_cluster, zombie_maker("parent", 60, parents=3)) as pod,
        stuck_deployment(kubeadm_cluster, "cpu") as stuck,
    ):
        family = {process.pid for process in descendants(pod.pid)}
        sets = replica_sets(kubeadm_cluster, stuck.namespace)

        def refused(fix: str, where: str) -> bool:
            return [r.reason for r in records_of(dry, fix, where)] == ["DryRun"]

        until("the zombies' refusal", lambda: refused("reap-zombies", pod.namespace), dry)
        until("the rollout's", lambda: refused("unstick-rollout", stuck.namespace), dry)
        for where in (pod.namespace, stuck.namespace):
            (record,) = records_of(dry, target=where)
            assert record.phase == "Skipped"
            assert "nothing done. Would: " in record.message
            assert not remediation(dry.url("remediator"), record.id, dry.token).steps
        assert {process.pid for process in descendants(pod.pid)} == family
        assert replica_sets(kubeadm_cluster, stuck.namespace) == sets


def replica_sets(cluster: KubeadmCluster, namespace: str) -> list[tuple[str, int, str]]:
    """Name, wanted replicas and resourceVersion: the last moves with any write."""
    items = cluster.get("replicasets", f"--namespace={namespace}")["items"]
    return sorted(
        (i["metadata"]["name"], i["spec"]["replicas"], i["metadata"]["resourceVersion"])
        for i in items
    )
