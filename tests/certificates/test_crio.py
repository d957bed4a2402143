"""A static pod's component below CRI-O: found, ended and seen to be a new one, without crictl.

Real: conmon, runc, the containers' processes, their cgroups and /proc. Not real: CRI-O itself and
the kubelet (who starts the container anew), and the component, which is a script of its name.
"""

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.checks.certificates import Root
from exporter.checks.certificates.components import find_processes
from remediator.fixes.certificates.restart import Restarter
from tests.cluster.containerd import Pod, Shape
from tests.cluster.crio import Crio, crio, is_running

pytestmark = [pytest.mark.root, pytest.mark.debian]

SCHEDULER = "kube-scheduler"


@pytest.fixture(name="crio")
def _crio(tmp_path: Path) -> Iterator[Crio]:
    folder = tmp_path / "crio"
    folder.mkdir()
    with crio(folder) as running:
        yield running


def static_pod(rootfs: Path, component: str = SCHEDULER) -> Pod:
    """As a kubelet names it: its uid is the hash of its manifest, without dashes."""
    uid = uuid.uuid4().hex
    (rootfs / f"var/log/pods/kube-system_{component}-node-1_{uid}").mkdir(parents=True)
    return Pod(name=f"{component}-node-1", namespace="kube-system", qos="burstable", uid=uid)


async def running(component: str) -> bool:
    return component == SCHEDULER


@pytest.mark.parametrize("shape", ["systemd", "cgroupfs"])
async def test_c23_below_crio_a_new_process_in_a_new_container_is_seen(
    crio: Crio, tmp_path: Path, shape: Shape
) -> None:
    root = Root(tmp_path)
    pod = static_pod(tmp_path)
    first = crio.start(pod, SCHEDULER, shape=shape)
    tenants = Pod(name="kube-scheduler-node-1", namespace="tenant", qos="burstable")
    (tmp_path / f"var/log/pods/tenant_kube-scheduler-node-1_{tenants.uid}").mkdir()
    decoy = crio.start(tenants, SCHEDULER, shape=shape)
    sandbox = crio.start(pod, "pause", shape=shape)
    crio.keep_running(pod, SCHEDULER, first, shape=shape)

    (found,) = find_processes(Path("/proc"), root)
    assert (found.component, found.pid, found.container) == (SCHEDULER, first.pid, first.id)

    restarter = Restarter(root, Path("/proc"), running, timeout=60)
    process = restarter.find(SCHEDULER)
    assert process == found
    new = await restarter.restart(process)

    assert new.pid != first.pid
    assert new.container not in ("", first.id, decoy.id, sandbox.id)
    assert not is_running(first.pid)
    for _ in range(300):  # conmon writes the exit down, then goes by itself
        if not is_running(first.conmon):
            break
        await asyncio.sleep(0.1)
    assert not is_running(first.conmon)
    assert all(is_running(p) for p in (decoy.pid, decoy.conmon, sandbox.pid, sandbox.conmon))
    assert restarter.find(SCHEDULER) == new


async def test_c23_a_container_in_a_cgroup_below_its_own_is_found(
    crio: Crio, tmp_path: Path
) -> None:
    pod = static_pod(tmp_path)
    container = crio.start(pod, SCHEDULER, shape="systemd", nested=True)
    (found,) = find_processes(Path("/proc"), Root(tmp_path))
    assert (found.pid, found.container) == (container.pid, container.id)


async def test_c23_what_was_executed_in_a_container_is_not_taken_for_its_component(
    crio: Crio, tmp_path: Path
) -> None:
    pod = static_pod(tmp_path)
    container = crio.start(pod, SCHEDULER, shape="systemd")
    crio.exec(container, f"/{SCHEDULER}")  # as `kubectl exec … -- kube-scheduler --version` would
    found = find_processes(Path("/proc"), Root(tmp_path))
    assert {process.container for process in found} == {container.id}
    assert len(found) == 2
    process = Restarter(Root(tmp_path), Path("/proc"), running, timeout=60).find(SCHEDULER)
    assert process is not None
    assert process.pid == container.pid
