"""The rollout hazards that the controllers and other people's changes bring about."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from exporter.checks.objects import UNSTICK
from exporter.kubernetes import client
from remediator.fixes.rollouts.reasons import FINAL
from remediator.model import Phase
from tests.rollouts.faults import FaultyApi
from tests.rollouts.history import Availability
from tests.rollouts.scene import MERGE, Scene, uids, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.debian]


def stuck(scene: Scene, *, cpu: str = "1500m", **deployment: Any) -> str:
    """A service of 1-cpu pods whose new release finds no room on a node of `cpu`."""
    scene.node(cpu=cpu)
    name = scene.run(scene.deployment(cpu="1", **deployment))
    scene.release(name)
    scene.wait_stuck(name)
    return name


async def test_r2_after_an_undo_the_newest_revision_is_the_older_replica_set(scene: Scene) -> None:
    scene.node(cpu="1500m")
    name = scene.run(scene.deployment(cpu="1", strategy={"type": "Recreate"}))
    scene.release(name)
    scene.wait_available(name)
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    scene.patch(name, {"spec": {"strategy": rolling}})
    newer = scene.sets(name)["2"]["metadata"]
    scene.plane.kubectl("rollout", "undo", f"deployment/{name}", "-n", scene.namespace)
    wait_for("the undo", lambda: "3" in scene.sets(name))
    scene.wait_stuck(name)
    older = scene.sets(name)["3"]["metadata"]
    assert older["creationTimestamp"] <= newer["creationTimestamp"]

    _, outcome = await scene.unstick(name)

    assert outcome is not None
    assert outcome.phase is Phase.SUCCEEDED, outcome
    assert scene.sets(name)["3"]["spec"]["replicas"] == 1
    assert scene.sets(name)["2"]["spec"]["replicas"] == 0
    assert {p["metadata"]["ownerReferences"][0]["uid"] for p in scene.pods(name)} == {older["uid"]}


async def test_r6_paused_is_left_alone(scene: Scene) -> None:
    name = stuck(scene)
    scene.patch(name, {"spec": {"paused": True}})
    condition, outcome = await scene.unstick(name)
    assert (condition.reason, outcome) == ("Paused", None)


async def test_r6_a_change_the_controller_has_not_seen_is_left_alone(
    scene: Scene,
) -> None:
    name = stuck(scene)
    scene.plane.stop("kube-controller-manager")
    try:
        scene.release(name, "3")
        condition, outcome = await scene.unstick(name)
        assert (condition.reason, outcome) == ("GenerationBehind", None)
    finally:
        scene.plane.start("kube-controller-manager")


async def test_r7_recreate_is_reported_only(scene: Scene) -> None:
    scene.node(cpu="1500m")
    name = scene.run(scene.deployment(cpu="1", strategy={"type": "Recreate"}))
    scene.release(name, cpu="2")
    scene.wait_stuck(name)
    condition, outcome = await scene.unstick(name)
    assert (condition.reason, outcome) == ("Recreate", None)


async def test_r8_waits_for_old_pods_that_still_terminate(scene: Scene) -> None:
    scene.node(cpu="1500m")
    manifest = scene.deployment(
        cpu="1",
        strategy={"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
    )
    manifest["spec"]["template"]["metadata"]["annotations"][
        "hollow.upkeep.dev/termination-seconds"
    ] = "12"
    manifest["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 20
    name = scene.run(manifest)
    scene.release(name)

    def waiting() -> bool:
        return any(pod["status"]["phase"] == "Pending" for pod in scene.pods(name))

    wait_for("a new pod that waits", waiting)
    condition = await scene.fix().check(scene.target(name))
    assert (condition.broken, condition.reason) == (False, "Terminating")
    scene.wait_available(name)


async def test_r9_replicas_changed_by_somebody_else_meanwhile(scene: Scene) -> None:
    """An autoscaler changes the number for a while; the service heals and never stops."""
    name = stuck(scene, cpu="3500m", replicas=3)
    fix, availability = scene.fix(), Availability(scene, name)
    sleep, turns = fix._sleep, 0

    async def scaling(seconds: float) -> None:
        nonlocal turns
        turns += 1
        if turns <= 20:
            scene.patch(name, {"spec": {"replicas": 3 if turns % 2 == 0 else 2}})
        await sleep(seconds)

    fix._sleep = scaling
    outcomes = []
    async with asyncio.timeout(300):
        while not (turns >= 20 and scene.complete(name)):
            # What was changed under its hands is offered again by the alert.
            condition, outcome = await scene.unstick(name, fix)
            outcomes.append(outcome or condition)
            await scaling(0.5)
    for said in outcomes:
        assert said.reason not in {*FINAL, "FailedBefore"}, (outcomes, scene.state(name))
    assert availability.fewest() >= 1, outcomes


async def test_r9_a_room_that_went_to_another_pod_of_the_same_deployment_is_no_failure(
    scene: Scene,
) -> None:
    """It is scaled up right after a step, and the old revision's new pod is the quicker one.

    That one may be: it has the higher priority, to which a reservation means nothing.
    """
    classes = "/apis/scheduling.k8s.io/v1/priorityclasses"
    higher = {"name": f"{scene.name}-higher"}
    first = {"metadata": higher, "value": 10, "preemptionPolicy": "Never"}
    scene.api.request("POST", classes, first)
    try:
        scene.node(cpu="3500m")
        pod = {"priorityClassName": higher["name"]}
        name = scene.run(scene.deployment(cpu="1", replicas=3, pod=pod))
        none = {"priorityClassName": None, "priority": None}
        scene.patch(name, {"spec": {"template": {"spec": none}}})
        scene.wait_stuck(name)
        scene.slow_to_end(name, "6")
        fix, availability = scene.fix(), Availability(scene, name)
        scaled: list[bool] = []
        sleep = fix._sleep

        async def scaling(seconds: float) -> None:
            if not scaled and scene.sets(name)["1"]["spec"]["replicas"] == 2:
                scaled.append(True)
                scene.patch(name, {"spec": {"replicas": 5}})
                scene.slow_to_end(name, "0.2")
            await sleep(seconds)

        fix._sleep = scaling
        _, outcome = await scene.unstick(name, fix)

        assert scaled
        assert outcome is not None
        assert (outcome.phase, outcome.reason) == (Phase.SUCCEEDED, "RolloutUnstuck"), outcome
        assert "finds no room" in outcome.message
        assert scene.sets(name)["1"]["spec"]["replicas"] == 0
        assert scene.available(name) == 3
        assert availability.fewest() == 2
    finally:
        scene.api.request("DELETE", f"{classes}/{higher['name']}")


async def test_r10_a_disruption_budget_is_respected(scene: Scene) -> None:
    name = stuck(scene)
    budget = {
        "apiVersion": "policy/v1beta1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": "keep", "namespace": scene.namespace},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": name}}},
    }
    path = f"{scene.space('policy/v1beta1')}/poddisruptionbudgets"
    scene.api.request("POST", path, budget)
    wait_for(
        "the budget's status",
        lambda: scene.api.request("GET", f"{path}/keep")["status"].get("currentHealthy"),
    )
    before = uids(scene.pods(name))

    condition, outcome = await scene.unstick(name)

    assert (condition.reason, outcome) == ("DisruptionBudget", None)
    assert "keep" in condition.message
    assert uids(scene.pods(name)) == before
    _, outcome = await scene.unstick(name, scene.fix(respect_disruption_budgets=False))
    assert outcome is not None
    assert outcome.phase is Phase.SUCCEEDED, outcome


async def test_r11_a_quota_is_recognised_and_freed(scene: Scene) -> None:
    scene.node(cpu="8")
    quota = {"metadata": {"name": "tenant"}, "spec": {"hard": {"requests.cpu": "1500m"}}}
    scene.api.request("POST", f"{scene.space()}/resourcequotas", quota)
    name = scene.run(scene.deployment(cpu="1"))
    scene.release(name)

    def failing() -> bool:
        newest = scene.sets(name).get("2", {"status": {}})
        return any(c["type"] == "ReplicaFailure" for c in newest["status"].get("conditions", []))

    wait_for("the quota's refusal", failing)
    condition, outcome = await scene.unstick(name)
    assert condition.reason == "QuotaExceeded", condition
    assert "exceeded quota: tenant" in condition.message
    assert outcome is not None
    assert outcome.phase is Phase.SUCCEEDED, outcome


async def test_r11_a_quota_too_small_for_the_new_pod_is_left_alone(scene: Scene) -> None:
    scene.node(cpu="8")
    quota = {"metadata": {"name": "tenant"}, "spec": {"hard": {"limits.cpu": "1500m", "pods": "9"}}}
    scene.api.request("POST", f"{scene.space()}/resourcequotas", quota)
    manifest = scene.deployment(cpu="1")
    manifest["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] = {"cpu": "1"}
    name = scene.run(manifest)
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    container["resources"]["limits"] = {"cpu": "2"}
    scene.patch(name, {"spec": {"template": {"spec": {"containers": [container]}}}})

    async def refused() -> bool:
        return (await scene.fix().check(scene.target(name))).reason == "DoesNotFit"

    async with asyncio.timeout(90):
        while not await refused():
            await asyncio.sleep(0.2)
    assert scene.available(name) == 1


async def test_r14_a_deployment_recreated_under_its_name_is_another_one(scene: Scene) -> None:
    name = stuck(scene)
    fix = scene.fix()
    condition = await fix.check(scene.target(name))
    assert condition.broken
    path = f"{scene.space('apps/v1')}/deployments"
    scene.api.request("DELETE", f"{path}/{name}", {"propagationPolicy": "Foreground"})
    wait_for("all pods gone", lambda: not scene.pods(name))
    wait_for("the Deployment gone", lambda: not scene.sets(name))
    scene.run(scene.deployment(cpu="1"))
    before = uids(scene.pods(name))

    outcome = await fix.apply(scene.target(name), condition, scene.step_log())

    assert (outcome.phase, outcome.reason) == (Phase.SKIPPED, "TargetReplaced")
    assert uids(scene.pods(name)) == before


async def test_r15_rollback_works_afterwards(scene: Scene) -> None:
    name = stuck(scene)
    await scene.unstick(name)
    assert set(scene.sets(name)) == {"1", "2"}
    scene.plane.kubectl("rollout", "undo", f"deployment/{name}", "-n", scene.namespace)
    wait_for("the undo", lambda: "3" in scene.sets(name))
    scene.wait_stuck(name)
    _, outcome = await scene.unstick(name)
    assert outcome is not None
    assert outcome.phase is Phase.SUCCEEDED, outcome
    image = scene.get(name)["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == "example.com/app:1"


async def test_r16_of_two_executors_one_acts(scene: Scene) -> None:
    name = stuck(scene, cpu="3500m", replicas=3)
    results = await asyncio.gather(scene.unstick(name), scene.unstick(name))
    outcomes = [outcome for _, outcome in results if outcome is not None]
    assert [o.reason for o in outcomes].count("RolloutUnstuck") == 1, outcomes
    assert all(o.reason in {"RolloutUnstuck", "AlreadyActing"} for o in outcomes), outcomes
    assert scene.complete(name)


async def test_r9_a_replica_set_that_changes_right_before_the_write_is_looked_at_again(
    scene: Scene, tmp_path: Path
) -> None:
    name = stuck(scene)
    path = f"{scene.space('apps/v1')}/replicasets/{scene.sets(name)['1']['metadata']['name']}"
    changed: list[str] = []

    def plan(_count: int, method: str, at: str) -> str:
        if method == "PATCH" and at == path and not changed:
            other = {"metadata": {"annotations": {"somebody": "else"}}}
            changed.append(at)
            scene.api.request("PATCH", path, other, content_type=MERGE)
        return ""

    async with FaultyApi(scene.plane, tmp_path, plan) as proxy:
        _, outcome = await scene.unstick(name, scene.fix(lambda: client(proxy.kubeconfig, {})))
    assert changed
    assert outcome is not None
    assert outcome.phase is Phase.SUCCEEDED, outcome
    assert [step.ok for step in scene.steps if step.name == "free"] == [False, True]


async def test_r16_a_claim_that_comes_a_moment_earlier_is_respected(
    scene: Scene, tmp_path: Path
) -> None:
    name = stuck(scene)
    newest = scene.sets(name)["2"]["metadata"]
    path = f"{scene.space('apps/v1')}/replicasets/{newest['name']}"
    theirs = {"replicaSet": newest["uid"], "holder": "another", "until": time.time() + 600}
    claimed: list[str] = []

    def plan(_count: int, method: str, at: str) -> str:
        if method == "PATCH" and at == path and not claimed:
            claim = {"metadata": {"annotations": {UNSTICK: json.dumps(theirs)}}}
            claimed.append(at)
            scene.api.request("PATCH", path, claim, content_type=MERGE)
        return ""

    async with FaultyApi(scene.plane, tmp_path, plan) as proxy:
        _, outcome = await scene.unstick(name, scene.fix(lambda: client(proxy.kubeconfig, {})))
    assert claimed
    assert outcome is not None
    assert (outcome.phase, outcome.reason) == (Phase.SKIPPED, "AlreadyActing")
    found = scene.sets(name)
    assert json.loads(found["2"]["metadata"]["annotations"][UNSTICK]) == theirs
    assert found["1"]["spec"]["replicas"] == 1


async def test_r19_a_nomination_left_behind_does_not_hide_a_stuck_rollout(scene: Scene) -> None:
    """What an executor that died reserved must not read as preemption for ever."""
    name = stuck(scene)
    (waiting,) = [p for p in scene.pods(name) if p["status"]["phase"] == "Pending"]
    path = f"{scene.space()}/pods/{waiting['metadata']['name']}/status"
    nominated = {"status": {"nominatedNodeName": scene.nodes[0]}}
    scene.api.request("PATCH", path, nominated, content_type=MERGE)
    condition, outcome = await scene.unstick(name)
    assert outcome is not None, condition
    assert outcome.phase is Phase.SUCCEEDED
