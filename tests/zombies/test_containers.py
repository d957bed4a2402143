"""Real containers under the real shim: each kind of zombie is healed, or left in peace."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from exporter.checks.containers import ContainerNames
from exporter.collectors.zombies import ZombiesCollector
from exporter.config import Config
from remediator.fixes.zombies import Level, ReapZombies, Settings
from remediator.model import Outcome, Phase, Target
from tests.cluster.containerd import Container, ContainerdHost, Pod, Shape
from tests.cluster.images import WORKLOAD
from tests.cluster.zombie_makers import descendants, start_maker, zombie_maker, zombies
from tests.zombies.conftest import QUICK, Log
from tests.zombies.node import until
from tests.zombies.test_hazards import Recorder, values

pytestmark = [pytest.mark.root, pytest.mark.debian]


@contextmanager
def started(
    host: ContainerdHost, kind: str, count: int, *, parents: int = 1, pod: Pod | None = None
) -> Iterator[Container]:
    """A container that leaves zombies of a kind, ended at the end."""
    container = start_maker(host, zombie_maker(kind, count, parents=parents), pod=pod or Pod())
    try:
        yield container
    finally:
        container.stop()


def names(container: Container) -> ContainerNames:
    assert container.pod is not None
    return ContainerNames(container.pod.namespace, container.pod.name, container.name)


async def reap(
    host: ContainerdHost, container: Container, tmp_path: Path, **options: object
) -> tuple[Outcome, Log, Recorder]:
    """Check and apply; an outcome Skipped with the condition's reason where nothing is broken."""
    recorder, log = Recorder(), Log()
    settings = {**QUICK, "state_file": str(tmp_path / "restarts.jsonl"), **options}
    fix = ReapZombies(Settings(**settings), rootfs=host.node.root, pidfds=recorder)  # type: ignore[arg-type]
    target = Target(node="n1", **names(container)._asdict())
    condition = await fix.check(target)
    if not condition.broken:
        skipped = Outcome(phase=Phase.SKIPPED, reason=condition.reason, message=condition.message)
        return skipped, log, recorder
    outcome = await fix.apply(target, condition, log.steps)
    if outcome.phase is Phase.SUCCEEDED:
        assert not (await fix.verify(target, condition)).broken
    return outcome, log, recorder


def alive(container: Container) -> bool:
    return Path(f"/proc/{container.pid}").exists()


@pytest.mark.parametrize("shape", ["cgroupfs", "systemd"])
def test_the_collector_counts_what_the_container_left(
    containerd_host: ContainerdHost, shape: Shape
) -> None:
    node = containerd_host.node
    collector = ZombiesCollector(Config(node_name="n1", rootfs=node.root, zombies_min_age=0))
    maker = zombie_maker("parent", 7, parents=2)
    pod = Pod(pids_max=50)
    container = containerd_host.run(WORKLOAD, maker.argv, pod=pod, shape=shape)
    try:
        until(lambda: len(zombies(container.pid)) == 7)
        key = tuple(names(container))
        assert values(collector, "upkeep_zombie_processes")[key] == 7
        assert values(collector, "upkeep_pids_limit")[key[:2]] == 50
        assert values(collector, "upkeep_pids_used")[key[:2]] == 10
    finally:
        container.stop()
    assert key not in values(collector, "upkeep_zombie_processes")


async def test_a_parent_in_the_middle_under_a_reaping_first_process(
    containerd_host: ContainerdHost, tmp_path: Path
) -> None:
    with started(containerd_host, "parent", 60, parents=6) as container:
        outcome, log, _ = await reap(containerd_host, container, tmp_path)
        assert (outcome.phase, outcome.reason) == (Phase.SUCCEEDED, "ParentsEnded")
        assert log.names == ["sigchld", "sigterm"]
        assert descendants(container.pid) == []
        assert alive(container)


async def test_a_parent_that_missed_a_sigchld(
    containerd_host: ContainerdHost, tmp_path: Path
) -> None:
    with started(containerd_host, "sigchld", 8) as container:
        outcome, _, recorder = await reap(containerd_host, container, tmp_path)
        assert (outcome.phase, outcome.reason) == (Phase.SUCCEEDED, "Reaped")
        assert recorder.sent == [signal.SIGCHLD]
        assert len(descendants(container.pid)) == 1


async def test_a_parent_that_ignores_sigterm(
    containerd_host: ContainerdHost, tmp_path: Path
) -> None:
    with started(containerd_host, "ignores-term", 60) as container:
        outcome, log, _ = await reap(containerd_host, container, tmp_path)
        assert outcome.phase is Phase.SUCCEEDED
        assert log.names == ["sigchld", "sigterm", "sigkill"]
        assert alive(container)


@pytest.mark.parametrize("kind", ["pid1", "exec"])
async def test_zombies_of_a_first_process_that_does_not_reap(
    containerd_host: ContainerdHost, tmp_path: Path, kind: str
) -> None:
    with started(containerd_host, kind, 60) as container:
        outcome, _, recorder = await reap(containerd_host, container, tmp_path)
        assert (outcome.phase, outcome.reason) == (Phase.SKIPPED, "RestartNotAllowed")
        assert recorder.sent == [signal.SIGCHLD]
        assert alive(container)
        assert len(zombies(container.pid)) == 60


async def test_z9_a_daemon_under_a_first_process_that_does_not_reap(
    containerd_host: ContainerdHost, tmp_path: Path
) -> None:
    with started(containerd_host, "daemon", 60, parents=2) as container:
        outcome, _, recorder = await reap(
            containerd_host, container, tmp_path, at_flood=Level.KILL_PARENTS
        )
        assert (outcome.phase, outcome.reason) == (Phase.SKIPPED, "WouldNotHelp")
        assert recorder.sent == [signal.SIGCHLD] * 2
        assert len(descendants(container.pid)) == 62


@pytest.mark.parametrize("kind", ["leader", "imitation"])
async def test_z1_z5_what_only_looks_dead_is_left_in_peace(
    containerd_host: ContainerdHost, tmp_path: Path, kind: str
) -> None:
    with started(containerd_host, kind, 60) as container:
        before = descendants(container.pid)
        outcome, _, recorder = await reap(containerd_host, container, tmp_path)
        assert (outcome.reason, recorder.sent) == ("ConditionCleared", [])
        assert descendants(container.pid) == before


async def test_a_flood_of_5000_over_200_parents_in_one_pass(
    containerd_host: ContainerdHost, tmp_path: Path
) -> None:
    with started(containerd_host, "parent", 5000, parents=200) as container:
        outcome, log, _ = await reap(containerd_host, container, tmp_path)
        assert (outcome.phase, outcome.reason) == (Phase.SUCCEEDED, "ParentsEnded")
        assert log.names == ["sigchld", "sigterm"]
        assert descendants(container.pid) == []
        took = [step.ended_at - step.started_at for step in log.written.values() if step.ended_at]
        assert sum(t.total_seconds() for t in took) < 3.0 + 10.0, "the waits, and a few seconds"


async def test_a_scarcity_of_slots_makes_a_few_zombies_a_flood(
    containerd_host: ContainerdHost, tmp_path: Path
) -> None:
    pod = Pod(pids_max=10)
    with started(containerd_host, "parent", 7, pod=pod) as container:
        outcome, _, _ = await reap(containerd_host, container, tmp_path)
        assert (outcome.phase, outcome.reason) == (Phase.SUCCEEDED, "ParentsEnded")
        assert alive(container)
