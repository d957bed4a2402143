"""Whose a remediation is: who has no claim ends nothing, what kills its owners ends (E34, E35)."""

import asyncio

import msgspec
import pytest

from remediator import worker
from remediator.model import Condition, Outcome, Phase, Steps, Target
from tests.engine.bench import OTHER, RULES, Bench, Gated, until
from tests.engine.mend_file import MendFile


async def test_e34_an_owner_that_lost_its_claim_ends_nothing_when_it_is_stopped(
    bench: Bench,
) -> None:
    fix = Gated(bench)
    asked = await bench.ask()
    task = asyncio.create_task(bench.worker(fix).handle(asked))
    await until(lambda: bench.acts == ["web-1"])
    await bench.journal.claim(asked.id, OTHER, None, bench.claim)
    task.cancel()
    await asyncio.wait([task], timeout=30)
    assert (await bench.now(asked)).phase is Phase.RUNNING
    assert bench.counted == []


class Held(MendFile):
    """Its check has seen the file gone, and says so when the test lets it."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.fix.settings)
        self.gate = asyncio.Event()

    async def check(self, target: Target) -> Condition:
        seen = Condition(broken=False, reason="ConditionCleared", message="no such file")
        await self.gate.wait()
        return seen


async def test_e34_two_daemons_on_one_journal_and_one_ends_not_what_the_other_runs(
    bench: Bench,
) -> None:
    looking, running = Held(bench), Gated(bench)
    asked = await bench.ask()
    one = asyncio.create_task(bench.worker(looking).handle(asked))
    two = asyncio.create_task(bench.worker(running).handle(asked))
    await until(lambda: bench.acts == ["web-1"])
    looking.gate.set()
    await asyncio.wait_for(one, 30)
    assert (await bench.now(asked)).phase is Phase.RUNNING
    running.gate.set()
    await asyncio.wait_for(two, 30)
    assert await bench.end(asked) == (Phase.SUCCEEDED, "Mended")


class Dying(MendFile):
    """Ends with its process before its first step, or before the first of the resumption."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.fix.settings)
        self.bench = bench
        self.began = asyncio.Event()

    async def _die(self) -> Outcome:
        self.began.set()
        try:
            await asyncio.sleep(3600)
        finally:
            self.bench.journal.failing["finish"] = 1
        raise AssertionError

    async def apply(self, target: Target, condition: Condition, steps: Steps) -> Outcome:
        return await self._die()

    async def resume(self, target: Target, steps: Steps) -> Outcome:
        return await self._die()


@pytest.mark.parametrize("step", [True, False], ids=["in a step", "before the first"])
async def test_e35_what_its_process_dies_of_again_and_again_ends_in_words(
    bench: Bench, step: bool
) -> None:
    bench.policy = msgspec.structs.replace(RULES, pause_after_failure=True)
    left = await bench.left(step=step)
    for number in range(1, worker.MOST_TAKEOVERS + 1):
        fix = Dying(bench)
        task = asyncio.create_task(bench.worker(fix).handle(left))
        await asyncio.wait_for(fix.began.wait(), 30)
        task.cancel()  # as SIGKILL would: nothing of it is recorded
        await asyncio.wait([task])
        (left,) = await bench.due()
        assert left.claim is not None
        assert left.claim.takeovers == number
    await bench.worker().handle(left)
    found = await bench.now(left)
    assert (found.phase, found.reason) == (Phase.FAILED, "DiedRepeatedly")
    assert "died 4 times" in found.message
    assert ("step 'mend'" if step else "before the first step") in found.message
    (pause,) = await bench.journal.pauses()
    assert pause.reason == "PreviousFailed"
    bench.policy = RULES
    await bench.journal.resume("mend-file", "ada")
    await bench.worker().handle(await bench.ask())
    assert bench.acts == ["web-1"]
