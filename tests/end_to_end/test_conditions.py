"""Zombies and rollouts the whole way: exporter, Prometheus, Alertmanager, remediator, healed.

What is to be healed and what is to be left alone stand beside each other, as on a real node.
"""

import pytest

from deploy.local.observe import query, remediation
from deploy.local.stack import Stack
from tests.cluster.conditions import stuck_deployment, zombie_maker, zombie_pod
from tests.cluster.kubeadm import KubeadmCluster
from tests.cluster.zombie_makers import descendants
from tests.end_to_end.conftest import People, firing, records_of, until

pytestmark = [pytest.mark.root, pytest.mark.cluster]


def healed(stack: Stack, fix: str, where: str) -> str:
    """The id of the one remediation there that succeeded; empty while there is none.

    An alert that was offered again before it was over may have left a refusal beside it.
    """
    phases = {record.id: record.phase for record in records_of(stack, fix, where)}
    assert set(phases.values()) <= {"Pending", "Admitted", "Running", "Succeeded", "Skipped"}
    done = [identity for identity, phase in phases.items() if phase == "Succeeded"]
    assert len(done) <= 1
    return "".join(done)


def test_a_flood_of_zombies_is_cleared_and_a_few_are_left_in_words(
    stack: Stack, kubeadm_cluster: KubeadmCluster, people: People
) -> None:
    """The few have a PID 1 that never waits; they are no flood, so nothing is killed for them."""
    with (
        zombie_pod(kubeadm_cluster, zombie_maker("pid1", 6)) as few,
        zombie_pod(kubeadm_cluster, zombie_maker("parent", 60, parents=3)) as flood,
    ):
        where = {"namespace": flood.namespace, "pod": flood.name, "container": "main"}
        until("the alert", lambda: firing(stack, "UpkeepZombieFlood", **where), stack)
        until("the cure", lambda: bool(healed(stack, "reap-zombies", flood.namespace)), stack)
        assert not any(process.is_zombie for process in descendants(flood.pid))
        until(
            "the alerts' end",
            lambda: (
                not firing(stack, "UpkeepZombieFlood", **where)
                and not firing(stack, "UpkeepZombieProcesses", **where)
            ),
            stack,
        )
        until("people told", lambda: "UpkeepZombieFlood" in people.alerts("firing"), stack)
        until(
            "words about the few",
            lambda: (
                [r.reason for r in records_of(stack, "reap-zombies", few.namespace)]
                == ["BelowActLimit"]
            ),
            stack,
        )
        assert sum(process.is_zombie for process in descendants(few.pid)) == 6
    (refused,) = records_of(stack, "reap-zombies", few.namespace)
    assert refused.phase == "Skipped"
    assert refused.message
    record = remediation(
        stack.url("remediator"), healed(stack, "reap-zombies", flood.namespace), stack.token
    )
    assert record.target == f"{flood.namespace}/{flood.name} main"
    assert record.steps
    gone = f'upkeep_zombie_processes{{namespace="{flood.namespace}"}} > 0'
    until("no series left", lambda: not query(stack.url("prometheus"), gone), stack)


def test_a_rollout_stuck_on_cpu_is_freed_and_one_that_fits_nowhere_goes_to_people(
    stack: Stack, kubeadm_cluster: KubeadmCluster, people: People
) -> None:
    with (
        stuck_deployment(kubeadm_cluster, "unsatisfiable") as hopeless,
        stuck_deployment(kubeadm_cluster, "cpu") as stuck,
    ):
        where = {"namespace": stuck.namespace, "deployment": stuck.name}
        elsewhere = {"namespace": hopeless.namespace, "deployment": hopeless.name}
        until("the alert", lambda: firing(stack, "UpkeepRolloutStuck", **where), stack)
        until("the cure", lambda: bool(healed(stack, "unstick-rollout", stuck.namespace)), stack)
        until("its end", lambda: not firing(stack, "UpkeepRolloutStuck", **where), stack)
        found = kubeadm_cluster.get(f"deployment/{stuck.name}", f"--namespace={stuck.namespace}")
        assert found["status"]["updatedReplicas"] == found["status"]["availableReplicas"] == 1
        history = kubeadm_cluster.get("replicasets", f"--namespace={stuck.namespace}")["items"]
        assert sorted(item["spec"]["replicas"] for item in history) == [0, 1]

        until("the other", lambda: firing(stack, "UpkeepRolloutBlocked", **elsewhere), stack)
        assert not firing(stack, "UpkeepRolloutStuck", **elsewhere)
        found = kubeadm_cluster.get(
            f"deployment/{hopeless.name}", f"--namespace={hopeless.namespace}"
        )
        assert found["status"]["availableReplicas"] == 1
        assert not records_of(stack, "unstick-rollout", hopeless.namespace)
        until("people told", lambda: "UpkeepRolloutBlocked" in people.alerts("firing"), stack)
        until("and of the end", lambda: "UpkeepRolloutStuck" in people.alerts("resolved"), stack)
