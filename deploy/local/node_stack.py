"""The stack on a node of a test cluster, as on an operator's: for `make demo` and end-to-end tests.

Exporter and remediator run inside the node and see its processes, files and cgroups; Prometheus and
Alertmanager stand beside them, and everything is reached from outside at the node's address.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from deploy.local.alerting import Timing
from deploy.local.stack import Settings
from tests.cluster.kubeadm import KubeadmCluster
from tests.cluster.netns import Network

KUBECONFIG = "/etc/kubernetes/admin.conf"
MIN_AGE = 5.0
"""Seconds after which a zombie counts, instead of thirty."""
PATIENCE = Timing(scrape=2, rule_for=10, group_wait=1, group_interval=10, repeat_interval=30)
"""Minutes become seconds; a refused request is offered again after half a minute."""


def node_settings(
    cluster: KubeadmCluster,
    *,
    index: int = 0,
    enforce: bool = True,
    timing: Timing = PATIENCE,
    fixes: Mapping[str, Mapping[str, Any]] | None = None,
    remediator: Sequence[str] = (),
) -> Settings:
    """How to run the stack on one node of the cluster.

    fixes: more for the remediator's configuration, by fix; its `settings` are merged.
    """
    node = cluster.nodes[index]
    flags = [f"--node-name={node.name}", f"--kubeconfig={KUBECONFIG}"]
    waits: dict[str, dict[str, Any]] = {
        "reap-zombies": {"settings": {"min_age": MIN_AGE}},
        "unstick-rollout": {"settings": {"min_stuck": MIN_AGE}},
        "rotate-certificates": {},
    }
    for name, more in (fixes or {}).items():
        merged = {**waits[name].get("settings", {}), **more.get("settings", {})}
        waits[name] = {**waits[name], **more, "settings": merged}
    return Settings(
        exporter=[*flags, f"--zombies.min-age={MIN_AGE:g}"],
        remediator=[*flags, *remediator],
        remediator_config={"fixes": {name: fix for name, fix in waits.items() if fix}},
        enforce=enforce,
        timing=timing,
        inside=node.command([]),
        address=Network(node.state.network).node(node.state.index),
    )
