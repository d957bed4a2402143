"""The worker where its journal, its lock, its process or its turn fails it (E4, E15, E21-E27)."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from remediator import acting, worker
from remediator.config import FixPolicy, Mode, Seconds
from remediator.journal import JournalError
from remediator.model import (
    CheckError,
    Condition,
    FixError,
    Outcome,
    Phase,
    Steps,
    Target,
)
from remediator.turns import lock_name
from tests.engine.bench import (
    OTHER,
    RULES,
    Bench,
    Gated,
    annotated,
    approval,
    listed,
    mode,
    until,
    window,
)
from tests.engine.mend_file import MendFile, Settings
from tests.engine.support import NODE, request


async def test_e4_resolved_while_it_waits_cancels_it_and_while_it_runs_does_not(
    bench: Bench,
) -> None:
    bench.policy = approval()
    doing = bench.worker()
    waiting = await bench.ask()
    await doing.handle(waiting)
    assert await bench.end(waiting) == (Phase.PENDING, "NeedsApproval")
    await bench.journal.accept([request(firing=False)], "r-gone")
    await doing.handle(waiting)  # as the scheduler saw it before
    assert await bench.end(waiting) == (Phase.SKIPPED, "AlertResolved")
    assert bench.acts == []

    bench.policy = RULES
    fix = Gated(bench)
    running = await bench.ask()
    task = asyncio.create_task(bench.worker(fix).handle(running))
    await until(lambda: bench.acts == ["web-1"])
    gone = await bench.journal.accept([request(firing=False)], "r-gone-again")
    assert gone.cancelled == ()
    fix.gate.set()
    await asyncio.wait_for(task, 30)
    assert await bench.end(running) == (Phase.SUCCEEDED, "Mended")


async def test_e15_the_daemon_waits_for_the_hosts_lock_and_by_hand_nobody_does(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two journals, so that nothing but the lock keeps them apart."""
    beside = Bench(tmp_path / "beside")
    beside.locks, beside.files = bench.locks, bench.files
    beside.fix = MendFile(Settings(directory=str(bench.files)))
    fix = Gated(bench)
    first = await bench.ask()
    alike = next(  # another target with the same lock: still broken when the first is mended
        f"web-{n}"
        for n in range(2, 10_000)
        if lock_name("mend-file", Target(node=NODE, pod=f"web-{n}"))
        == lock_name("mend-file", first.target)
    )
    one = asyncio.create_task(bench.worker(fix).handle(first))
    await until(lambda: bench.acts == ["web-1"])
    by_hand = await beside.journal.begin("mend-file", first.target, "hand-1", "ada", beside.claim)
    await asyncio.wait_for(beside.worker().execute(by_hand), 30)
    assert await beside.end(by_hand) == (Phase.SKIPPED, "Locked")
    assert "wait for it" in (await beside.now(by_hand)).message
    second = await beside.ask(alike)
    two = asyncio.create_task(beside.worker().handle(second))
    await until(lambda: "waits for the lock" in capsys.readouterr().out)
    assert bench.acts == ["web-1"]
    fix.gate.set()
    await asyncio.wait_for(asyncio.gather(one, two), 30)
    assert await bench.end(first) == (Phase.SUCCEEDED, "Mended")
    assert await beside.end(second) == (Phase.SUCCEEDED, "Mended")
    assert bench.acts == ["web-1", alike]
    await beside.journal.aclose()


async def test_e21_a_step_is_tried_again_while_the_journal_is_away_for_seconds(
    bench: Bench,
) -> None:
    asked = await bench.ask()
    bench.journal.failing["record_step"] = 3
    await bench.worker().handle(asked)
    found = await bench.now(asked)
    assert (found.phase, found.reason) == (Phase.SUCCEEDED, "Mended")
    assert [(s.name, s.ok) for s in found.steps] == [("mend", True)]
    assert bench.acts == ["web-1"]


class WayBack(MendFile):
    """Fails in its second step, and goes back in five more, recorded or not."""

    def __init__(self, settings: Settings, halfway: Callable[[], None]) -> None:
        super().__init__(settings)
        self.halfway = halfway
        self.undone = 0

    async def apply(self, target: Target, condition: Condition, steps: Steps) -> Outcome:
        async with steps.step("first", "go there"):
            pass
        self.halfway()
        try:
            async with steps.step("second", "go further"):
                raise AssertionError("a step that isn't on disk must not begin")
        except JournalError:
            for _ in range(5):
                self.undone += 1
                try:
                    async with steps.step("back", "go back"):
                        pass
                except JournalError:
                    continue
            raise


async def test_e21_a_journal_that_stays_away_ends_it_and_never_holds_up_the_way_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acting, "RECORD_PATIENCE", 0.2)
    asked = await bench.ask()

    def halfway() -> None:
        bench.journal.failing["record_step"] = 1000
        bench.journal.tried.clear()

    fix = WayBack(Settings(directory=str(bench.files)), halfway)
    await bench.worker(fix).handle(asked)
    assert await bench.end(asked) == (Phase.FAILED, "JournalUnavailable")
    assert fix.undone == 5
    assert bench.journal.tried["record_step"] <= 3 + 5  # patience once, then once a step


async def test_e22_a_half_done_one_waits_for_a_lock_file_that_cannot_be_made(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.locks.write_text("a file where the folder should be\n")
    left = await bench.left(step=True)
    task = asyncio.create_task(bench.worker().handle(left))
    await until(lambda: "waits for the lock" in capsys.readouterr().out)
    assert (await bench.now(left)).phase is Phase.RUNNING
    bench.locks.unlink()
    await asyncio.wait_for(task, 30)
    found = await bench.now(left)
    assert (found.phase, found.message) == (Phase.SUCCEEDED, "finished after a crash")


async def test_e22_by_hand_a_lock_file_that_cannot_be_made_is_said(bench: Bench) -> None:
    bench.locks.write_text("a file where the folder should be\n")
    (bench.files / "web-1").touch()
    target = Target(node=NODE, pod="web-1")
    begun = await bench.journal.begin("mend-file", target, "hand-1", "ada", bench.claim)
    await asyncio.wait_for(bench.worker().execute(begun), 30)
    assert await bench.end(begun) == (Phase.SKIPPED, "Locked")
    assert "File exists" in (await bench.now(begun)).message


async def test_e22_what_fails_before_the_claim_leaves_it_to_be_taken_over_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_ERROR_RETRY", 0.01)
    left = await bench.left(step=True)
    doing = bench.worker()
    with monkeypatch.context() as broken:

        async def get(_id: str) -> None:
            raise ZeroDivisionError

        broken.setattr(bench.journal, "get", get)
        await doing.handle(left)
    assert (await bench.now(left)).phase is Phase.RUNNING
    await doing.handle(left)
    assert await bench.end(left) == (Phase.SUCCEEDED, "Mended")


async def test_e23_a_journal_that_fails_during_a_takeover_leaves_it_to_the_next_look(
    bench: Bench,
) -> None:
    left = await bench.left(step=False)
    doing = bench.worker()
    bench.journal.failing["pauses"] = 1
    await doing.handle(left)
    assert bench.acts == []
    for due in await bench.due():
        await doing.handle(due)
    assert await bench.end(left) == (Phase.SUCCEEDED, "Mended")


@pytest.mark.parametrize("step", [True, False])
async def test_e23_a_claim_of_ones_own_that_nobody_carries_out_is_a_dead_owners(
    bench: Bench, step: bool
) -> None:
    left = await bench.left(step=step, claim=bench.claim)
    await bench.worker().handle(left)
    assert await bench.end(left) == (Phase.SUCCEEDED, "Mended")
    assert bench.acts == ["web-1"]


async def test_e23_a_claim_that_became_durable_unnoticed_is_carried_out_once(
    bench: Bench,
) -> None:
    doing = bench.worker()
    asked = await bench.ask()
    bench.journal.failing["claim"] = 1
    await doing.handle(asked)
    (due,) = await bench.due()
    assert (due.phase, due.claim) == (Phase.RUNNING, bench.claim)
    await asyncio.gather(doing.handle(due), doing.handle(due))
    assert await bench.end(asked) == (Phase.SUCCEEDED, "Mended")
    assert bench.acts == ["web-1"]


async def test_e23_what_a_task_here_carries_out_is_not_taken_over(bench: Bench) -> None:
    fix = Gated(bench)
    bench.policy = msgspec.structs.replace(RULES, max_concurrent=4)
    doing = bench.worker(fix)
    task = asyncio.create_task(doing.handle(await bench.ask()))
    await until(lambda: bench.acts == ["web-1"])
    (due,) = await bench.due()
    await asyncio.wait_for(doing.handle(due), 30)
    assert (await bench.now(due)).phase is Phase.RUNNING
    fix.gate.set()
    await asyncio.wait_for(task, 30)
    assert await bench.end(due) == (Phase.SUCCEEDED, "Mended")


def _cleared(bench: Bench) -> None:
    (bench.files / "web-1").unlink()


@pytest.mark.parametrize(
    ("meanwhile", "reason"),
    [
        (annotated, "OptedOut"),
        (listed, "OptedOut"),
        (mode(Mode.OFF), "FixOff"),
        (mode(Mode.DRY_RUN), "DryRun"),
        (mode(Mode.APPROVAL), "OwnerDied"),
        (window, "OwnerDied"),
        (_cleared, "ConditionCleared"),
    ],
)
async def test_e24_what_died_before_its_first_step_is_decided_anew(
    bench: Bench, meanwhile: Callable[[Bench], None], reason: str
) -> None:
    left = await bench.left(step=False)
    meanwhile(bench)
    await bench.worker().handle(left)
    assert await bench.end(left) == (Phase.SKIPPED, reason)
    assert bench.acts == []


async def test_e24_a_pause_holds_for_what_died_before_its_first_step(bench: Bench) -> None:
    left = await bench.left(step=False)
    await bench.journal.pause("mend-file", "ada", "looking")
    await bench.worker().handle(left)
    assert await bench.end(left) == (Phase.SKIPPED, "Paused")
    assert bench.acts == []


async def test_e24_what_was_asked_by_hand_and_died_before_its_first_step_is_not_begun(
    bench: Bench,
) -> None:
    """`run --force` and `restore` are known to the process that died, and to nobody else."""
    left = await bench.left(step=False, hand=True)
    await bench.worker().handle(left)
    assert await bench.end(left) == (Phase.SKIPPED, "OwnerDied")
    assert bench.acts == []


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.DRY_RUN])
async def test_what_a_dead_owner_left_half_done_is_said_where_nothing_may_act(
    bench: Bench, mode: Mode
) -> None:
    left = await bench.left(step=True)
    bench.policy = FixPolicy(mode=mode)
    await bench.worker().handle(left)
    found = await bench.now(left)
    assert (found.phase, found.reason) == (Phase.FAILED, "OwnerDied")
    assert "'mend'" in found.message
    assert bench.acts == []


async def test_e26_a_failure_and_the_pause_it_brings_are_one_commit(bench: Bench) -> None:
    bench.policy = FixPolicy(cooldown=Seconds(0), pause_after_failure=True)
    bench.fix = MendFile(Settings(directory=str(bench.files), misbehave="fail"))
    doing = bench.worker()
    bench.journal.failing = {"pause": 1000, "finish": 1}
    asked = await bench.ask()
    await doing.handle(asked)
    assert await bench.end(asked) == (Phase.FAILED, "Refused")
    (pause,) = await bench.journal.pauses()
    assert (pause.reason, asked.id in pause.why) == ("PreviousFailed", True)
    again = await bench.ask()
    await doing.handle(again)
    assert await bench.end(again) == (Phase.SKIPPED, "PreviousFailed")


class GoesBack(Gated):
    """Ends in words of its own whatever went wrong, as a fix does that has a way back."""

    async def apply(self, target: Target, condition: Condition, steps: Steps) -> Outcome:
        try:
            return await super().apply(target, condition, steps)
        except Exception as error:
            raise FixError("Refused", "put back as it was") from error


@pytest.mark.parametrize("kind", [Gated, GoesBack])
async def test_e27_a_process_thought_dead_does_not_end_what_its_successor_runs(
    bench: Bench, kind: type[Gated]
) -> None:
    fix = kind(bench)
    asked = await bench.ask()
    task = asyncio.create_task(bench.worker(fix).handle(asked))
    await until(lambda: bench.acts == ["web-1"])
    await bench.journal.claim(asked.id, OTHER, None, bench.claim)
    fix.gate.set()
    await asyncio.wait_for(task, 30)
    found = await bench.now(asked)
    assert (found.phase, found.claim) == (Phase.RUNNING, OTHER)
    assert bench.counted == []


class Slow(MendFile):
    """Something that it asks is slow, and says so as Python does."""

    def __init__(self, settings: Settings, where: str) -> None:
        super().__init__(settings)
        self.where = where

    async def check(self, target: Target) -> Condition:
        if self.where == "check":
            raise TimeoutError
        return await super().check(target)

    async def apply(self, target: Target, condition: Condition, steps: Steps) -> Outcome:
        if self.where == "apply":
            raise TimeoutError
        return await super().apply(target, condition, steps)

    async def verify(self, target: Target, condition: Condition) -> Condition:
        raise TimeoutError


@pytest.mark.parametrize(
    ("where", "end", "said"),
    [
        ("check", (Phase.SKIPPED, "CheckFailed"), "unexpectedly (TimeoutError)"),
        ("apply", (Phase.FAILED, "InternalError"), "unexpected error"),
        ("verify", (Phase.FAILED, "VerifyFailed"), "But: TimeoutError"),
    ],
)
async def test_a_timeout_of_something_else_is_not_called_the_deadline(
    bench: Bench, where: str, end: tuple[Phase, str], said: str
) -> None:
    asked = await bench.ask()
    await bench.worker(Slow(bench.fix.settings, where)).handle(asked)
    assert await bench.end(asked) == end
    assert said in (await bench.now(asked)).message


class Unsure(MendFile):
    """Its look afterwards goes wrong."""

    def __init__(self, settings: Settings, error: Exception | None) -> None:
        super().__init__(settings)
        self.error = error

    async def verify(self, target: Target, condition: Condition) -> Condition:
        if self.error is not None:
            raise self.error
        await asyncio.sleep(3600)
        raise AssertionError


@pytest.mark.parametrize("error", [CheckError("can't look"), ZeroDivisionError(), None])
async def test_what_cannot_be_verified_has_failed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    asked = await bench.ask()
    if error is None:
        monkeypatch.setattr(acting, "CHECK_DEADLINE", 0.05)
    await bench.worker(Unsure(Settings(directory=str(bench.files)), error)).handle(asked)
    found = await bench.now(asked)
    assert (found.phase, found.reason) == (Phase.FAILED, "VerifyFailed")
    assert "the file is gone But:" in found.message


async def test_a_fix_that_is_switched_off_meanwhile_leaves_what_waits(bench: Bench) -> None:
    asked = await bench.ask()
    bench.policy = FixPolicy(mode=Mode.OFF)
    await bench.worker().handle(asked)
    assert await bench.end(asked) == (Phase.SKIPPED, "FixOff")
    assert bench.acts == []
