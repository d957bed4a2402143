"""The real parts as pytest fixtures, made when first asked for and shared: by all, or by a module.

A test that changes them puts back what it changed. Logs stay in pytest's folder for temporary
files; when a test that used a real part fails, their places and last lines are in its report.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.containerd import ContainerdHost, containerd_host
from tests.cluster.join import joined_cluster
from tests.cluster.kubeadm import KubeadmCluster, kubeadm_cluster, last_lines
from tests.cluster.node import Node

_NODES = pytest.StashKey[dict[str, list[Node]]]()


@pytest.fixture(scope="session", name="containerd_host")
def _containerd_host(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[ContainerdHost]:
    """A private containerd with the workload image."""
    with containerd_host(tmp_path_factory.mktemp("containerd")) as host:
        _remember(pytestconfig, "containerd_host", [host.node])
        yield host


@pytest.fixture(scope="session", name="kubeadm_cluster")
def _kubeadm_cluster(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[KubeadmCluster]:
    """A real kubeadm cluster of one node."""
    with kubeadm_cluster(tmp_path_factory.mktemp("kubeadm")) as cluster:
        _remember(pytestconfig, "kubeadm_cluster", cluster.nodes)
        yield cluster


@pytest.fixture(scope="module", name="joined_cluster")
def _joined_cluster(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[KubeadmCluster]:
    """Three control planes with stacked etcd behind a balancer, for one module only: even at rest
    they take a good part of two cores."""
    with joined_cluster(tmp_path_factory.mktemp("joined")) as cluster:
        _remember(pytestconfig, "joined_cluster", cluster.nodes)
        yield cluster


def _remember(config: pytest.Config, fixture: str, nodes: list[Node]) -> None:
    config.stash.setdefault(_NODES, {})[fixture] = nodes


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Iterator[None]:
    """Add the last lines of the logs to the report of a failed test that used these fixtures."""
    report = yield
    if report.failed:  # type: ignore[attr-defined]
        for name, nodes in item.config.stash.get(_NODES, {}).items():
            if name in getattr(item, "fixturenames", ()):
                for node in nodes:
                    report.sections.append(  # type: ignore[attr-defined]
                        (f"{name}: logs of {node.name}", last_lines(node))
                    )
    return report
