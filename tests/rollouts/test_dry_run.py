"""E14 at a recording boundary: a dry run asks the API server and changes nothing in it."""

from pathlib import Path

import pytest

from remediator.config import Mode
from tests.engine.boundary import BOUNDARY, once, said_and_not_done
from tests.rollouts.scene import Scene

pytestmark = [pytest.mark.root, pytest.mark.cluster]


async def test_e14_a_dry_run_of_unstick_rollout_crosses_no_boundary(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.node(cpu="1500m")
    name = scene.run(scene.deployment(cpu="1"))
    scene.release(name)
    scene.wait_stuck(name)
    BOUNDARY.api(monkeypatch)
    fix = scene.fix()
    found = await once(fix, scene.target(name), tmp_path / "dry", mode=Mode.DRY_RUN)
    said_and_not_done(found)
    assert BOUNDARY.reads > 0
    done = await once(fix, scene.target(name), tmp_path / "wet", mode=Mode.ENFORCE)
    assert done.reason == "RolloutUnstuck", done.message
    assert any(crossed.startswith(("PATCH ", "PUT ")) for crossed in BOUNDARY.crossed)
