"""Undo: after a crash, a cancellation, a lost race, and any fault of the API server."""

import asyncio
import errno
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import msgspec
import pytest

from exporter.kubernetes import AccessError, Client, client
from exporter.kubernetes.access import Access, load_access
from remediator.model import Outcome, Phase, Step
from tests.cluster.hollow import BEHAVIOUR
from tests.rollouts.faults import FAULTS, FaultyApi
from tests.rollouts.scene import Scene, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.debian]


def stuck(scene: Scene, *, behaviour: str = "ready") -> str:
    """A service of one pod whose new release finds no room."""
    scene.node(cpu="1500m")
    name = scene.run(scene.deployment(cpu="1"))
    scene.release(name, behaviour=behaviour)
    scene.wait_stuck(name)
    return name


def restored(scene: Scene, name: str) -> bool:
    """As before the fix: the old pod serves, the new one waits, nobody claims anything."""
    sets = scene.sets(name)
    return (
        sets["1"]["spec"]["replicas"] == 1
        and sets["2"]["spec"]["replicas"] == 1
        and scene.available(name) == 1
        and '"holder"' not in mark(scene, name)
    )


def mark(scene: Scene, name: str) -> str:
    """What is written on the new ReplicaSet."""
    annotations = scene.sets(name)["2"]["metadata"]["annotations"]
    return str(annotations.get("upkeep.dev/unstick-rollout", ""))


def contender(scene: Scene, cpu: str, priority: str = "") -> None:
    """Somebody else's pod that would like the room."""
    pod = scene.deployment(cpu=cpu)["spec"]["template"]
    pod["metadata"] = {"name": "contender"}
    pod["spec"]["priorityClassName"] = priority
    scene.api.request("POST", f"{scene.space()}/pods", pod)


async def test_r4_the_freed_room_is_kept_for_the_new_pod(scene: Scene) -> None:
    """Another pod has waited longer for the same room; it doesn't get it."""
    scene.node(cpu="1500m")
    name = scene.run(scene.deployment(cpu="1"))
    contender(scene, "1")
    await asyncio.sleep(1)
    scene.release(name)
    scene.wait_stuck(name)

    _, outcome = await scene.unstick(name)

    assert outcome is not None
    assert outcome.phase is Phase.SUCCEEDED, outcome


async def test_r4_another_pod_takes_the_freed_room(scene: Scene) -> None:
    """Without leave to reserve the room a small pod gets it: the old one is brought back."""
    scene.node(cpu="1500m")
    name = scene.run(scene.deployment(cpu="1"))
    scene.release(name, cpu="1400m")
    scene.wait_stuck(name)
    rules = [
        {"apiGroups": ["apps"], "resources": ["*"], "verbs": ["get", "list", "patch"]},
        {"apiGroups": ["", "policy"], "resources": ["*"], "verbs": ["get", "list"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["patch", "delete"]},
    ]
    kubeconfig = scene.plane.service_account(scene.name, rules)
    fix = scene.fix(connect=lambda: client(kubeconfig, {}), come_up_timeout=60.0)
    taken: list[bool] = []
    sleep = fix._sleep

    async def meanwhile(seconds: float) -> None:
        if not taken and scene.sets(name)["1"]["spec"]["replicas"] == 0:
            taken.append(True)
            contender(scene, "300m")
        await sleep(seconds)

    # The contender must be there before the old pod is gone: let that one take its time.
    condition = await fix.check(scene.target(name))
    assert condition.broken, condition
    (old,) = [p for p in scene.pods(name) if p["spec"].get("nodeName")]
    slowly = {"metadata": {"annotations": {"hollow.upkeep.dev/termination-seconds": "8"}}}
    path = f"{scene.space()}/pods/{old['metadata']['name']}"
    scene.api.request("PATCH", path, slowly, content_type="application/merge-patch+json")
    fix._sleep = meanwhile
    outcome = await fix.apply(scene.target(name), condition, scene.step_log())

    if outcome.phase is Phase.SUCCEEDED:  # the new pod was quicker: no race was lost
        pytest.fail("the contender never got the room; the test shows nothing")
    assert outcome.reason == "RoomTaken", outcome
    assert restored(scene, name), scene.state(name)


async def test_r13_the_api_server_restarts_in_the_middle(scene: Scene) -> None:
    name = stuck(scene)
    scene.step_log()
    task = asyncio.create_task(scene.unstick(name, scene.fix(come_up_timeout=90.0)))
    async with asyncio.timeout(60):
        while not any(step.name == "free" for step in scene.steps):
            await asyncio.sleep(0.02)
    scene.plane.stop("kube-apiserver", kill=True)
    await asyncio.sleep(3)
    scene.plane.components["kube-apiserver"].launch()
    _, outcome = await task
    assert outcome is not None
    assert outcome.phase is Phase.SUCCEEDED, (outcome, scene.state(name))
    assert scene.complete(name)


async def test_r13_an_api_server_that_is_away_for_long_is_no_fault_of_the_release(
    scene: Scene, tmp_path: Path
) -> None:
    name = stuck(scene, behaviour="slow-ready=8")
    away: list[int] = []

    def plan(count: int, method: str, _path: str) -> str:
        return "500" if away and method == "GET" and count < away[0] + 40 else ""

    async with FaultyApi(scene.plane, tmp_path, plan) as faulty:

        def connect() -> Client:
            return Client(
                lambda: load_access(faulty.kubeconfig, {}), sleep=lambda _: asyncio.sleep(0.1)
            )

        fix = scene.fix(connect=connect, come_up_timeout=2.0)
        sleep = fix._sleep

        async def meanwhile(seconds: float) -> None:
            if not away and scene.sets(name)["1"]["spec"]["replicas"] == 0:
                away.append(len(faulty.seen))
            await sleep(seconds)

        fix._sleep = meanwhile
        _, outcome = await scene.unstick(name, fix)
    assert outcome is not None
    assert (outcome.phase, outcome.reason) == (Phase.FAILED, "ApiUnavailable"), outcome
    assert restored(scene, name), scene.state(name)
    assert (await scene.fix().check(scene.target(name))).reason != "FailedBefore"


async def test_r13_whatever_the_api_server_answers_nothing_is_left_half_done(
    scene: Scene, tmp_path: Path, seed: int, soak: bool
) -> None:
    """Each fault at a request chosen by the seed (in full: at every request)."""
    chance = random.Random(seed)
    rounds = [(fault, at) for fault in FAULTS for at in range(40)]
    if not soak:
        rounds = chance.sample([r for r in rounds if r[1] < 25], 4)
    scene.node(cpu="1500m")
    for number, (fault, at) in enumerate(rounds):
        name = scene.run(scene.deployment(f"web-{number}", cpu="1"))
        scene.release(name)
        scene.wait_stuck(name)
        checked: list[int] = []
        plan = partial(_plan, checked, at, fault)

        async with FaultyApi(scene.plane, tmp_path, plan) as faulty:

            def connect(path: Path = faulty.kubeconfig) -> Client:
                return Client(lambda: load_access(path, {}), request_timeout=3)

            fix = scene.fix(connect=connect)
            condition = await fix.check(scene.target(name))
            assert condition.broken, condition
            checked.append(len(faulty.seen))  # faults begin with the acting
            outcome = await fix.apply(scene.target(name), condition, scene.step_log())
        hit = faulty.seen[checked[0] + at : checked[0] + at + 1]
        what = (seed, fault, at, hit, outcome, scene.state(name))
        if outcome.phase is Phase.SUCCEEDED:
            assert scene.complete(name), what
        else:
            wait_for(f"restored: {what}", partial(restored, scene, name), 20)
        path = f"{scene.space('apps/v1')}/deployments/{name}"
        scene.api.request("DELETE", path, {"propagationPolicy": "Background"})
        wait_for("the pods gone", partial(_no_pods, scene, name))


async def test_the_time_is_up_in_the_middle_of_a_step(scene: Scene) -> None:
    name = stuck(scene, behaviour="never-ready")
    task = asyncio.create_task(scene.unstick(name))
    wait = asyncio.create_task(_freed(scene, name))
    await asyncio.wait_for(wait, 60)
    task.cancel()
    await asyncio.sleep(0.5)
    task.cancel()  # whoever is impatient can't break the undo either
    with pytest.raises(asyncio.CancelledError):
        await task
    assert restored(scene, name), scene.state(name)


def _plan(checked: list[int], at: int, fault: str, count: int, _method: str, _path: str) -> str:
    """The fault at the `at`-th request after the check."""
    return fault if checked and count == checked[0] + at else ""


def _no_pods(scene: Scene, name: str) -> bool:
    return not scene.pods(name)


async def _freed(scene: Scene, name: str, left: int = 0) -> None:
    while scene.sets(name)["1"]["spec"]["replicas"] != left:
        await asyncio.sleep(0.05)


_VICTIM = """
import asyncio, sys
from datetime import UTC, datetime
from pathlib import Path
import msgspec
from exporter.kubernetes import client
from remediator.fixes.rollouts import Settings, UnstickRollout
from remediator.model import Steps, Target

kubeconfig, namespace, name, journal = sys.argv[1:]

async def record(index, step):
    with Path(journal).open("ab") as file:
        file.write(msgspec.json.encode([index, step]) + b"\\n")

async def main():
    settings = Settings(min_stuck=0, settle=1, poll=0.2, come_up_timeout=60)
    fix = UnstickRollout(settings, lambda: client(Path(kubeconfig), {}))
    target = Target(namespace=namespace, deployment=name)
    await fix.apply(target, await fix.check(target), Steps(record, lambda: datetime.now(UTC)))

asyncio.run(main())
"""


async def _killed(scene: Scene, name: str, journal: Path, left: int = 0) -> list[Step]:
    """Run the fix in a process and kill it once the old ReplicaSet is scaled down; its log."""
    arguments = [str(scene.plane.kubeconfig), scene.namespace, name, str(journal)]
    process = subprocess.Popen([sys.executable, "-c", _VICTIM, *arguments])
    try:
        await asyncio.wait_for(_freed(scene, name, left), 60)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    steps: dict[int, Step] = {}
    for line in journal.read_bytes().splitlines():
        index, step = msgspec.json.decode(line, type=tuple[int, Step])
        steps[index] = step
    return [steps[index] for index in sorted(steps)]


async def _resume(scene: Scene, name: str, earlier: list[Step]) -> Outcome:
    return await scene.fix().resume(scene.target(name), scene.step_log(earlier))


async def test_e2_killed_in_the_middle_its_successor_finishes(scene: Scene, tmp_path: Path) -> None:
    name = stuck(scene)
    earlier = await _killed(scene, name, tmp_path / "journal")
    assert earlier[-1].ok is None
    outcome = await _resume(scene, name, earlier)
    assert (outcome.phase, outcome.reason) == (Phase.SUCCEEDED, "RolloutUnstuck"), outcome
    assert scene.complete(name)


async def test_e2_killed_in_the_middle_its_successor_undoes(scene: Scene, tmp_path: Path) -> None:
    name = stuck(scene, behaviour="crash")
    earlier = await _killed(scene, name, tmp_path / "journal")
    fix = scene.fix(most_restarts=1)
    outcome = await fix.resume(scene.target(name), scene.step_log(earlier))
    assert (outcome.phase, outcome.reason) == (Phase.FAILED, "NewPodCrashes"), outcome
    assert restored(scene, name), scene.state(name)


async def test_e2_a_successor_ends_the_open_step_and_takes_no_other(
    scene: Scene, tmp_path: Path
) -> None:
    """A further one is for the policy to admit: somebody may have paused the fix."""
    scene.node(cpu="3500m")
    name = scene.run(scene.deployment(cpu="1", replicas=3))
    scene.release(name)
    scene.wait_stuck(name)
    earlier = await _killed(scene, name, tmp_path / "journal", left=2)
    outcome = await _resume(scene, name, earlier)
    assert (outcome.phase, outcome.reason) == (Phase.FAILED, "Interrupted"), outcome
    assert [step.name for step in scene.steps].count("free") == 1
    assert scene.sets(name)["1"]["spec"]["replicas"] == 2
    assert scene.available(name) == 3
    assert '"holder"' not in mark(scene, name)


async def test_e2_a_successor_that_has_no_access_yet_waits_for_it(
    scene: Scene, tmp_path: Path
) -> None:
    name = stuck(scene)
    earlier = await _killed(scene, name, tmp_path / "journal")
    tries: list[int] = []

    async def load() -> Access:
        tries.append(1)
        if len(tries) < 5:
            raise AccessError("can't read the kubeconfig (it is being renewed)")
        return await load_access(scene.plane.kubeconfig, {})

    fix = scene.fix(connect=lambda: Client(load))
    outcome = await fix.resume(scene.target(name), scene.step_log(earlier))
    assert (outcome.phase, outcome.reason) == (Phase.SUCCEEDED, "RolloutUnstuck"), outcome
    assert scene.complete(name)


@pytest.mark.parametrize("behaviour", ["never-ready", "ready"])
async def test_e11_a_journal_that_fails_in_the_middle_of_a_step_has_it_undone(
    scene: Scene, behaviour: str
) -> None:
    """Or, where the new pod is quicker than the way back, left to go on."""
    name = stuck(scene, behaviour=behaviour)
    log = scene.step_log()
    kept = log._record

    async def full(index: int, step: Step) -> None:
        if any(earlier.name == "free" for earlier in scene.steps):
            raise OSError(errno.ENOSPC, "no space left on the journal's device")
        await kept(index, step)

    log._record = full
    fix = scene.fix()
    condition = await fix.check(scene.target(name))
    outcome = await fix.apply(scene.target(name), condition, log)
    assert (outcome.phase, outcome.reason) == (Phase.FAILED, "Interrupted"), outcome
    assert "no space left" in outcome.message
    assert scene.available(name) == 1
    whole = restored if behaviour == "never-ready" else Scene.complete
    wait_for("whole again", lambda: restored(scene, name) or whole(scene, name))


async def test_r5_an_old_pod_that_is_not_back_in_time_is_said(scene: Scene) -> None:
    scene.node(cpu="1500m")
    slow = scene.deployment(cpu="1")
    slow["spec"]["template"]["metadata"]["annotations"][BEHAVIOUR] = "slow-ready=12"
    name = scene.run(slow)
    scene.release(name, behaviour="never-ready")
    scene.wait_stuck(name)
    _, outcome = await scene.unstick(name, scene.fix(come_up_timeout=3.0, undo_timeout=4.0))
    assert outcome is not None
    assert (outcome.phase, outcome.reason) == (Phase.FAILED, "NotRestored"), outcome
    assert scene.sets(name)["1"]["spec"]["replicas"] == 1  # it is on its way
    again = await scene.fix().check(scene.target(name))
    assert not again.broken
    wait_for("the old pod", partial(restored, scene, name))
    assert '"failed"' in mark(scene, name)


async def test_a_pod_that_is_ready_for_a_moment_and_crashes_is_undone(scene: Scene) -> None:
    """No readiness probe: it counts as available until it dies, which the controller believes."""
    name = stuck(scene, behaviour="ready-then-crash=0.5")
    _, outcome = await scene.unstick(name, scene.fix(settle=10.0, most_restarts=1))
    assert outcome is not None
    assert outcome.phase is Phase.FAILED, outcome
    assert outcome.reason == "NewPodCrashes", outcome
    assert restored(scene, name), scene.state(name)
