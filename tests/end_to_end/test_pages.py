"""What both programs publish, read by the real Prometheus and held to the contract.

The order of files lets this run after the conditions have left their traces in Prometheus; it
brings what it needs itself where it is run alone.
"""

import re
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.debian import binary
from deploy.local.observe import get_json, get_text, query
from deploy.local.stack import Stack
from tests.alerts.contract import EXPORTER, FIXES, REMEDIATOR
from tests.alerts.test_dashboard import QUERIES, filled
from tests.cluster.conditions import stuck_deployment, zombie_maker, zombie_pod
from tests.cluster.kubeadm import KubeadmCluster
from tests.end_to_end.conftest import until

pytestmark = [pytest.mark.root, pytest.mark.cluster]

# What has no series on a node that is well, and in host mode.
QUIET = {
    "Not taken up A",
    "Can't be read A",
    "annotation Healed",
    "annotation Failed",
    "Last ends A",
    "Ended, by fix and reason A",
    "At work now A",
    "How long they took A",
    "How long they took B",
    "Stuck for A",
    "Would freeing old pods help? A",
    "Alerts A",
    "Answering B",
    "Other workloads without a node A",
    "Sound D",
    "Zombies by container A",  # seen with some in test_series_have_the_labels_of_the_contract
}


def page(stack: Stack, program: str) -> str:
    """The program's /metrics."""
    return get_text(f"{stack.url(program)}/metrics", stack.token)


@pytest.mark.parametrize("program", ["exporter", "remediator"])
def test_promtool_has_nothing_to_say_but_of_the_days(stack: Stack, program: str) -> None:
    done = subprocess.run(
        [str(binary("promtool")), "check", "metrics"],
        input=page(stack, program),
        capture_output=True,
        text=True,
        check=False,
    )
    said = (done.stdout + done.stderr).splitlines()
    days = 'upkeep_certificate_expiry_days use base unit "seconds" instead of "days"'
    assert said == ([days] if program == "exporter" else [])


def test_series_have_the_labels_of_the_contract(
    stack: Stack, kubeadm_cluster: KubeadmCluster
) -> None:
    """With trouble of each kind there, so that every family has a series."""
    with (
        zombie_pod(kubeadm_cluster, zombie_maker("pid1", 3)),
        stuck_deployment(kubeadm_cluster, "unsatisfiable"),
    ):
        seen: dict[str, set[frozenset[str]]] = {}

        def complete() -> bool:
            seen.clear()
            for program in ("exporter", "remediator"):
                for family in text_string_to_metric_families(page(stack, program)):
                    for sample in family.samples:
                        seen.setdefault(sample.name, set()).add(frozenset(sample.labels))
            return wanted <= set(seen)

        wanted = {*EXPORTER, *REMEDIATOR} - {
            "upkeep_certificate_read_errors",  # every file is well
            "upkeep_agent_last_seen_timestamp_seconds",  # there are no agents in host mode
            "upkeep_workload_unschedulable_seconds",  # every StatefulSet and DaemonSet has its node
        }
        until("a series of each family", complete, stack)
        by_container = filled(QUERIES["Zombies by container A"])
        prometheus = stack.url("prometheus")
        until("them in Prometheus", lambda: bool(query(prometheus, by_container)), stack)
    for name, labels in seen.items():
        if name in EXPORTER or name in REMEDIATOR:
            assert labels == {(EXPORTER | REMEDIATOR)[name]}, name


def test_every_known_value_of_a_label_is_there_from_the_start(stack: Stack) -> None:
    text = page(stack, "remediator")
    for fix in FIXES:
        for phase in ("Succeeded", "Failed", "Skipped"):
            assert re.search(
                rf'upkeep_last_remediation_timestamp_seconds{{fix="{fix}",phase="{phase}"}} ', text
            )
            assert re.search(rf'upkeep_remediations_total{{fix="{fix}",phase="{phase}",', text)
        for phase in ("Pending", "Admitted", "Running"):
            assert re.search(rf'upkeep_remediations_active{{fix="{fix}",phase="{phase}"}} ', text)
        assert f'upkeep_remediation_paused{{fix="{fix}"}} 0' in text
    for code in ("200", "401", "503"):
        assert re.search(rf'upkeep_webhook_requests_total{{code="{code}"}} ', text)


def test_prometheus_keeps_the_labels_as_they_are(stack: Stack) -> None:
    """honor_labels: nothing is renamed to exported_…, and the host's empty labels stay empty."""
    prometheus = stack.url("prometheus")
    until("a scrape", lambda: bool(query(prometheus, "upkeep_pids_limit")), stack)
    assert not query(prometheus, '{__name__=~"upkeep_.*", exported_namespace!=""}')
    assert query(prometheus, 'upkeep_zombie_processes{namespace="", pod="", container=""}')


@pytest.mark.parametrize("where", QUERIES)
def test_the_dashboard_query_is_answered(stack: Stack, where: str) -> None:
    """No error from the real Prometheus; and data, where a node that is well has some."""
    prometheus = stack.url("prometheus")
    expression = filled(QUERIES[where])
    if where in QUIET:
        query(prometheus, expression)
    else:
        until(f"data for {where}", lambda: bool(query(prometheus, expression)), stack, within=90)


def test_the_rules_are_loaded_and_healthy(stack: Stack) -> None:
    def healths() -> set[str]:
        groups = get_json(f"{stack.url('prometheus')}/api/v1/rules")["data"]["groups"]
        return {rule["health"] for group in groups for rule in group["rules"]}

    until("an evaluation of each rule", lambda: healths() == {"ok"}, stack)


def test_no_secret_stands_in_a_log_or_on_a_page(stack: Stack) -> None:
    texts = [path.read_text(errors="replace") for path in Path(stack.directory).glob("*.log")]
    texts += [page(stack, program) for program in ("exporter", "remediator")]
    texts.append(get_text(stack.url("remediator"), stack.token))
    for text in texts:
        assert stack.token not in text
        assert "PRIVATE KEY" not in text
