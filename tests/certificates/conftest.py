"""A PKI of the real kubeadm, made once; each test gets a copy of its own."""

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from remediator.model import Step
from tests.cluster.kubernetes_build import kubernetes_binaries
from tests.cluster.pki import Pki, Remaining, kubeadm_pki, set_remaining

MakePki = Callable[..., Pki]


@pytest.fixture(scope="session")
def pristine_pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Leafs with kubeadm's own dates: a year from now."""
    return kubeadm_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def make_pki(pristine_pki: Pki, tmp_path: Path) -> MakePki:
    """A copy of it whose certificates end when the test wants; see set_remaining()."""

    def make(remaining: Remaining | None = None, *, lifetime: timedelta | None = None) -> Pki:
        rootfs = tmp_path / "rootfs"
        shutil.copytree(pristine_pki.rootfs, rootfs, symlinks=True)
        pki = Pki(rootfs, kubernetes_binaries())
        if remaining is not None:
            set_remaining(pki.directory, remaining, lifetime=lifetime or timedelta(days=365))
        return pki

    return make


class StepLog:
    """A step log in memory that keeps what a durable one would hold after each record."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    async def record(self, index: int, step: Step) -> None:
        if index == len(self.steps):
            self.steps.append(step)
        else:
            self.steps[index] = step

    @property
    def names(self) -> list[str]:
        return [step.name for step in self.steps]


@pytest.fixture
def step_log() -> StepLog:
    return StepLog()
