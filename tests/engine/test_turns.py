"""What waited for its turn: what is asked once more, and with what it acts (E25, E37, E40)."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from remediator import worker
from remediator.config import FixPolicy, Mode, Seconds
from remediator.model import Condition, Phase, Target
from tests.engine.bench import Bench, Gated, listed, mode, until, window
from tests.engine.mend_file import MendFile, Settings


@pytest.mark.parametrize(
    ("meanwhile", "end"),
    [
        (listed, (Phase.SKIPPED, "OptedOut")),
        (mode(Mode.DRY_RUN), (Phase.SKIPPED, "DryRun")),
        (mode(Mode.APPROVAL), (Phase.PENDING, "NeedsApproval")),
        (window, (Phase.PENDING, "OutsideWindow")),
    ],
)
async def test_e40_what_waited_for_its_turn_is_decided_once_more_however_short_it_was(
    bench: Bench, meanwhile: Callable[[Bench], None], end: tuple[Phase, str]
) -> None:
    fix = Gated(bench)
    doing = bench.worker(fix)
    one, two = await bench.ask("web-1"), await bench.ask("web-2")
    running = asyncio.create_task(doing.handle(one))
    await until(lambda: bench.acts == ["web-1"])
    waiting = asyncio.create_task(doing.handle(two))
    while (await bench.now(two)).phase is not Phase.ADMITTED:
        await asyncio.sleep(0.01)
    meanwhile(bench)
    fix.gate.set()
    await asyncio.wait_for(asyncio.gather(running, waiting), 30)
    assert await bench.end(two) == end
    assert bench.acts == ["web-1"]


async def test_the_fix_that_looked_is_the_one_that_acts(bench: Bench, tmp_path: Path) -> None:
    """A reload in between brings another, which knows nothing of what was seen."""
    fix = Gated(bench)
    doing = bench.worker(fix)
    one, two = await bench.ask("web-1"), await bench.ask("web-2")
    running = asyncio.create_task(doing.handle(one))
    await until(lambda: bench.acts == ["web-1"])
    waiting = asyncio.create_task(doing.handle(two))
    while (await bench.now(two)).phase is not Phase.ADMITTED:
        await asyncio.sleep(0.01)
    doing.fixes = {"mend-file": MendFile(Settings(directory=str(tmp_path)))}
    fix.gate.set()
    await asyncio.wait_for(asyncio.gather(running, waiting), 30)
    assert await bench.end(two) == (Phase.SUCCEEDED, "Mended")
    assert bench.acts == ["web-1", "web-2"]


async def test_e37_two_pods_of_one_workload_are_not_mended_at_the_same_time(
    bench: Bench,
) -> None:
    """Their alerts come together; both restarted at once would leave nothing serving."""
    bench.policy = FixPolicy(cooldown=Seconds(600), max_acts=10, max_concurrent=2)
    bench.fix = MendFile(msgspec.structs.replace(bench.fix.settings, workload="deployment/a/b"))
    fix = Gated(bench)
    doing = bench.worker(fix)
    one, two = await bench.ask("web-1"), await bench.ask("web-2")
    tasks = [asyncio.create_task(doing.handle(r)) for r in (one, two)]
    await until(lambda: any(task.done() for task in tasks))
    assert len(bench.acts) <= 1
    fix.gate.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 30)
    ends = sorted([await bench.end(one), await bench.end(two)])
    assert ends == [(Phase.SKIPPED, "Cooldown"), (Phase.SUCCEEDED, "Mended")]
    assert len(bench.acts) == 1


class Counting(MendFile):
    """Counts the looks."""

    looks = 0

    async def check(self, target: Target) -> Condition:
        self.looks += 1
        return await super().check(target)


async def test_e25_waiting_for_a_slot_costs_one_look_more_and_no_place_in_the_queue(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "FRESH", -1.0)  # any wait is longer
    fix = Counting(Settings(directory=str(bench.files)))
    doing = bench.worker(fix)
    asked = [await bench.ask(f"web-{n}") for n in range(3)]
    await asyncio.gather(*map(doing.handle, asked))
    assert [await bench.end(r) for r in asked] == [(Phase.SUCCEEDED, "Mended")] * 3
    assert fix.looks == 3 * 3  # admitted, right before acting, and after it
