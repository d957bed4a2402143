"""The rollouts collector on a real API server: what it says, and when it keeps silent."""

import asyncio
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.checks.objects import Pod
from exporter.checks.view import ClusterView
from exporter.collectors.rollouts import RolloutsCollector, ViewError
from exporter.config import Config
from exporter.kubernetes import client
from exporter.kubernetes.cache import Cache
from exporter.kubernetes.decode import PODS
from exporter.kubernetes.watched import watched
from tests.cluster.control_plane import ControlPlane
from tests.rollouts.faults import FaultyApi
from tests.rollouts.scene import Scene, uids, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.debian]

Series = dict[tuple[str, ...], float]


def series(collector: RolloutsCollector, metric: str) -> Series:
    """One family's samples by their label values."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in collector.collect()
        if family.name == metric
        for sample in family.samples
    }


async def until(what: str, probe: Callable[[], bool], seconds: float = 120.0) -> None:
    async with asyncio.timeout(seconds):
        while True:
            try:
                if probe():
                    return
            except ViewError:
                pass
            await asyncio.sleep(0.1)
    raise AssertionError(what)


async def refusal(collector: RolloutsCollector, word: str) -> str:
    """Why it gives no series, once that has `word` in it; until then it is still trying."""
    why = ""
    async with asyncio.timeout(60):
        while word not in why:
            with pytest.raises(ViewError) as failure:
                list(collector.collect())
            why = str(failure.value)
            await asyncio.sleep(0.1)
    return why


async def test_a_stuck_rollout_has_its_series_until_it_is_freed(scene: Scene) -> None:
    scene.node(cpu="1500m")
    name = scene.run(scene.deployment(cpu="1"))
    collector = RolloutsCollector(Config(kubeconfig=scene.plane.kubeconfig), environ={})
    await collector.start()
    try:
        await until("a view", lambda: series(collector, "upkeep_rollout_view_age_seconds") != {})
        key = (scene.namespace, name)
        assert key not in series(collector, "upkeep_rollout_unstickable")
        scene.release(name)
        scene.wait_stuck(name)
        await until(
            "unstickable", lambda: series(collector, "upkeep_rollout_unstickable").get(key) == 1
        )
        stuck = series(collector, "upkeep_rollout_stuck_seconds")
        assert 0 <= stuck[(*key, "InsufficientResources")] < 60

        await scene.unstick(name)

        await until("healed", lambda: key not in series(collector, "upkeep_rollout_unstickable"))
    finally:
        await collector.aclose()


async def test_a_request_that_fits_nowhere_is_stuck_and_not_unstickable(scene: Scene) -> None:
    scene.node(cpu="2")
    name = scene.run(scene.deployment(cpu="1"))
    scene.release(name, cpu="3")
    scene.wait_stuck(name)
    collector = RolloutsCollector(Config(kubeconfig=scene.plane.kubeconfig), environ={})
    await collector.start()
    try:
        key = (scene.namespace, name)
        await until(
            "not unstickable", lambda: series(collector, "upkeep_rollout_unstickable").get(key) == 0
        )
        report = await asyncio.to_thread(collector.report)
        (row,) = [row for row in report.rows if row.cells["namespace"] == scene.namespace]
        assert "fits nowhere" in row.cells["what could be done"]
        assert row.data["unstickable"] is False
    finally:
        await collector.aclose()


async def test_without_leave_to_list_it_says_which_and_gives_no_series(
    rollouts_plane: ControlPlane,
) -> None:
    kubeconfig = rollouts_plane.service_account(
        "deployments-only",
        [{"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["list", "watch"]}],
    )
    collector = RolloutsCollector(Config(kubeconfig=kubeconfig), environ={})
    await collector.start()
    try:
        why = await refusal(collector, "403")
        assert re.search(r"403 .*cannot list.*ClusterRole", why), why
    finally:
        await collector.aclose()


async def test_an_unreadable_kubeconfig_is_named(tmp_path: Path) -> None:
    collector = RolloutsCollector(Config(kubeconfig=tmp_path / "absent.conf"), environ={})
    await collector.start()
    try:
        why = await refusal(collector, "can't read")
        assert re.search(r"can't read .*absent\.conf.*--kubeconfig", why), why
        with pytest.raises(ViewError, match=r"can't read .*absent\.conf.*--kubeconfig"):
            await asyncio.to_thread(collector.report)
    finally:
        await collector.aclose()


async def test_without_any_kubeconfig_there_is_nothing_to_say() -> None:
    collector = RolloutsCollector(Config(), environ={})
    await collector.start()
    assert list(collector.collect()) == []
    await collector.aclose()


async def test_r17_a_silent_api_server_leaves_no_series_behind(scene: Scene) -> None:
    """It hangs without closing a connection: the series end when the view is too old."""
    scene.node(cpu="2")
    name = scene.run(scene.deployment(cpu="1"))
    scene.release(name, cpu="3")
    scene.wait_stuck(name)
    config = Config(kubeconfig=scene.plane.kubeconfig)
    collector = RolloutsCollector(config, environ={}, too_old=15.0, watch_seconds=3.0)
    await collector.start()
    server = scene.plane.components["kube-apiserver"].pid
    assert server is not None
    try:
        key = (scene.namespace, name)
        await until("a view", lambda: series(collector, "upkeep_rollout_unstickable").get(key) == 0)
        os.kill(server, signal.SIGSTOP)
        await asyncio.sleep(20)
        with pytest.raises(ViewError, match="more than 15 s old") as failure:
            list(collector.collect())
        (age,) = failure.value.known
        assert age.name == "upkeep_rollout_view_age_seconds"
        assert 15 < age.samples[0].value < 60
        os.kill(server, signal.SIGCONT)
        scene.patch(name, {"metadata": {"annotations": {"wake": "up"}}})
        await until(
            "the view again", lambda: series(collector, "upkeep_rollout_unstickable").get(key) == 0
        )
    finally:
        os.kill(server, signal.SIGCONT)
        await collector.aclose()


async def test_r17_a_restarted_api_server_is_followed_again(scene: Scene) -> None:
    scene.node(cpu="1500m")
    name = scene.run(scene.deployment(cpu="1"))
    collector = RolloutsCollector(Config(kubeconfig=scene.plane.kubeconfig), environ={})
    await collector.start()
    try:
        key = (scene.namespace, name)
        await until("a view", lambda: series(collector, "upkeep_rollout_view_age_seconds") != {})
        scene.plane.restart("kube-apiserver", kill=True)
        scene.release(name)
        await until(
            "unstickable", lambda: series(collector, "upkeep_rollout_unstickable").get(key) == 1
        )
    finally:
        await collector.aclose()


async def test_r17_a_page_instead_of_an_answer_is_got_over(scene: Scene, tmp_path: Path) -> None:
    """A load balancer answers each first question with a page of its own, and status 200."""
    scene.node(cpu="2")
    name = scene.run(scene.deployment(cpu="1"))
    scene.release(name, cpu="3")
    scene.wait_stuck(name)
    asked: set[str] = set()

    def plan(_count: int, _method: str, path: str) -> str:
        first = path not in asked
        asked.add(path)
        return "page" if first else ""

    async with FaultyApi(scene.plane, tmp_path, plan) as faulty:
        config = Config(kubeconfig=faulty.kubeconfig)
        collector = RolloutsCollector(config, environ={}, watch_seconds=3.0)
        await collector.start()
        try:
            key = (scene.namespace, name)
            await until(
                "a view", lambda: series(collector, "upkeep_rollout_unstickable").get(key) == 0
            )
        finally:
            await collector.aclose()
    assert "/version" in asked


async def test_r17_a_watch_survives_what_nobody_thought_of(scene: Scene) -> None:
    """A fault of this program's own in one event: the resource is listed again."""
    scene.node(cpu="2")
    name = scene.run(scene.deployment(cpu="1"))
    scene.release(name, cpu="3")
    scene.wait_stuck(name)
    view, faults = ClusterView(), [ZeroDivisionError("on purpose")]

    def put(pod: Pod) -> None:
        if faults:
            raise faults.pop()
        view.put_pod(pod)

    resources = watched(view, "")
    (pods,) = (one for one in resources if one.kind is PODS)
    pods.put = put
    cache = Cache(client(scene.plane.kubeconfig, {}), view, resources)
    await cache.start()
    try:
        await until("a view", lambda: cache.age() is not None)
        assert faults == []
        assert any(pod.namespace == scene.namespace for pod in view.pods.values())
    finally:
        await cache.aclose()


@pytest.mark.parametrize("kind", ["StatefulSet", "DaemonSet"])
async def test_r7_stateful_and_daemon_sets_are_reported_only(scene: Scene, kind: str) -> None:
    """One of its pods serves, the other finds no room; both stay as they are."""
    for cpu in ("1500m", "500m"):
        scene.node(cpu=cpu)
    workload = scene.deployment("db", cpu="1", replicas=2)
    workload["kind"] = kind
    spec = workload["spec"]
    for key in ("strategy", "progressDeadlineSeconds"):
        del spec[key]
    if kind == "StatefulSet":
        spec["serviceName"] = "db"
    else:
        del spec["replicas"]
    path = f"{scene.space('apps/v1')}/{kind.lower()}s"
    scene.api.request("POST", path, workload)
    scene.wait_stuck("db")
    wait_for("one that serves", lambda: scene.available("db") == 1)
    before, written = uids(scene.pods("db")), scene.api.request("GET", f"{path}/db")["metadata"]
    collector = RolloutsCollector(Config(kubeconfig=scene.plane.kubeconfig), environ={})
    await collector.start()
    try:
        reported = (scene.namespace, kind, "db")
        await until(
            "reported",
            lambda: reported in series(collector, "upkeep_workload_unschedulable_seconds"),
        )
        assert (scene.namespace, "db") not in series(collector, "upkeep_rollout_unstickable")
        condition, outcome = await scene.unstick("db", scene.fix(selector=""))
        assert (condition.broken, outcome) == (False, None)
        assert uids(scene.pods("db")) == before
        after = scene.api.request("GET", f"{path}/db")["metadata"]
        assert after["generation"] == written["generation"]
    finally:
        scene.api.request("DELETE", f"{path}/db", {"propagationPolicy": "Background"})
        await collector.aclose()
