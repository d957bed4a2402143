"""What the fix keeps its hands off, and when it waits for what is already under way."""

import asyncio
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from exporter.checks.objects import UNSTICK
from exporter.kubernetes import client
from remediator.model import Phase
from tests.rollouts.faults import FaultyApi
from tests.rollouts.scene import MERGE, Scene, uids, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.debian]

OFF = {"metadata": {"annotations": {"upkeep.dev/remediation": "disabled"}}}


def stuck(scene: Scene, **deployment: Any) -> str:
    scene.node(cpu="1500m")
    name = scene.run(scene.deployment(cpu="1", **deployment))
    scene.release(name)
    scene.wait_stuck(name)
    return name


@pytest.mark.parametrize("where", ["deployment", "namespace"])
async def test_opted_out_nothing_at_all_is_written(
    scene: Scene, tmp_path: Path, where: str
) -> None:
    """The remediator's own command, and a proxy that sees every request it makes."""
    name = stuck(scene)
    if where == "deployment":
        scene.patch(name, OFF)
        wait_for("the controller's word", lambda: _seen_by_controller(scene, name))
    else:
        path = f"/api/v1/namespaces/{scene.namespace}"
        scene.api.request("PATCH", path, OFF, content_type=MERGE)
    settings = {"min_stuck": 0, "settle": 1, "poll": 0.2}
    config = tmp_path / "remediator.yml"
    config.write_text(json.dumps({"fixes": {"unstick-rollout": {"settings": settings}}}))

    async with FaultyApi(scene.plane, tmp_path, lambda *_: "") as recorder:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "remediator", "run", "unstick-rollout"),
            *(f"--namespace={scene.namespace}", f"--deployment={name}"),
            *(f"--kubeconfig={recorder.kubeconfig}", f"--config.file={config}"),
            *(f"--journal={tmp_path / 'journal.db'}", f"--path.locks={tmp_path / 'locks'}"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await asyncio.wait_for(process.communicate(), 120)

    text = said.decode()
    assert "OptedOut" in text, text
    assert f"the {where} " in text.lower(), text
    assert recorder.seen, text
    assert {method for method, _ in recorder.seen} == {"GET"}, recorder.seen
    assert scene.available(name) == 1


async def test_the_autoscalers_fresh_word_is_waited_for(scene: Scene) -> None:
    name = stuck(scene)
    (waiting,) = [p for p in scene.pods(name) if p["status"]["phase"] == "Pending"]
    who = {k: waiting["metadata"][k] for k in ("namespace", "name", "uid")}
    event = {
        "metadata": {"name": "scaling", "namespace": scene.namespace},
        "involvedObject": {"apiVersion": "v1", "kind": "Pod", **who},
        "reason": "TriggeredScaleUp",
        "type": "Normal",
        "message": "pod triggered scale-up: [{group 1->2 (max: 3)}]",
        "source": {"component": "cluster-autoscaler"},
        "lastTimestamp": _time(0),
    }
    # A first one, for a group that could not grow, is listed after it.
    earlier = {"name": "then", "namespace": scene.namespace}
    first = {**event, "metadata": earlier, "lastTimestamp": _time(-900)}
    for one in (event, first):
        scene.api.request("POST", f"{scene.space()}/events", one)

    condition, outcome = await scene.unstick(name)

    assert (condition.reason, outcome) == ("ScaleUpTriggered", None)
    old = {"lastTimestamp": _time(-700)}  # the node never came
    scene.api.request("PATCH", f"{scene.space()}/events/scaling", old, content_type=MERGE)
    condition = await scene.fix().check(scene.target(name))
    assert (condition.broken, condition.reason) == (True, "InsufficientResources")


async def test_room_that_the_scheduler_is_making_is_waited_for(scene: Scene) -> None:
    """Real preemption: the victim of a lower priority takes its time to end."""
    lower = {"metadata": {"name": f"{scene.name}-lower"}, "value": -10}
    classes = "/apis/scheduling.k8s.io/v1/priorityclasses"
    scene.api.request("POST", classes, lower)
    try:
        scene.node(cpu="2500m")
        name = scene.run(scene.deployment(cpu="1"))
        pod = scene.deployment("victim", cpu="1")["spec"]["template"]
        pod["metadata"]["name"] = "victim"
        pod["metadata"]["annotations"] = {"hollow.upkeep.dev/termination-seconds": "12"}
        pod["spec"] |= {
            "priorityClassName": lower["metadata"]["name"],  # type: ignore[index]
            "terminationGracePeriodSeconds": 20,
        }
        scene.api.request("POST", f"{scene.space()}/pods", pod)
        wait_for("the victim runs", lambda: scene.available("victim"))
        before = uids(scene.pods(name))
        scene.release(name)
        wait_for(
            "the nomination",
            lambda: any(p["status"].get("nominatedNodeName") for p in scene.pods(name)),
        )

        condition, outcome = await scene.unstick(name)

        assert (condition.reason, outcome) == ("Nominated", None)
        assert before <= uids(scene.pods(name))
        scene.wait_available(name)
    finally:
        scene.api.request("DELETE", f"{classes}/{scene.name}-lower")


async def test_deleting_old_replica_sets_takes_the_empty_ones_of_its_own_after_success(
    scene: Scene,
) -> None:
    scene.node(cpu="3500m")
    other = scene.run(scene.deployment("other", cpu="1"))
    scene.patch(other, {"spec": {"replicas": 0}})
    wait_for("no pods of it", lambda: not scene.pods(other))
    others = {one["metadata"]["uid"] for one in scene.sets(other).values()}
    name = stuck_beside(scene)
    kept = {one["metadata"]["uid"] for one in scene.sets(name).values()}
    fix, present = scene.fix(delete_old_replica_sets=True), []
    sleep = fix._sleep

    async def watching(seconds: float) -> None:
        present.append({one["metadata"]["uid"] for one in scene.sets(name).values()})
        await sleep(seconds)

    fix._sleep = watching
    _, outcome = await scene.unstick(name, fix)

    assert outcome is not None
    assert outcome.phase is Phase.SUCCEEDED, outcome
    assert present
    assert all(seen == kept for seen in present)  # not before the end
    assert list(scene.sets(name)) == ["2"]
    assert scene.complete(name)
    assert {one["metadata"]["uid"] for one in scene.sets(other).values()} == others


async def test_without_leave_to_delete_a_healed_rollout_is_healed_all_the_same(
    scene: Scene,
) -> None:
    name = stuck(scene)
    rules = [
        {"apiGroups": ["apps"], "resources": ["*"], "verbs": ["get", "list", "patch"]},
        {"apiGroups": ["", "policy"], "resources": ["*"], "verbs": ["get", "list", "patch"]},
    ]
    kubeconfig = scene.plane.service_account(scene.name, rules)
    fix = scene.fix(connect=lambda: client(kubeconfig, {}), delete_old_replica_sets=True)
    _, outcome = await scene.unstick(name, fix)
    assert outcome is not None
    assert outcome.phase is Phase.SUCCEEDED, outcome
    assert "old ReplicaSets are still there" in outcome.message
    assert "403" in outcome.message
    assert [step.ok for step in scene.steps if step.name == "delete"] == [False]
    assert set(scene.sets(name)) == {"1", "2"}


async def test_nothing_is_deleted_of_a_rollout_that_went_on_by_itself(scene: Scene) -> None:
    name = stuck(scene)
    fix = scene.fix(delete_old_replica_sets=True)
    condition = await fix.check(scene.target(name))
    assert condition.broken, condition
    scene.node(cpu="1500m")  # room, from elsewhere
    scene.wait_available(name)

    outcome = await fix.apply(scene.target(name), condition, scene.step_log())

    assert (outcome.phase, outcome.reason) == (Phase.SKIPPED, "ConditionCleared")
    assert set(scene.sets(name)) == {"1", "2"}


@pytest.mark.parametrize("how", ["deployment", "namespace", "paused"])
async def test_r21_told_to_stop_meanwhile_it_ends_the_step_it_is_at_and_takes_no_other(
    scene: Scene, how: str
) -> None:
    scene.node(cpu="3500m")
    name = stuck_beside(scene)
    fix = scene.fix()
    told: list[bool] = []
    sleep = fix._sleep

    async def stopping(seconds: float) -> None:
        if not told and scene.sets(name)["1"]["spec"]["replicas"] == 2:
            told.append(True)
            if how == "namespace":
                path = f"/api/v1/namespaces/{scene.namespace}"
                scene.api.request("PATCH", path, OFF, content_type=MERGE)
            else:
                scene.patch(name, OFF if how == "deployment" else {"spec": {"paused": True}})
        await sleep(seconds)

    fix._sleep = stopping
    _, outcome = await scene.unstick(name, fix)

    reason = "Paused" if how == "paused" else "OptedOut"
    assert outcome is not None
    assert (outcome.phase, outcome.reason) == (Phase.FAILED, reason), outcome
    assert [step.name for step in scene.steps] == ["claim", "free", "come-up"]
    sets = scene.sets(name)
    assert sets["1"]["spec"]["replicas"] == 2
    assert '"holder"' not in sets["2"]["metadata"]["annotations"].get(UNSTICK, "")
    assert scene.available(name) == 3


async def test_nothing_is_deleted_after_a_failure(scene: Scene) -> None:
    scene.node(cpu="1500m")
    name = scene.run(scene.deployment(cpu="1"))
    scene.release(name, behaviour="crash")
    scene.wait_stuck(name)
    fix = scene.fix(delete_old_replica_sets=True, most_restarts=1)
    _, outcome = await scene.unstick(name, fix)
    assert outcome is not None
    assert outcome.phase is Phase.FAILED, outcome
    assert set(scene.sets(name)) == {"1", "2"}
    assert scene.available(name) == 1


def stuck_beside(scene: Scene) -> str:
    """Three pods on the scene's full node, one too many for a new release."""
    name = scene.run(scene.deployment(cpu="1", replicas=3))
    scene.release(name)
    scene.wait_stuck(name)
    return name


def _seen_by_controller(scene: Scene, name: str) -> bool:
    found = scene.get(name)
    return bool(found["status"]["observedGeneration"] >= found["metadata"]["generation"])


def _time(offset: float) -> str:
    return datetime.fromtimestamp(time.time() + offset, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
