"""Whether what is on disk is in use, and ending what is to use it."""

import itertools
import resource
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from exporter.checks.certificates import Root
from exporter.checks.certificates.components import read_process
from remediator.fixes.certificates import Settings, uptake
from remediator.fixes.certificates.restart import Restarter
from remediator.fixes.certificates.uptake import NotServedError, Uptake
from tests.certificates.conftest import MakePki, StepLog
from tests.certificates.fake_api import LEASES, fake_api
from tests.certificates.test_rotate import steps

PROC = Path("/proc")


@pytest.mark.root
@pytest.mark.debian
@pytest.mark.cluster
async def test_c47_a_leader_on_a_node_whose_clock_is_behind_leads_nevertheless(
    make_pki: MakePki, monkeypatch: pytest.MonkeyPatch, step_log: StepLog
) -> None:
    monkeypatch.setattr(uptake, "_SERVED_TIMEOUT", 1.5)
    pki = make_pki()
    root = Root(pki.rootfs)
    use = Uptake(Settings(), root=root, procfs=PROC, clock=time.time, node_name="node-1")
    behind = datetime.now(UTC) - timedelta(hours=1)
    ticks = itertools.count()
    async with fake_api(pki) as api:
        lease = {"spec": {"renewTime": behind.isoformat()}}
        api.objects[f"{LEASES}/kube-scheduler"] = lease
        with pytest.raises(NotServedError, match="no kube-scheduler has led"):
            await use.verify(["kube-scheduler"], steps(step_log))

        async def leads(method: str, path: str) -> int:
            later = behind + timedelta(seconds=2 * next(ticks))
            lease["spec"]["renewTime"] = later.isoformat()
            return 0

        api.meddle = leads
        await use.verify(["kube-scheduler"], steps(step_log))


async def never(component: str) -> bool:
    return False


async def test_c48_a_component_is_ended_where_more_than_1024_files_are_open(
    tmp_path: Path,
) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), most))
    child = subprocess.Popen(["sleep", "100"])
    opened = [(PROC / "self/stat").open() for _ in range(1024)]
    try:
        process = read_process(PROC, "kube-scheduler", child.pid)
        assert process is not None
        await Restarter(Root(tmp_path), PROC, never, timeout=1).end(process)
        assert child.wait(10) == -15
    finally:
        for file in opened:
            file.close()
        child.kill()
        child.wait()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))


def test_c49_a_scheduler_of_a_deployment_is_not_taken_for_the_nodes_own(tmp_path: Path) -> None:
    proc, logs = tmp_path / "proc", tmp_path / "var/log/pods"
    own, other = "0" * 31 + "a", "0a1b2c3d-0000-4000-8000-0123456789ab"
    (proc / "stat").parent.mkdir()
    (proc / "stat").write_text("btime 1700000000\n")
    for pid, pod, uid in ((11, "node-1", own), (12, "gpu-5b8d-x2x4z", other)):
        (logs / f"kube-system_kube-scheduler-{pod}_{uid}").mkdir(parents=True)
        (proc / str(pid)).mkdir()
        (proc / str(pid) / "comm").write_text("kube-scheduler\n")
        (proc / str(pid) / "cgroup").write_text(f"0::/kubepods/pod{uid}/{str(pid) * 32}\n")
        (proc / str(pid) / "stat").write_text(f"{pid} (x) S " + "0 " * 18 + f"{pid} 0\n")
    found = Restarter(Root(tmp_path), proc, never, timeout=1).find("kube-scheduler")
    assert found is not None
    assert found.pid == 11
