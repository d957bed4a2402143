"""The metrics and labels that other people's dashboards, routes and scripts may rely on.

Rules and dashboards are held to this list; tests/end_to_end holds the programs to it. Changing it
breaks somebody.
"""

import re
from collections.abc import Iterator

_CERTIFICATE = frozenset(
    ["node", "path", "name", "serial", "subject", "issuer", "usage", "managed_by"]
)
_CONTAINER = frozenset(["node", "namespace", "pod", "container"])

EXPORTER: dict[str, frozenset[str]] = {
    "upkeep_certificate_expiry_days": _CERTIFICATE,
    "upkeep_certificate_not_after_timestamp_seconds": _CERTIFICATE,
    "upkeep_certificate_not_before_timestamp_seconds": _CERTIFICATE,
    "upkeep_certificate_served_not_after_timestamp_seconds": frozenset(
        ["node", "endpoint", "name"]
    ),
    "upkeep_certificate_stale": frozenset(["node", "name", "component"]),
    "upkeep_certificate_read_errors": frozenset(["node", "path", "reason"]),
    "upkeep_zombie_processes": _CONTAINER,
    "upkeep_zombie_oldest_age_seconds": _CONTAINER,
    "upkeep_pids_used": frozenset(["node", "namespace", "pod"]),
    "upkeep_pids_limit": frozenset(["node", "namespace", "pod"]),
    "upkeep_rollout_stuck_seconds": frozenset(["namespace", "deployment", "reason"]),
    "upkeep_rollout_unstickable": frozenset(["namespace", "deployment"]),
    "upkeep_rollout_view_age_seconds": frozenset(),
    "upkeep_workload_unschedulable_seconds": frozenset(["namespace", "kind", "workload"]),
    "upkeep_zombie_unreadable_processes": frozenset(["node"]),
    "upkeep_zombie_scan_fallbacks_total": frozenset(["node", "reason"]),
    "upkeep_scrape_collector_success": frozenset(["collector"]),
    "upkeep_scrape_collector_duration_seconds": frozenset(["collector"]),
    "upkeep_build_info": frozenset(["version", "python"]),
}
REMEDIATOR: dict[str, frozenset[str]] = {
    "upkeep_remediations_total": frozenset(["fix", "phase", "reason"]),
    "upkeep_remediation_duration_seconds_bucket": frozenset(["fix", "le"]),
    "upkeep_remediation_duration_seconds_sum": frozenset(["fix"]),
    "upkeep_remediation_duration_seconds_count": frozenset(["fix"]),
    "upkeep_remediations_active": frozenset(["fix", "phase"]),
    "upkeep_remediation_paused": frozenset(["fix"]),
    "upkeep_webhook_requests_total": frozenset(["code"]),
    "upkeep_webhook_alerts_total": frozenset(["outcome"]),
    "upkeep_last_remediation_timestamp_seconds": frozenset(["fix", "phase"]),
    "upkeep_journal_up": frozenset(),
    "upkeep_journal_errors_total": frozenset(),
    "upkeep_config_last_reload_successful": frozenset(),
    "upkeep_agent_last_seen_timestamp_seconds": frozenset(["node"]),
}
FOREIGN: dict[str, frozenset[str]] = {
    "up": frozenset(),
    "ALERTS": frozenset(["alertname", "alertstate", "severity", "remediation"]),
    "alertmanager_notifications_failed_total": frozenset(["integration"]),
}
METRICS = EXPORTER | REMEDIATOR | FOREIGN
TARGET = frozenset(["cluster", "job", "instance"])
"""Labels that Prometheus itself puts on every series."""
FIXES = ("rotate-certificates", "reap-zombies", "unstick-rollout")

_SELECTOR = re.compile(r"\b(upkeep_\w+|alertmanager_\w+|up|ALERTS)\b\s*(?:\{([^}]*)\})?(?!\s*\()")
_GROUPING = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")


def selectors(expression: str) -> Iterator[tuple[str, frozenset[str]]]:
    """(metric, labels it is selected by) for each selector of a PromQL expression."""
    bare = _GROUPING.sub("", expression)
    for name, matchers in _SELECTOR.findall(bare):
        yield name, frozenset(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers or ""))


def grouped_by(expression: str) -> frozenset[str]:
    """Every label that an expression groups or matches by."""
    found = _GROUPING.findall(expression)
    return frozenset(re.findall(r"\w+", " ".join(found)))


def strangers(expression: str) -> list[str]:
    """What an expression names that the contract doesn't have; empty where all is well."""
    wrong: list[str] = []
    available: set[str] = set(TARGET)
    for metric, labels in selectors(expression):
        if metric not in METRICS:
            wrong.append(f"metric {metric}")
            continue
        available |= METRICS[metric]
        wrong += [f"label {n} of {metric}" for n in sorted(labels - METRICS[metric] - TARGET)]
    wrong += [f"grouping by {name}" for name in sorted(grouped_by(expression) - available)]
    return wrong
