"""The ladder on real processes: each kind of zombie is cleared, and nothing more is done."""

import pytest

from exporter.yaml_source import Source
from remediator.config import ConfigError, parse
from remediator.fixes import settings_types
from remediator.model import Phase
from tests.zombies.conftest import GUIDE, MakeFix, run, target
from tests.zombies.node import PROCFS, Node

pytestmark = pytest.mark.root


async def test_parents_in_the_middle_are_ended_and_the_first_process_lives(
    node: Node, fix: MakeFix
) -> None:
    container = node.container("--zombies", "12", "--parents", "3", "--first", "reap")
    reaper = fix(**GUIDE)
    condition, outcome, log = await run(reaper, container)
    assert len(condition.identities) == 12
    assert (outcome.phase, outcome.reason) == (Phase.SUCCEEDED, "ParentsEnded")
    assert log.names == ["sigchld", "sigterm"]
    assert container.zombies() == []
    assert container.processes() == [container.first]
    assert not (await reaper.verify(target(container), condition)).broken


async def test_a_parent_that_ignores_sigterm_is_killed(node: Node, fix: MakeFix) -> None:
    container = node.container("--zombies", "6", "--parents", "1", "--term", "ignore")
    _, outcome, log = await run(fix(**GUIDE), container)
    assert outcome.phase is Phase.SUCCEEDED
    assert log.names == ["sigchld", "sigterm", "sigkill"]
    assert container.processes() == [container.first]


async def test_sigchld_is_enough_where_the_parent_missed_one(node: Node, fix: MakeFix) -> None:
    container = node.container("--zombies", "8", "--parents", "2", "--chld", "handler")
    before = set(container.processes()) - set(container.zombies())
    _, outcome, log = await run(fix(), container)
    assert (outcome.phase, outcome.reason) == (Phase.SUCCEEDED, "Reaped")
    assert log.names == ["sigchld"]
    assert set(container.processes()) == before


async def test_below_a_flood_nobody_is_ended(node: Node, fix: MakeFix) -> None:
    container = node.container("--zombies", "8", "--parents", "2")
    before = sorted(container.processes())
    _, outcome, log = await run(fix(), container)
    assert (outcome.phase, outcome.reason) == (Phase.SKIPPED, "BelowActLimit")
    assert "8 of 8 zombies stay" in outcome.message
    assert log.names == ["sigchld"]
    assert sorted(container.processes()) == before


async def test_a_few_zombies_are_left_alone(node: Node, fix: MakeFix) -> None:
    container = node.container("--zombies", "4", "--parents", "2")
    condition = await fix().check(target(container))
    assert (condition.broken, condition.reason) == (False, "BelowActLimit")


async def test_a_healthy_container_is_cleared(node: Node, fix: MakeFix) -> None:
    container = node.container("--live", "3", "--parents", "1")
    condition = await fix().check(target(container))
    assert (condition.broken, condition.reason) == (False, "ConditionCleared")
    assert condition.plan == ()


async def test_a_flood_over_many_parents_is_cleared_in_one_pass(node: Node, fix: MakeFix) -> None:
    container = node.container("--zombies", "600", "--parents", "40", "--first", "reap")
    neighbour = node.container("--live", "2", "--parents", "1")
    before = sorted(neighbour.processes())
    condition, outcome, log = await run(fix(), container)
    assert condition.reason == "ZombieFlood"
    assert (outcome.phase, outcome.reason) == (Phase.SUCCEEDED, "ParentsEnded")
    assert log.names == ["sigchld", "sigterm"]
    assert container.processes() == [container.first]
    assert sorted(neighbour.processes()) == before


async def test_the_plan_of_a_dry_run_touches_nothing(node: Node, fix: MakeFix) -> None:
    container = node.container("--zombies", "60", "--parents", "6")
    before = {pid: PROCFS.stat(pid) for pid in container.processes()}
    condition = await fix().check(target(container))
    assert condition.plan[0] == "Send SIGCHLD to 6 parents, so that they reap."
    assert condition.plan[1] == "Send SIGTERM, then SIGKILL, to 6 of them, if they don't."
    assert {pid: PROCFS.stat(pid) for pid in container.processes()} == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("pids_left_percent", 400),
        ("pids_left_percent", -1),
        ("max_restarts", -1),
        ("act_at", 0),
        ("max_stop_grace", -1),
        ("min_age", 121),
    ],
)
def test_settings_that_make_no_sense_are_refused(option: str, value: int) -> None:
    """A `min_age` longer than a check may take would make every check fail."""
    text = f"fixes:\n  reap-zombies:\n    settings:\n      {option}: {value}\n"
    with pytest.raises(ConfigError, match=r"r\.yml:"):
        parse(Source(text, "r.yml"), settings_types())
