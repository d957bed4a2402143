"""The image as a cluster runs it: in its own containerd, non-root, under an init, read-only."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.kubeadm import KubeadmCluster
from tests.image.build import IMAGE, build_image

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.cluster]

_POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "upkeep-exporter", "namespace": "default"},
    "spec": {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "containers": [
            {
                "name": "exporter",
                "image": IMAGE,
                "imagePullPolicy": "Never",
                "args": ["upkeep-exporter", "--no-collector.rollouts"],
                "securityContext": {
                    "readOnlyRootFilesystem": True,
                    "runAsNonRoot": True,
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                },
                "readinessProbe": {"httpGet": {"path": "/-/ready", "port": 9790}},
            }
        ],
    },
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_image(tmp_path_factory.mktemp("image") / "upkeep.tar")


def _configuration(archive: Path) -> dict[str, Any]:
    with tarfile.open(archive) as tar:
        manifest = json.load(tar.extractfile("manifest.json") or pytest.fail("no manifest"))
        config = tar.extractfile(manifest[0]["Config"])
        assert config is not None
        loaded: dict[str, Any] = json.load(config)
        return loaded


def test_the_image_is_unprivileged_and_has_an_init(archive: Path) -> None:
    config = _configuration(archive)["config"]
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["/usr/bin/tini", "--"]
    assert config["Cmd"] == ["upkeep-exporter"]
    secrets = [e for e in config["Env"] if "PIP" in e or "TOKEN" in e]
    assert secrets == []


def test_the_image_runs_in_the_cluster(archive: Path, kubeadm_cluster: KubeadmCluster) -> None:
    node = kubeadm_cluster.nodes[0]
    node.run(["ctr", "--namespace", "k8s.io", "images", "import", str(archive)])
    kubeadm_cluster.apply(_POD)
    try:

        def ready() -> bool:
            status = kubeadm_cluster.get("pod", "upkeep-exporter")["status"]
            conditions = {c["type"]: c["status"] for c in status.get("conditions", [])}
            return conditions.get("Ready") == "True"

        kubeadm_cluster.wait("the exporter's pod to be ready", ready)
        pod = kubeadm_cluster.get("pod", "upkeep-exporter")
        proxy = "/api/v1/namespaces/default/pods/upkeep-exporter:9790/proxy/metrics"
        metrics = kubeadm_cluster.kubectl("get", "--raw", proxy)
        assert 'upkeep_scrape_collector_success{collector="certificates"} 1.0' in metrics
        # Unprivileged it sees its own pid namespace alone, and says so instead of reporting 0.
        assert "upkeep_build_info" in metrics
        identity = pod["status"]["containerStatuses"][0]["containerID"].rpartition("/")[2]
        processes = node.run(["ctr", "--namespace", "k8s.io", "task", "ps", identity]).stdout
        assert len(processes.splitlines()) == 3, processes  # heading, tini, the exporter
        user = kubeadm_cluster.kubectl("exec", "upkeep-exporter", "--", "id", "-u")
        assert user.strip() == "65532"
    finally:
        kubeadm_cluster.kubectl("delete", "pod", "upkeep-exporter", "--grace-period=5")
