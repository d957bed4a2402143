"""A kubelet that is down or hangs: nothing is ended that it would have to start again."""

import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from exporter.checks.certificates import Root
from exporter.checks.certificates.components import read_process
from remediator.fixes.certificates import Settings
from remediator.fixes.certificates import kubelet as kubelet_module
from remediator.fixes.certificates.kubelet import kubelet_problem
from remediator.fixes.certificates.layout import read_layout
from remediator.fixes.certificates.plan import RotationPlan
from remediator.fixes.certificates.restart import Restarter, RestartError
from remediator.fixes.certificates.uptake import Uptake
from remediator.model import FixError
from tests.certificates.conftest import MakePki, StepLog
from tests.certificates.test_rotate import NODE, rotate, steps
from tests.cluster.ports import reserved_ports

PROC = Path("/proc")


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubelet_module, "_PATIENCE", 0.0)


def configure(rootfs: Path, port: int) -> None:
    path = rootfs / "var/lib/kubelet/config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"kind: KubeletConfiguration\nhealthzPort: {port}\n")


@asynccontextmanager
async def kubelet(rootfs: Path, status: int = 200) -> AsyncIterator[None]:
    """The health port of one, as its configuration names it."""

    async def answer(request: web.BaseRequest) -> web.Response:
        return web.Response(text="ok", status=status if request.path == "/healthz" else 404)

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    with reserved_ports(1) as (port,):
        configure(rootfs, port)
        await web.TCPSite(runner, "127.0.0.1", port).start()
        try:
            yield
        finally:
            await runner.cleanup()


async def test_c44_what_a_kubelet_says_of_itself(tmp_path: Path) -> None:
    async with kubelet(tmp_path):
        assert await kubelet_problem(Root(tmp_path)) == ""
    assert "does not answer" in await kubelet_problem(Root(tmp_path))
    async with kubelet(tmp_path, status=500):
        assert "answers 500" in await kubelet_problem(Root(tmp_path))
    configure(tmp_path, 0)  # its port is closed, and tells nothing
    assert await kubelet_problem(Root(tmp_path)) == ""
    configuration = tmp_path / "var/lib/kubelet/config.yaml"
    (tmp_path / "etc/kubernetes").mkdir(parents=True)
    configuration.rename(tmp_path / "etc/kubernetes/kubelet-config.yaml")  # as Kubespray has it
    assert await kubelet_problem(Root(tmp_path)) == ""


async def test_c44_one_that_was_just_restarted_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubelet_module, "_PATIENCE", 30.0)
    configure(tmp_path, 1)
    asked: list[str] = []

    async def starting(url: str) -> str:
        asked.append(url)
        return "does not answer" if len(asked) < 3 else ""

    monkeypatch.setattr(kubelet_module, "_problem", starting)
    assert await kubelet_problem(Root(tmp_path)) == ""
    assert asked == ["http://127.0.0.1:1/healthz"] * 3


@pytest.mark.root
@pytest.mark.debian
@pytest.mark.cluster
async def test_c44_without_a_kubelet_nothing_is_begun(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    manifest = pki.directory / "manifests/kube-scheduler.yaml"
    manifest.parent.mkdir()
    manifest.write_text("kind: Pod\n")
    async with kubelet(pki.rootfs):
        assert (await rotate(pki).check(NODE)).broken
    condition = await rotate(pki).check(NODE)
    assert (condition.broken, condition.reason) == (False, "KubeletUnhealthy")
    assert "mend it first" in condition.message
    assert (await rotate(pki, restart="none").check(NODE)).broken


@pytest.mark.root
@pytest.mark.debian
@pytest.mark.cluster
async def test_c44_nothing_is_ended_once_the_kubelet_is_gone(
    make_pki: MakePki, monkeypatch: pytest.MonkeyPatch, step_log: StepLog
) -> None:
    pki = make_pki()
    configure(pki.rootfs, 1)
    root = Root(pki.rootfs)
    scheduler = subprocess.Popen(["sleep", "100"])
    try:
        process = read_process(PROC, "kube-scheduler", scheduler.pid)
        monkeypatch.setattr(Restarter, "find", lambda self, component: process)
        time.sleep(1.1)
        (pki.directory / "scheduler.conf").touch()
        settings = Settings(component_timeout=1)  # type: ignore[arg-type]
        uptake = Uptake(settings, root=root, procfs=PROC, clock=time.time, node_name="node-1")
        with pytest.raises(RestartError, match="kubelet of this node is not well"):
            await uptake.restart(["kube-scheduler"], read_layout(root), steps(step_log))
        assert scheduler.poll() is None
    finally:
        scheduler.kill()
        scheduler.wait()


@pytest.mark.root
@pytest.mark.debian
@pytest.mark.cluster
async def test_c17_for_one_that_never_comes_back_no_other_is_restarted(
    make_pki: MakePki, monkeypatch: pytest.MonkeyPatch, step_log: StepLog
) -> None:
    pki = make_pki(timedelta(days=3))
    manager = subprocess.Popen(["sleep", "100"])
    both = ("kube-controller-manager", "kube-scheduler")
    try:
        process = read_process(PROC, both[0], manager.pid)
        monkeypatch.setattr(Restarter, "find", lambda _, name: process if name == both[0] else None)
        async with kubelet(pki.rootfs):
            fix = rotate(pki, component_timeout=0.3)
            condition = await fix.check(NODE)
            assert isinstance(condition.detail, RotationPlan)
            plan = msgspec.structs.replace(condition.detail, components=both)
            condition = msgspec.structs.replace(condition, detail=plan)
            with pytest.raises(FixError, match="kube-scheduler did not come back"):
                await fix.apply(NODE, condition, steps(step_log))
        assert step_log.names[:3] == ["backup", "renew", "await kube-scheduler"]
        assert step_log.steps[2].ok is False
        assert not [step for step in step_log.steps[:4] if step.name.startswith("restart")]
    finally:
        manager.kill()
        manager.wait()
