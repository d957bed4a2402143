"""Stuck Deployments on a real API server with the real controllers: freed, or left in peace."""

import pytest

from remediator.model import Phase
from tests.rollouts.scene import Scene, uids, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.debian]


async def test_one_replica_stuck_for_cpu_is_freed(scene: Scene) -> None:
    scene.node(cpu="1500m")
    name = scene.run(scene.deployment(cpu="1"))
    scene.release(name)
    assert "Insufficient cpu" in scene.wait_stuck(name)

    condition, outcome = await scene.unstick(name)

    assert condition.reason == "InsufficientResources", condition
    assert outcome is not None
    assert (outcome.phase, outcome.reason) == (Phase.SUCCEEDED, "RolloutUnstuck"), outcome
    assert scene.complete(name)
    healed = await scene.fix().verify(scene.target(name), condition)
    assert (healed.broken, healed.reason) == (False, "ConditionCleared")


async def test_r1_other_deployments_of_the_namespace_keep_their_pods(scene: Scene) -> None:
    scene.node(cpu="3500m")
    name = scene.run(scene.deployment(cpu="1"))
    others = [scene.run(scene.deployment(f"other-{n}", cpu="1")) for n in range(2)]
    before = {other: uids(scene.pods(other)) for other in others}
    scene.release(name)
    scene.wait_stuck(name)

    _, outcome = await scene.unstick(name)

    assert outcome is not None
    assert outcome.phase is Phase.SUCCEEDED, outcome
    assert {other: uids(scene.pods(other)) for other in others} == before


async def test_three_replicas_never_fall_below_two(scene: Scene) -> None:
    scene.node(cpu="3500m")
    name = scene.run(scene.deployment(cpu="1", replicas=3))
    scene.release(name)
    scene.wait_stuck(name)
    fewest = [3]
    fix = scene.fix()
    look = fix._sleep

    async def watching(seconds: float) -> None:
        fewest.append(scene.available(name))
        await look(seconds)

    fix._sleep = watching
    _, outcome = await scene.unstick(name, fix)

    assert outcome is not None
    assert outcome.phase is Phase.SUCCEEDED, outcome
    assert scene.complete(name)
    assert min(fewest) == 2


async def test_r3_a_request_that_fits_nowhere_leaves_the_service_alone(scene: Scene) -> None:
    scene.node(cpu="2")
    name = scene.run(scene.deployment(cpu="1"))
    before = uids(scene.pods(name))
    scene.release(name, cpu="3")
    scene.wait_stuck(name)

    condition, outcome = await scene.unstick(name)

    assert outcome is None
    assert (condition.broken, condition.reason) == (False, "DoesNotFit")
    assert before <= uids(scene.pods(name))
    assert scene.available(name) == 1


async def test_r5_a_new_image_that_crashes_is_undone_and_never_tried_again(scene: Scene) -> None:
    scene.node(cpu="1500m")
    name = scene.run(scene.deployment(cpu="1"))
    scene.release(name, behaviour="crash")
    scene.wait_stuck(name)

    _, outcome = await scene.unstick(name, scene.fix(most_restarts=1))

    assert outcome is not None
    assert (outcome.phase, outcome.reason) == (Phase.FAILED, "NewPodCrashes"), outcome
    sets = scene.sets(name)
    assert sets["1"]["spec"]["replicas"] == 1
    assert scene.available(name) == 1
    wait_for("stuck again", lambda: scene.wait_stuck(name))
    condition, again = await scene.unstick(name)
    assert (condition.reason, again) == ("FailedBefore", None)
