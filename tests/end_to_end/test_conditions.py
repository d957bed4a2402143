"""Each real condition the whole way: exporter, Prometheus, Alertmanager, remediator, healed."""

import pytest

from deploy.local.observe import query, remediation
from deploy.local.stack import Stack
from tests.cluster.conditions import (
    stuck_deployment,
    zombie_maker,
    zombie_pod,
)
from tests.cluster.kubeadm import KubeadmCluster
from tests.cluster.zombie_makers import descendants
from tests.end_to_end.conftest import People, firing, records_of, until

pytestmark = [pytest.mark.root, pytest.mark.cluster]


def test_a_flood_of_zombies_is_seen_cleared_and_told(
    stack: Stack, kubeadm_cluster: KubeadmCluster, people: People
) -> None:
    with zombie_pod(kubeadm_cluster, zombie_maker("parent", 60, parents=3)) as pod:
        where = {"namespace": pod.namespace, "pod": pod.name, "container": "main"}
        until("the alert", lambda: firing(stack, "UpkeepZombieFlood", **where), stack)
        until(
            "a remediation that succeeded",
            lambda: (
                [r.phase for r in records_of(stack, "reap-zombies", pod.namespace)][:1]
                == ["Succeeded"]
            ),
            stack,
        )
        assert not any(process.is_zombie for process in descendants(pod.pid))
        until(
            "the alerts' end",
            lambda: (
                not firing(stack, "UpkeepZombieFlood", **where)
                and not firing(stack, "UpkeepZombieProcesses", **where)
            ),
            stack,
        )
        until("people told", lambda: "UpkeepZombieFlood" in people.alerts("firing"), stack)
    (record,) = records_of(stack, "reap-zombies", pod.namespace)
    assert record.target == f"{pod.namespace}/{pod.name} main"
    assert remediation(stack.url("remediator"), record.id, stack.token).steps
    # Both alerts of the flood came; one container is one remediation.
    gone = f'upkeep_zombie_processes{{namespace="{pod.namespace}"}} > 0'
    until("no series left", lambda: not query(stack.url("prometheus"), gone), stack)


def test_a_few_zombies_below_the_flood_are_left_in_words(
    stack: Stack, kubeadm_cluster: KubeadmCluster
) -> None:
    """PID 1 never waits and five are no flood: nothing is killed, and the record says so."""
    with zombie_pod(kubeadm_cluster, zombie_maker("pid1", 6)) as pod:
        until("a refusal", lambda: bool(records_of(stack, "reap-zombies", pod.namespace)), stack)
        until(
            "its end",
            lambda: (
                records_of(stack, "reap-zombies", pod.namespace)[0].phase
                in ("Skipped", "Failed", "Succeeded")
            ),
            stack,
        )
        assert sum(process.is_zombie for process in descendants(pod.pid)) == 6
        record = records_of(stack, "reap-zombies", pod.namespace)[0]
    assert (record.phase, record.reason) == ("Skipped", "BelowActLimit")
    assert record.message


def test_a_rollout_stuck_on_cpu_is_seen_freed_and_told(
    stack: Stack, kubeadm_cluster: KubeadmCluster, people: People
) -> None:
    with stuck_deployment(kubeadm_cluster, "cpu") as stuck:
        where = {"namespace": stuck.namespace, "deployment": stuck.name}
        until("the alert", lambda: firing(stack, "UpkeepRolloutStuck", **where), stack)
        until(
            "a remediation that succeeded",
            lambda: (
                [r.phase for r in records_of(stack, "unstick-rollout", stuck.namespace)][:1]
                == ["Succeeded"]
            ),
            stack,
        )
        until("its end", lambda: not firing(stack, "UpkeepRolloutStuck", **where), stack)
        found = kubeadm_cluster.get(f"deployment/{stuck.name}", f"--namespace={stuck.namespace}")
        assert found["status"]["updatedReplicas"] == found["status"]["availableReplicas"] == 1
        history = kubeadm_cluster.get("replicasets", f"--namespace={stuck.namespace}")["items"]
        assert sorted(item["spec"]["replicas"] for item in history) == [0, 1]
        until("people told", lambda: "UpkeepRolloutStuck" in people.alerts("resolved"), stack)
    (record,) = records_of(stack, "unstick-rollout", stuck.namespace)
    assert record.target == f"{stuck.namespace}/{stuck.name}"


def test_a_rollout_that_fits_nowhere_goes_to_people_alone(
    stack: Stack, kubeadm_cluster: KubeadmCluster, people: People
) -> None:
    with stuck_deployment(kubeadm_cluster, "unsatisfiable") as stuck:
        where = {"namespace": stuck.namespace, "deployment": stuck.name}
        until("the alert", lambda: firing(stack, "UpkeepRolloutBlocked", **where), stack)
        until("people told", lambda: "UpkeepRolloutBlocked" in people.alerts("firing"), stack)
        assert not firing(stack, "UpkeepRolloutStuck", **where)
        found = kubeadm_cluster.get(f"deployment/{stuck.name}", f"--namespace={stuck.namespace}")
        assert found["status"]["availableReplicas"] == 1
        assert not records_of(stack, "unstick-rollout", stuck.namespace)
