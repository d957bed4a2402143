"""What the tests of zombies share: a node of their own, and a fix with short waits on it."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from remediator.fixes.zombies import ReapZombies, Settings
from remediator.fixes.zombies.plan import Level
from remediator.model import Condition, Outcome, Step, Steps, Target
from tests.zombies.node import Container, Node, compile_workload

QUICK = {
    "min_age": 0.3,
    "wait_sigchld": 1.0,
    "wait_sigterm": 2.0,
    "wait_sigkill": 3.0,
    "stop_grace": 3.0,
    "wait_restart": 10.0,
}
GUIDE = {"below_flood": Level.KILL_PARENTS, "at_flood": Level.KILL_PARENTS}
"""The ladder of the operators' guide."""


@pytest.fixture(scope="session")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that leaves zombies."""
    return compile_workload(tmp_path_factory.mktemp("workload"))


@pytest.fixture
def node(tmp_path: Path, workload: Path) -> Iterator[Node]:
    """A node; its containers end with the test."""
    made = Node(tmp_path / "node", workload)
    yield made
    made.close()


class Log:
    """Keeps the steps a fix records."""

    def __init__(self) -> None:
        self.written: dict[int, Step] = {}
        self.steps = Steps(self._record, lambda: datetime.now(UTC))

    async def _record(self, index: int, step: Step) -> None:
        self.written[index] = step

    @property
    def names(self) -> list[str]:
        return [step.name for step in self.written.values()]


MakeFix = Callable[..., ReapZombies]


@pytest.fixture
def fix(node: Node, tmp_path: Path) -> MakeFix:
    """Makes the fix on the test's node; keywords are settings, or edges of the fix."""

    def make(**options: Any) -> ReapZombies:
        edges = {key: options.pop(key) for key in list(options) if key not in SETTINGS}
        settings = Settings(**{**QUICK, "state_file": str(tmp_path / "restarts.jsonl"), **options})
        return ReapZombies(settings, rootfs=node.rootfs, **edges)

    return make


SETTINGS = frozenset(Settings.__struct_fields__)


def target(container: Container) -> Target:
    """As an alert names it."""
    return Target(node="n1", **container.names._asdict())


async def run(fix: ReapZombies, container: Container) -> tuple[Condition, Outcome, Log]:
    """Check, and apply if broken; fails the test where there is nothing to do."""
    condition = await fix.check(target(container))
    assert condition.broken, condition.message
    log = Log()
    outcome = await fix.apply(target(container), condition, log.steps)
    return condition, outcome, log
