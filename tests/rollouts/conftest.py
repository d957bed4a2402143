"""One real control plane for all rollout tests, with a scene for each."""

from collections.abc import Iterator

import pytest

from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.hollow import HollowNodes
from tests.rollouts.scene import Scene


@pytest.fixture(scope="session")
def rollouts_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with control_plane(tmp_path_factory.mktemp("rollouts")) as plane:
        yield plane


@pytest.fixture(scope="session")
def rollouts_nodes(rollouts_plane: ControlPlane) -> Iterator[HollowNodes]:
    with HollowNodes(rollouts_plane.kubeconfig) as nodes:
        yield nodes


@pytest.fixture
def scene(rollouts_plane: ControlPlane, rollouts_nodes: HollowNodes) -> Iterator[Scene]:
    made = Scene(rollouts_plane, rollouts_nodes)
    yield made
    made.close()
