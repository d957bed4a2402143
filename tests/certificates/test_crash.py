"""`kill -9` of the remediator after each record of its step log, on a real kubeadm node.

Whatever was under way, the next process ends it in a healthy cluster with either the old or the new
certificates everywhere. One point a run, chosen by the seed; every one in a soak.
"""

import random
from pathlib import Path

import pytest

from tests.certificates.rounds import SCENARIOS, crash_round
from tests.cluster.kubeadm import KubeadmCluster
from tests.conftest import SEED, SOAK

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.cluster]


def _points() -> list[tuple[str, int]]:
    if SOAK:
        return [(name, point) for name, s in SCENARIOS.items() for point in s.points]
    chosen = random.Random(SEED)
    name = chosen.choice(sorted(SCENARIOS))
    return [(name, chosen.choice(SCENARIOS[name].points))]


@pytest.mark.parametrize(("name", "point"), _points())
def test_c2_killed_after_any_record_it_ends_whole(
    kubeadm_cluster: KubeadmCluster, tmp_path: Path, name: str, point: int
) -> None:
    crash_round(kubeadm_cluster, tmp_path, name, point)
