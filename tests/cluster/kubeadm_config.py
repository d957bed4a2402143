"""The configuration files of a kubeadm node: kubeadm's own, the kubelet's and the CNI's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from tests.cluster.netns import Network
from tests.cluster.node_init import Service

KUBELET_CONFIG = "/var/lib/kubelet/config.yaml"
CRI_SOCKET = "unix:///run/containerd/containerd.sock"
_VOLUME_PLUGINS = "/var/lib/kubelet/volume-plugins"


@dataclass(frozen=True)
class Settings:
    """What a test may want otherwise."""

    max_pods: int = 20
    """Pods per node: few, so that a test can fill it. A node has 253 addresses for them."""
    pod_pids_limit: int = -1
    """pids.max of every pod; -1: none."""
    control_plane_endpoint: str = ""
    """host:port that stands for all control planes; empty: the first node's own address."""
    cluster: Mapping[str, Any] = field(default_factory=dict)
    """More of kubeadm's ClusterConfiguration."""
    kubelet: Mapping[str, Any] = field(default_factory=dict)
    """More of every kubelet's configuration."""
    certificate_key: str = ""
    """32 bytes in hexadecimal, under which the first control plane leaves the shared PKI in the
    cluster for others to join with; empty: none will."""
    token: str = ""
    """kubeadm's bootstrap token for those."""


def minor_version(version: str) -> int:
    """20 for "v1.20.2"."""
    found = re.fullmatch(r"v1\.(\d+)\..*", version)
    if not found:
        raise ValueError(f"{version!r} isn't a version of Kubernetes 1")
    return int(found[1])


def _api_version(version: str) -> str:
    return "kubeadm.k8s.io/v1beta2" if minor_version(version) < 22 else "kubeadm.k8s.io/v1beta3"


def join_configuration(
    version: str, node: str, address: str, ca_hash: str, settings: Settings
) -> str:
    """For `kubeadm join --config`: one more control plane. ca_hash: sha256:… of the CA's key."""
    join = {
        "apiVersion": _api_version(version),
        "kind": "JoinConfiguration",
        "discovery": {
            "bootstrapToken": {
                "token": settings.token,
                "apiServerEndpoint": settings.control_plane_endpoint,
                "caCertHashes": [ca_hash],
            }
        },
        "nodeRegistration": {"name": node, "criSocket": CRI_SOCKET, "taints": []},
        "controlPlane": {
            "localAPIEndpoint": {"advertiseAddress": address, "bindPort": 6443},
            "certificateKey": settings.certificate_key,
        },
    }
    return yaml.safe_dump(join, sort_keys=False)


def init_configuration(version: str, node: str, address: str, settings: Settings) -> str:
    """For `kubeadm init --config`: one control plane on which ordinary pods run too."""
    api = _api_version(version)
    init: dict[str, Any] = {
        "apiVersion": api,
        "kind": "InitConfiguration",
        "localAPIEndpoint": {"advertiseAddress": address, "bindPort": 6443},
        "nodeRegistration": {"name": node, "criSocket": CRI_SOCKET, "taints": []},
    }
    cluster: dict[str, Any] = {
        "apiVersion": api,
        "kind": "ClusterConfiguration",
        "clusterName": "upkeep-test",
        "kubernetesVersion": version,
        "controllerManager": {"extraArgs": {"flex-volume-plugin-dir": _VOLUME_PLUGINS}},
        **settings.cluster,
    }
    if settings.control_plane_endpoint:
        cluster["controlPlaneEndpoint"] = settings.control_plane_endpoint
    if settings.certificate_key:
        init["certificateKey"] = settings.certificate_key
        init["bootstrapTokens"] = [{"token": settings.token}]
    documents = (init, cluster, _kubelet_configuration(settings))
    return "---\n".join(yaml.safe_dump(document, sort_keys=False) for document in documents)


def _kubelet_configuration(settings: Settings) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "cgroupDriver": "cgroupfs",  # there is no systemd
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,  # no service needs them without kube-proxy
        "maxPods": settings.max_pods,
        "podPidsLimit": settings.pod_pids_limit,
        "volumePluginDir": _VOLUME_PLUGINS,  # the default is below /usr
        "syncFrequency": "10s",  # static pods are in the API after that, instead of a minute
        # Images can't be pulled again, and somebody's full disk is no reason to evict.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {
            "memory.available": "50Mi",
            "nodefs.available": "0%",
            "nodefs.inodesFree": "0%",
            "imagefs.available": "0%",
        },
        **settings.kubelet,
    }


def kubelet_service(version: str, address: str) -> Service:
    """The kubelet as kubeadm's drop-in for its systemd unit starts it."""
    flags = [
        "--bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf",
        "--kubeconfig=/etc/kubernetes/kubelet.conf",
        f"--config={KUBELET_CONFIG}",
        f"--container-runtime-endpoint={CRI_SOCKET}",
        f"--node-ip={address}",
    ]
    if minor_version(version) < 24:
        flags.append("--container-runtime=remote")
    return Service("kubelet", ["kubelet", *flags], needs=KUBELET_CONFIG)


def cni_configuration(network: Network, index: int) -> str:
    """A bridge for the node's pods; the network routes their range to the node."""
    addresses = {
        "type": "host-local",
        "ranges": [[{"subnet": str(network.pods(index))}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipam": addresses}
    plugins = [{**bridge, "hairpinMode": True}]
    return json.dumps({"cniVersion": "0.4.0", "name": "pods", "plugins": plugins}, indent=2)
