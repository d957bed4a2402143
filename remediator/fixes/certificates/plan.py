"""What a rotation is going to do, as the preflight found it."""

import msgspec

from exporter.checks.certificates import Root
from exporter.checks.certificates.components import MANIFESTS
from remediator.fixes.certificates.layout import ETCD_STASH, Layout
from remediator.fixes.certificates.settings import Settings

COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
"""In the order in which they are restarted: each needs the ones before it."""


class RotationPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the preflight found, and therefore how to rotate."""

    layout: Layout
    due: tuple[str, ...]
    """Names of the certificates that called for it; all are renewed."""
    config: str
    """For `kubeadm --config`, on the host; empty: kubeadm's defaults."""
    fetched_config: str = ""
    """The cluster's own configuration, to be saved where `config` says; empty if not at hand."""
    components: tuple[str, ...] = ()
    """The static pods of this node, in the order of COMPONENTS; empty: a PKI on its own."""
    recovery: bool = False
    """The API can't be reached because certificates have expired."""

    @property
    def has_cluster(self) -> bool:
        """Whether there is an API server to ask, and others to keep clear of."""
        return "kube-apiserver" in self.components

    @property
    def has_etcd(self) -> bool:
        """Whether a member of etcd runs on this node, as a static pod or as a unit of the host."""
        return "etcd" in self.components or (self.has_cluster and self.layout.etcd == "host")


class RefusedError(Exception):
    """Renewing now would not be safe, or would not help."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def components_here(root: Root) -> tuple[str, ...]:
    """The control plane's static pods on this node."""
    found = {c for c in COMPONENTS if root.exists(f"{MANIFESTS}/{c}.yaml")}
    if root.exists(ETCD_STASH):
        found.add("etcd")
    return tuple(c for c in COMPONENTS if c in found)


def saved_configuration(settings: Settings) -> str:
    """Where the cluster's kubeadm configuration is kept for when the API is down."""
    return f"{settings.backup_directory}/kubeadm-config.yaml"
