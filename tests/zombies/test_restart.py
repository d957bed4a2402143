"""The last rung: a container is restarted with leave, once, and never in a loop.

The kubelet's part, to start the container anew, is played by a thread here; a real kubelet does it
in test_cluster.py.
"""

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from remediator.fixes.zombies import ReapZombies
from remediator.fixes.zombies.facts import PodFacts, RestartHistory
from remediator.model import Phase, Step, Steps
from tests.zombies.conftest import Log, MakeFix, run, target
from tests.zombies.node import Container, Node, until
from tests.zombies.test_hazards import Knows, Recorder

pytestmark = pytest.mark.root

ALWAYS = Knows(PodFacts(restart_policy="Always", workload="Deployment/shop/web"))
FLOOD = ("--zombies", "60", "--parents", "0", "--first", "never")


@contextmanager
def kubelet(node: Node, container: Container, *arguments: str) -> Iterator[list[Container]]:
    """Starts the container again, with a new id, once it has ended."""
    started: list[Container] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            if container.shim.poll() is not None:
                uid = container.ref.pod_uid
                started.append(node.container(*arguments, names=container.names, pod_uid=uid))
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield started
    finally:
        stop.set()
        thread.join()


async def test_a_flood_under_the_first_process_ends_with_a_restart(
    node: Node, fix: MakeFix
) -> None:
    container = node.container(*FLOOD)
    with kubelet(node, container, "--live", "1", "--parents", "1") as started:
        condition, outcome, log = await run(fix(facts=ALWAYS), container)
    assert condition.workload == "Deployment/shop/web"
    assert condition.plan[-1] == "Restart the container app, if zombies stay."
    assert (outcome.phase, outcome.reason) == (Phase.SUCCEEDED, "ContainerRestarted")
    assert "tini" in outcome.message
    assert log.names == ["sigchld", "stop-container", "await-container"]
    assert started[0].running


async def test_sigterm_comes_first_where_it_is_heard(
    node: Node, fix: MakeFix, tmp_path: Path
) -> None:
    """A first process that says goodbye on SIGTERM is given the time to."""
    goodbye = tmp_path / "goodbye"
    code = f"""
import os, signal, sys, time
def end(*_):
    open({str(goodbye)!r}, "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
for _ in range(60):
    if os.fork() == 0:
        os._exit(0)
while True:
    time.sleep(60)
"""
    container = node.container(program=[sys.executable, "-S", "-c", code])
    until(lambda: len(container.zombies()) == 60)
    with kubelet(node, container, "--live", "1", "--parents", "1"):
        _, outcome, _ = await run(fix(facts=ALWAYS), container)
    assert outcome.reason == "ContainerRestarted"
    assert goodbye.exists()


async def test_a_container_that_is_not_started_again_is_a_failure(node: Node, fix: MakeFix) -> None:
    container = node.container(*FLOOD)
    _, outcome, _ = await run(fix(facts=ALWAYS, wait_restart=1.0), container)
    assert (outcome.phase, outcome.reason) == (Phase.FAILED, "NotRestarted")


async def test_z22_a_pod_that_asks_for_an_hour_to_stop_is_not_stopped_half_way(
    node: Node, fix: MakeFix
) -> None:
    patient = Knows(PodFacts(restart_policy="Always", grace=3600.0))
    container = node.container(*FLOOD)
    recorder = Recorder()
    reaper = fix(facts=patient, pidfds=recorder)
    condition, outcome, _ = await run(reaper, container)
    assert "3600 s to stop" in condition.plan[-1]
    assert (outcome.phase, outcome.reason) == (Phase.SKIPPED, "RestartNotAllowed")
    assert "more than max_stop_grace (300 s)" in outcome.message
    assert set(recorder.sent) == {signal.SIGCHLD}
    assert reaper.deadline > reaper.settings.max_stop_grace


async def test_z11_the_same_workload_floods_again_and_people_are_called(
    node: Node, fix: MakeFix
) -> None:
    now = 1_000_000.0
    container = node.container(*FLOOD)
    reaper = fix(facts=ALWAYS, now=lambda: now, restart_cooldown=3600.0, max_restarts=2)
    with kubelet(node, container, *FLOOD) as started:
        assert (await run(reaper, container))[1].reason == "ContainerRestarted"
    container = started[0]
    now += 600
    _, outcome, log = await run(reaper, container)
    assert (outcome.phase, outcome.reason) == (Phase.FAILED, "NeedsPeople")
    assert "may be again in 50 min" in outcome.message
    assert log.names == ["sigchld"]
    assert container.running
    now += 3600
    with kubelet(node, container, *FLOOD) as started:
        assert (await run(reaper, container))[1].reason == "ContainerRestarted"
    container = started[0]
    now += 3601
    _, outcome, _ = await run(reaper, container)
    assert (outcome.phase, outcome.reason) == (Phase.FAILED, "NeedsPeople")
    assert "was restarted 2 times in 7 days and floods again" in outcome.message
    assert container.running


@pytest.mark.parametrize("broken", ["torn", "folder", "unwritable"])
async def test_z11_without_a_memory_of_restarts_there_is_none(
    node: Node, fix: MakeFix, tmp_path: Path, broken: str
) -> None:
    state = tmp_path / "state" / "restarts.jsonl"
    if broken == "torn":
        state.parent.mkdir()
        state.write_text('{"workload": "x", "at": 1}\n{"workl')
    elif broken == "folder":
        state.mkdir(parents=True)
    else:
        state.parent.write_text("a file where the folder should be")
    container = node.container(*FLOOD)
    _, outcome, log = await run(fix(facts=ALWAYS, state_file=str(state)), container)
    assert (outcome.phase, outcome.reason) == (Phase.FAILED, "NeedsPeople")
    assert str(state) in outcome.message
    assert log.names == ["sigchld"]
    assert container.running


def test_z11_the_memory_of_restarts_is_bounded(tmp_path: Path) -> None:
    history = RestartHistory(tmp_path / "restarts.jsonl")
    for at in range(100):
        history.add("Deployment/shop/web", float(at), keep_after=at - 10.0)
    assert history.read("Deployment/shop/web") == [float(at) for at in range(89, 100)]
    assert history.read("Deployment/shop/other") == []
    lines = (tmp_path / "restarts.jsonl").read_text().splitlines()
    assert json.loads(lines[-1]) == {"workload": "Deployment/shop/web", "at": 99.0}


async def steps_of_one_who_died(fix: ReapZombies, container: Container, until_step: str) -> Steps:
    """The log that a remediator left which was killed in a step."""
    condition = await fix.check(target(container))
    log = Log()

    class KilledError(Exception):
        pass

    async def record(index: int, step: Step) -> None:
        log.written[index] = step
        if step.name == until_step and step.ended_at is None:
            raise KilledError

    with pytest.raises(KilledError):
        await fix.apply(target(container), condition, Steps(record, lambda: datetime.now(UTC)))
    return Steps(record, lambda: datetime.now(UTC), earlier=tuple(log.written.values()))


async def test_a_successor_looks_before_it_says_how_it_ended(node: Node, fix: MakeFix) -> None:
    container = node.container("--zombies", "60", "--parents", "3")
    reaper = fix()
    steps = await steps_of_one_who_died(reaper, container, "sigterm")
    outcome = await reaper.resume(target(container), steps)
    assert (outcome.phase, outcome.reason) == (Phase.FAILED, "Interrupted")
    assert "done so far: sigchld, sigterm" in outcome.message
    assert len(container.zombies()) == 60, "nothing is repeated blindly"
    container.kill()
    outcome = await reaper.resume(target(container), steps)
    assert (outcome.phase, outcome.reason) == (Phase.SUCCEEDED, "Reaped")


async def test_a_restart_that_was_interrupted_is_followed_to_its_end(
    node: Node, fix: MakeFix
) -> None:
    container = node.container(*FLOOD)
    reaper = fix(facts=ALWAYS, wait_restart=2.0)
    steps = await steps_of_one_who_died(reaper, container, "stop-container")
    outcome = await reaper.resume(target(container), steps)
    assert (outcome.phase, outcome.reason) == (Phase.FAILED, "Interrupted")
    assert container.running
    container.kill()
    outcome = await reaper.resume(target(container), steps)
    assert (outcome.phase, outcome.reason) == (Phase.FAILED, "NotRestarted")
    node.container("--live", "1", "--parents", "1", pod_uid=container.ref.pod_uid)
    outcome = await reaper.resume(target(container), steps)
    assert (outcome.phase, outcome.reason) == (Phase.SUCCEEDED, "ContainerRestarted")
