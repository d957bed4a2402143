"""What the rest of the cluster must be like for this node to rotate; asked, never changed."""

from typing import Any

import yaml

from exporter.checks.certificates import Root
from exporter.checks.certificates.components import manifest_flags
from exporter.kubernetes.access import AccessError
from exporter.kubernetes.client import ApiError
from remediator.fixes.certificates.apiserver import ApiServer
from remediator.fixes.certificates.plan import RefusedError

_ROLES = ("node-role.kubernetes.io/control-plane", "node-role.kubernetes.io/master")
OPT_OUT = "upkeep.dev/remediation"
_CONFIGURATION = "/api/v1/namespaces/kube-system/configmaps/kubeadm-config"


async def refuse_unready_peers(api: ApiServer, node: str) -> None:
    """RefusedError while another control plane node is not Ready. ApiError, AccessError."""
    nodes = await api.get("/api/v1/nodes?limit=5000")
    unready = [
        item["metadata"]["name"]
        for item in (nodes or {}).get("items", ())
        if item["metadata"]["name"] != node
        and any(role in (item["metadata"].get("labels") or {}) for role in _ROLES)
        and not _is_ready(item)
    ]
    if unready:
        raise RefusedError(
            "PeerNotReady",
            f"control plane nodes not Ready: {', '.join(unready)}; mend them first",
        )


async def opted_out(api: ApiServer, node: str) -> str:
    """Which annotation forbids acting on the node, as a sentence; empty where none does.

    Without an API server only the configuration's own list counts, which the worker has read.
    """
    try:
        found = await api.get(f"/api/v1/nodes/{node}")
    except (ApiError, AccessError):
        return ""
    annotations = ((found or {}).get("metadata") or {}).get("annotations") or {}
    if annotations.get(OPT_OUT) != "disabled":
        return ""
    return f"the annotation {OPT_OUT}: disabled on node {node} forbids it"


def _is_ready(node: dict[str, Any]) -> bool:
    conditions = (node.get("status") or {}).get("conditions") or ()
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)


async def fetch_configuration(api: ApiServer, root: Root, node: str) -> str:
    """The cluster's kubeadm configuration, made fit for `kubeadm --config`; empty if it has none.

    kubeadm looks up an address and a container runtime where the file names none, which fails on
    odd machines and is of no use here: so it is told.
    """
    try:
        found = await api.get(_CONFIGURATION)
    except (ApiError, AccessError):
        return ""
    text = ((found or {}).get("data") or {}).get("ClusterConfiguration", "")
    try:
        version = yaml.safe_load(text)["apiVersion"]
    except (yaml.YAMLError, TypeError, KeyError):
        return ""
    return _for_this_node(text, version, root, node)


def default_configuration(version: tuple[int, int], root: Root, node: str) -> str:
    """kubeadm's own defaults, said to it: without any file it asks the cluster, and an API server
    that has lost its etcd lets it wait until its time is up. version: kubeadm's."""
    _, minor = version
    of_format = "v1beta2" if minor < 22 else "v1beta3" if minor < 31 else "v1beta4"
    cluster = {
        "apiVersion": f"kubeadm.k8s.io/{of_format}",
        "kind": "ClusterConfiguration",
        "kubernetesVersion": f"v1.{minor}.0",
    }
    return _for_this_node(yaml.safe_dump(cluster), cluster["apiVersion"], root, node)


def _for_this_node(text: str, version: str, root: Root, node: str) -> str:
    address = manifest_flags(root, "kube-apiserver").get("advertise-address", "")
    init = {
        "apiVersion": version,
        "kind": "InitConfiguration",
        "localAPIEndpoint": {"advertiseAddress": address or "192.0.2.1"},
        "nodeRegistration": {
            "name": node,
            "criSocket": "unix:///run/containerd/containerd.sock",
        },
    }
    return f"{text.rstrip()}\n---\n{yaml.safe_dump(init)}"
