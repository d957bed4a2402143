"""The options of `rotate-certificates`."""

from typing import Annotated, Literal

import msgspec

from remediator.config import Seconds

Positive = Annotated[float, msgspec.Meta(gt=0)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The section `rotate-certificates` of the configuration file."""

    act_below_days: Positive = 14.0
    """A certificate is due when it has fewer days left than this …"""
    act_below_fraction: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0 / 3.0
    """… and less than this part of its whole life."""
    kubeadm: str = ""
    """Path of kubeadm on the host; empty: looked for in the usual directories."""
    kubeadm_config: str = ""
    """A file on the host for `kubeadm --config`; empty: the cluster's own, else its saved copy."""
    kubeadm_timeout: Seconds = Seconds(120)
    """Seconds for one run of kubeadm."""
    backup_directory: str = "/var/lib/upkeep/backups"
    """On the host, mode 0700; each rotation makes one directory in it."""
    keep_backups: Annotated[int, msgspec.Meta(ge=1)] = 5
    """How many that can be put back to keep; older ones are removed after a good rotation."""
    etcd_snapshot: bool = True
    """Whether a checked etcd snapshot belongs to the backup, on nodes that run etcd."""
    restart: Literal["all", "needed", "none"] = "all"
    """Which components get a new process: every one, as kubeadm asks for; only those that never
    read the new files by themselves; or none (then people do it)."""
    component_timeout: Seconds = Seconds(420)
    """Seconds for one component to come back: the kubelet may back off for 160 s and more."""
    kubeconfig_copies: tuple[str, ...] = ("/root/.kube/config",)
    """Copies of admin.conf to renew too, where they hold the same identity."""
    accept_ca_ending_first: bool = False
    """Renew although a CA ends before the new certificates would."""
    require_ready_peers: bool = True
    """Refuse while another control plane node is not Ready."""
    recovery: Literal["single", "person", "never"] = "single"
    """What to do where certificates have expired and the API is gone: act by itself where etcd's
    own database names no other member (`single`); only when a person runs it; or never."""
    deadline: Seconds = Seconds(3600)
    """Seconds for the whole rotation."""

    def __post_init__(self) -> None:
        """A wait of no length would fail every rotation half-way; `~/x` is nobody's path."""
        for name in ("kubeadm_timeout", "component_timeout", "deadline"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be longer than nothing")
        for path in (self.kubeadm, self.kubeadm_config, *self.kubeconfig_copies):
            if path and not path.startswith("/"):
                raise ValueError(f"{path!r} is not an absolute path")
