"""E1 through the real chain: the remediator is killed between the 200 and the fix."""

import re

import pytest

from deploy.local.observe import get_text, remediation
from deploy.local.stack import Stack
from tests.cluster.conditions import zombie_maker, zombie_pod
from tests.cluster.kubeadm import KubeadmCluster
from tests.cluster.zombie_makers import descendants
from tests.end_to_end.conftest import log_of, records_of, until

pytestmark = [pytest.mark.root, pytest.mark.cluster]


def answered(stack: Stack) -> float:
    """How many webhooks were answered with 200 since the remediator started."""
    page = get_text(f"{stack.url('remediator')}/metrics", stack.token)
    (value,) = re.findall(
        r'^upkeep_webhook_requests_total\{code="200"\} (\S+)$', page, re.MULTILINE
    )
    return float(value)


def test_e1_killed_between_the_200_and_the_fix_it_is_done_once(
    stack: Stack, kubeadm_cluster: KubeadmCluster
) -> None:
    """Prometheus and Alertmanager are gone by then: only the journal can know of it."""
    stack.stop("remediator")
    stack.start("remediator")  # its counters stand at nothing
    with zombie_pod(kubeadm_cluster, zombie_maker("parent", 60, parents=3)) as pod:
        # The fix looks twice, five seconds apart: that is the time in which it is killed.
        until("the 200", lambda: bool(records_of(stack, "reap-zombies", pod.namespace)), stack)
        (accepted,) = records_of(stack, "reap-zombies", pod.namespace)
        stack.kill("remediator")
        assert accepted.phase == "Pending"
        assert sum(process.is_zombie for process in descendants(pod.pid)) == 60
        stack.stop("prometheus")
        stack.stop("alertmanager")
        try:
            stack.start("remediator")
            assert answered(stack) == 0
            until(
                "the fix, after the restart",
                lambda: records_of(stack, "reap-zombies", pod.namespace)[0].phase == "Succeeded",
                stack,
            )
            assert not any(process.is_zombie for process in descendants(pod.pid))
            assert answered(stack) == 0
        finally:
            stack.start("alertmanager")
            stack.start("prometheus")
        # Alertmanager may have offered the alert again meanwhile: nothing is left to act on.
        found = records_of(stack, "reap-zombies", pod.namespace)
        details = [remediation(stack.url("remediator"), r.id, stack.token) for r in found]
        done = [record for record in details if record.steps]
        assert [record.id for record in done] == [accepted.id]
    ended = re.findall(
        rf"event=ended phase=Succeeded .*remediation={re.escape(accepted.id)}\b",
        log_of(stack, "remediator"),
    )
    assert len(ended) == 1
