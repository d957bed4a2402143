"""E14 at a recording boundary: a dry run sends no signal and writes no file."""

from pathlib import Path

import pytest

from exporter.checks.procfs import Procfs
from remediator.config import Mode
from remediator.fixes.zombies.signals import Pidfds
from tests.engine.boundary import BOUNDARY, once, said_and_not_done
from tests.zombies.conftest import GUIDE, MakeFix, target
from tests.zombies.node import Node

pytestmark = pytest.mark.root


async def test_e14_a_dry_run_of_reap_zombies_crosses_no_boundary(
    node: Node, fix: MakeFix, tmp_path: Path
) -> None:
    container = node.container("--zombies", "12", "--parents", "3", "--first", "reap")
    reaper = fix(**GUIDE, pidfds=Pidfds(Procfs(), send=BOUNDARY.send))
    said_and_not_done(await once(reaper, target(container), tmp_path / "dry", mode=Mode.DRY_RUN))
    assert len(container.zombies()) == 12
    done = await once(reaper, target(container), tmp_path / "wet", mode=Mode.ENFORCE)
    assert done.reason == "ParentsEnded"
    assert {"signal SIGCHLD", "signal SIGTERM"} <= set(BOUNDARY.crossed)  # it would be seen
