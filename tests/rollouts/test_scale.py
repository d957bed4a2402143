"""Larger Deployments, and Deployments that somebody scales while their rollout is stuck."""

import asyncio

import pytest

from remediator.fixes.rollouts.reasons import FINAL
from remediator.model import Condition, Outcome, Phase
from tests.rollouts.history import Availability
from tests.rollouts.scene import Scene, uids, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.debian]


async def test_ten_replicas_heal_one_by_one_beside_other_services(scene: Scene) -> None:
    scene.node(cpu="12500m")
    others = [scene.run(scene.deployment(f"other-{n}", cpu="1")) for n in range(2)]
    name = scene.run(scene.deployment(cpu="1", replicas=10))
    before = {other: uids(scene.pods(other)) for other in others}
    availability = Availability(scene, name)
    scene.release(name)
    scene.wait_stuck(name)

    _, outcome = await scene.unstick(name, scene.fix(settle=0.3, poll=0.1))

    assert outcome is not None
    assert (outcome.phase, outcome.reason) == (Phase.SUCCEEDED, "RolloutUnstuck"), outcome
    assert scene.complete(name)
    assert availability.fewest() == 9
    freed = [taken for s in scene.steps if s.name == "free" for taken in s.data["taken"]]
    assert [(taken["before"], taken["after"]) for taken in freed] == [
        (n, n - 1) for n in range(10, 0, -1)
    ]
    assert {other: uids(scene.pods(other)) for other in others} == before


async def test_r20_a_deployment_scaled_beyond_its_room_heals_as_far_as_there_is_room(
    scene: Scene,
) -> None:
    scene.node(cpu="3500m")
    name = scene.run(scene.deployment(cpu="1", replicas=3))
    scene.release(name)
    scene.wait_stuck(name)
    scene.patch(name, {"spec": {"replicas": 14}})
    wait_for("the scaling", lambda: len(scene.pods(name)) == 15)
    availability = Availability(scene, name)

    condition, outcome = await scene.unstick(name, scene.fix(settle=0.3, poll=0.1))

    assert outcome is not None, condition
    assert (outcome.phase, outcome.reason) == (Phase.SUCCEEDED, "RolloutUnstuck"), outcome
    assert "3 of 14 pods are available" in outcome.message
    assert scene.sets(name)["1"]["spec"]["replicas"] == 0
    assert scene.available(name) == 3
    assert availability.fewest() == 2
    healed = await scene.fix().verify(scene.target(name), condition)
    assert (healed.broken, healed.reason) == (False, "NothingToFree")


@pytest.mark.parametrize(("runs", "scaled"), [(3, 4), (5, 4)], ids=["up", "down"])
async def test_r9_a_deployment_that_is_scaled_right_before_and_meanwhile(
    scene: Scene, runs: int, scaled: int
) -> None:
    """An autoscaler can't make up its mind; there is room for `runs` pods and none more."""
    scene.node(cpu=f"{runs + 1}500m")
    before = uids(scene.pods(scene.run(scene.deployment("other", cpu="1"))))
    name = scene.run(scene.deployment(cpu="1", replicas=runs))
    availability = Availability(scene, name)
    scene.release(name)
    scene.wait_stuck(name)

    fix, turns = scene.fix(poll=0.1, settle=0.5), 0
    sleep = fix._sleep

    async def scaling(seconds: float) -> None:
        nonlocal turns
        turns += 1
        if turns <= 32:
            scene.patch(name, {"spec": {"replicas": runs if turns % 4 < 2 else scaled}})
        await sleep(seconds)

    fix._sleep = scaling
    scene.patch(name, {"spec": {"replicas": scaled}})
    said: list[Outcome | Condition] = []
    async with asyncio.timeout(300):
        while not (turns >= 32 and scene.complete(name)):
            # What is refused or was changed meanwhile is offered again by the alert.
            condition, outcome = await scene.unstick(name, fix)
            said.append(outcome or condition)
            await scaling(0.5)
    assert scene.get(name)["spec"]["replicas"] == runs
    assert any(isinstance(o, Outcome) and o.phase is Phase.SUCCEEDED for o in said), said
    assert not any(one.reason in {*FINAL, "FailedBefore"} for one in said), said
    assert availability.fewest() >= min(runs, scaled) - 1, said
    assert uids(scene.pods("other")) == before
