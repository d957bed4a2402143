"""Larger Deployments, and Deployments that somebody scales while their rollout is stuck."""

import asyncio
import time

import pytest

from remediator.model import Outcome, Phase
from tests.rollouts.history import Availability
from tests.rollouts.scene import Scene, uids

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


@pytest.mark.parametrize(("runs", "scaled"), [(3, 4), (5, 4)], ids=["up", "down"])
async def test_a_deployment_that_is_scaled_right_before_and_meanwhile(
    scene: Scene, runs: int, scaled: int
) -> None:
    """An autoscaler can't make up its mind; there is room for `runs` pods and none more."""
    scene.node(cpu=f"{runs + 1}500m")
    before = uids(scene.pods(scene.run(scene.deployment("other", cpu="1"))))
    name = scene.run(scene.deployment(cpu="1", replicas=runs))
    availability = Availability(scene, name)
    scene.release(name)
    scene.wait_stuck(name)

    fix = scene.fix(come_up_timeout=15.0)
    sleep, ends, turns = fix._sleep, time.monotonic() + 6, 0

    async def scaling(seconds: float) -> None:
        nonlocal turns
        turns += 1
        calm = time.monotonic() > ends
        scene.patch(name, {"spec": {"replicas": runs if calm or turns % 4 < 2 else scaled}})
        await sleep(seconds)

    fix._sleep = scaling
    scene.patch(name, {"spec": {"replicas": scaled}})
    said = []
    for _ in range(12):  # what is refused or was changed meanwhile is offered again by the alert
        condition, outcome = await scene.unstick(name, fix)
        said.append(outcome or condition)
        if time.monotonic() > ends and scene.complete(name):
            break
        await scaling(1.0)
        await asyncio.sleep(0.5)
    assert scene.complete(name), (said, scene.state(name))
    assert scene.get(name)["spec"]["replicas"] == runs
    assert any(isinstance(one, Outcome) for one in said), said
    # One less for the step under way, one for the controller's own scaling at the same moment.
    assert availability.fewest() >= min(runs, scaled) - 2, said
    assert uids(scene.pods("other")) == before
