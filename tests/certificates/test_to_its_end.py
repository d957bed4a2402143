"""The way back goes to its end, whatever strikes meanwhile; nothing is left taken or stopped."""

import asyncio
from collections.abc import Awaitable, Sequence
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest

from remediator.fixes.certificates import RotateCertificates, commands, recovery
from remediator.fixes.certificates.layout import ETCD_MANIFEST, ETCD_STASH
from remediator.fixes.certificates.plan import RotationPlan
from remediator.journal import JournalError
from remediator.model import Condition, FixError, Step
from tests.certificates.conftest import MakePki, StepLog
from tests.certificates.fake_api import fake_api
from tests.certificates.test_failures import FullLog, failing
from tests.certificates.test_rotate import BACKUPS, NODE, files, rotate, serials, steps
from tests.cluster.pki import Pki

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.cluster]


class SlowLog(StepLog):
    """A journal that takes its time for some steps, and says that the first is there."""

    def __init__(self, *slow: str, earlier: Sequence[Step] = ()) -> None:
        super().__init__()
        self.steps = list(earlier)
        self.reached = asyncio.Event()
        self._slow = slow

    async def record(self, index: int, step: Step) -> None:
        await super().record(index, step)
        if step.name in self._slow and step.ended_at is None:
            self.reached.set()
            await asyncio.sleep(0.3)


async def stopped(work: Awaitable[object], log: SlowLog, times: int = 1) -> BaseException | None:
    """What it ends with when it's cancelled in the log's slow step, so many times."""
    task = asyncio.ensure_future(work)
    await asyncio.wait_for(log.reached.wait(), 60)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.05)
    return (await asyncio.gather(task, return_exceptions=True))[0]  # type: ignore[return-value]


async def test_c40_a_second_signal_does_not_cut_the_way_back_short(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    before = files(pki.directory)
    fix = rotate(pki)
    log = SlowLog("copies", "roll back")
    condition = await fix.check(NODE)
    ended = await stopped(fix.apply(NODE, condition, steps(log)), log, times=3)
    assert isinstance(ended, asyncio.CancelledError)
    assert files(pki.directory) == before
    assert log.names[-1] == "roll back"
    assert log.steps[-1].ok


async def test_c40_a_deadline_does_not_cut_the_way_back_short(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    before = files(pki.directory)

    async def half(arguments: Sequence[str], timeout: float) -> commands.Completed:
        if "renew" in arguments:
            (pki.directory / "pki/apiserver.key").write_text("half")
        return await failing(arguments, timeout)

    fix = rotate(pki, half)
    log = SlowLog("roll back")
    condition = await fix.check(NODE)
    ended = await stopped(fix.apply(NODE, condition, steps(log)), log)
    assert isinstance(ended, FixError)
    assert ended.reason == "RolledBack"
    assert files(pki.directory) == before


async def died(pki: Pki, after: str) -> list[Step]:
    """The step log of a rotation whose process died when this step had just been begun."""
    log = SlowLog(after)
    fix = rotate(pki)

    class DiedError(Exception):
        pass

    async def record(index: int, step: Step) -> None:
        if log.reached.is_set():
            raise DiedError
        await StepLog.record(log, index, step)
        if step.name == after:
            log.reached.set()
            kept.update(files(pki.directory))

    kept: dict[str, bytes] = {}
    log.record = record  # type: ignore[method-assign]
    with pytest.raises((FixError, DiedError)):
        await fix.apply(NODE, await fix.check(NODE), steps(log))
    for path, data in kept.items():  # its own way back is none of a process that died
        Path(path).write_bytes(data)
    return log.steps


@pytest.mark.parametrize("at", ["take up", "copies"])
async def test_c40_a_rotation_taken_up_and_stopped_is_undone(make_pki: MakePki, at: str) -> None:
    pki = make_pki(timedelta(days=3))
    before = files(pki.directory)
    earlier = await died(pki, "copies")
    assert files(pki.directory) != before
    log = SlowLog(at, earlier=earlier)
    log.reached.clear()
    ended = await stopped(rotate(pki).resume(NODE, steps(log)), log, times=2)
    assert isinstance(ended, asyncio.CancelledError)
    assert files(pki.directory) == before


async def test_c40_a_rotation_taken_up_without_a_journal_is_undone(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    before = files(pki.directory)
    log = FullLog(0)
    log.steps = await died(pki, "copies")
    with pytest.raises(FixError, match="no space left") as caught:
        await rotate(pki).resume(NODE, steps(log))
    assert caught.value.reason == "Interrupted"
    assert files(pki.directory) == before


async def test_c42_what_kills_each_of_its_processes_is_left_to_people(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    log = StepLog()
    log.steps = await died(pki, "copies")
    renewed = serials(pki)
    taken_up = msgspec.structs.replace(log.steps[-1], name="take up")
    log.steps += [taken_up] * 2
    with pytest.raises(FixError, match="died 3 times, at last in step 'take up'") as caught:
        await rotate(pki).resume(NODE, steps(log))
    assert caught.value.reason == "Interrupted"
    (backup,) = (pki.rootfs / BACKUPS.lstrip("/")).iterdir()
    assert f"upkeep-remediator restore {backup.name}" in str(caught.value)
    assert serials(pki) == renewed
    log.steps = log.steps[:-1]
    assert (await rotate(pki).resume(NODE, steps(log))).reason == "Renewed"
    assert log.names.count("take up") == 2


async def recovering(fix: RotateCertificates, pki: Pki) -> Condition:
    """What a check finds where certificates have expired, below a kubelet that has obeyed."""
    condition = await fix.check(NODE)
    assert isinstance(condition.detail, RotationPlan)
    manifest = pki.rootfs / ETCD_MANIFEST.lstrip("/")
    manifest.parent.mkdir()
    manifest.write_text("kind: Pod\nspec: {containers: [{command: [etcd, --name=node-1]}]}\n")
    plan = msgspec.structs.replace(condition.detail, components=("etcd",), recovery=True)
    return msgspec.structs.replace(condition, detail=plan)


async def test_c41_no_failure_leaves_etcd_stopped(
    make_pki: MakePki, monkeypatch: pytest.MonkeyPatch
) -> None:
    pki = make_pki(timedelta(days=3))
    monkeypatch.setattr(recovery, "_GONE_FOR", 0.1)
    fix = rotate(pki)
    condition = await recovering(fix, pki)
    with pytest.raises(JournalError):
        await fix.apply(NODE, condition, steps(FullLog(2)))
    assert (pki.rootfs / ETCD_MANIFEST.lstrip("/")).exists()
    assert not (pki.rootfs / ETCD_STASH.lstrip("/")).exists()


async def test_c41_what_a_recovery_left_stopped_is_copied_and_goes_on(
    make_pki: MakePki, monkeypatch: pytest.MonkeyPatch
) -> None:
    pki = make_pki(timedelta(days=3))
    monkeypatch.setattr(recovery, "_GONE_FOR", 0.1)
    fix = rotate(pki, restart="none")
    condition = await recovering(fix, pki)
    manifest, stash = (pki.rootfs / p.lstrip("/") for p in (ETCD_MANIFEST, ETCD_STASH))
    manifest.write_text(manifest.read_text().replace("--name=node-1", "--data-dir=/var/lib/other"))
    manifest.rename(stash)
    (pki.rootfs / "var/lib/other").mkdir(parents=True)
    log = StepLog()
    ended = await fix.apply(NODE, condition, steps(log))
    assert ended.reason == "Renewed"
    assert log.names[:3] == ["stop etcd", "copy etcd", "backup"]
    assert manifest.exists()


async def test_c43_a_lease_whose_answer_was_lost_is_given_back(
    make_pki: MakePki, step_log: StepLog
) -> None:
    pki = make_pki(timedelta(days=3))
    async with fake_api(pki) as api:
        fix = rotate(pki, restart="none")
        condition = await fix.check(NODE)
        assert condition.broken, condition.message

        async def lose(method: str, path: str) -> int:
            return -1 if method == "POST" else 0

        api.meddle = lose
        outcome = await fix.apply(NODE, condition, steps(step_log))
        assert (outcome.phase.value, outcome.reason) == ("Skipped", "ApiUnreachable")
        assert ("POST", "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases") in api.asked
        assert api.lease is not None
        assert api.holder == ""


async def test_c43_a_lease_is_given_back_without_a_journal(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    async with fake_api(pki) as api:
        fix = rotate(pki, restart="none")
        with pytest.raises(JournalError):
            await fix.apply(NODE, await fix.check(NODE), steps(FullLog(1)))
        assert api.lease is not None
        assert api.holder == ""


async def test_c43_a_restore_gives_back_a_lease_whose_answer_was_lost(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    async with fake_api(pki) as api:
        fix = rotate(pki, restart="none")
        await fix.apply(NODE, await fix.check(NODE), steps(StepLog()))
        (backup,) = (pki.rootfs / BACKUPS.lstrip("/")).iterdir()
        restore = fix.restoring(backup.name, forced=True)
        condition = await restore.check(NODE)
        assert condition.broken, condition.message
        renewed = serials(pki)

        lost: list[str] = []

        async def lose(method: str, path: str) -> int:
            if method != "PUT" or len(lost) == 2:  # the client asks once more by itself
                return 0
            lost.append(path)
            return -1

        api.meddle = lose
        with pytest.raises(FixError, match="nothing was changed"):
            await restore.apply(NODE, condition, steps(StepLog()))
        assert api.holder == ""
        assert serials(pki) == renewed
