"""Renewing a PKI of the real kubeadm by the real kubeadm: what it does, refuses and puts back."""

import asyncio
import os
import stat
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from remediator.fixes.certificates import RotateCertificates, Settings, commands
from remediator.fixes.certificates.backup import load
from remediator.fixes.certificates.kubeadm import certificates_directory
from remediator.model import CheckError, FixError, Phase, Steps, Target
from tests.certificates.conftest import MakePki, StepLog
from tests.cluster.pki import AUTHORITIES, LEAVES, Pki

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.cluster]

NODE = Target(node="node-1")
BACKUPS = "/var/lib/upkeep/backups"


def rotate(pki: Pki, run: commands.Run = commands.run, **options: object) -> RotateCertificates:
    settings = Settings(kubeadm=str(pki.binaries.kubeadm), **options)  # type: ignore[arg-type]
    return RotateCertificates(settings, node_name="node-1", rootfs=pki.rootfs, run=run)


def steps(log: StepLog) -> Steps:
    return Steps(log.record, lambda: datetime.now(UTC), log.steps)


def files(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def serials(pki: Pki) -> dict[str, int]:
    found = pki.certificates()
    return {n: c.serial_number for n, c in found.items() if n in LEAVES and n != "kubelet.conf"}


async def test_renews_what_is_due_and_verifies_it(make_pki: MakePki, step_log: StepLog) -> None:
    pki = make_pki(timedelta(days=3))
    fix = rotate(pki)
    before = serials(pki)
    condition = await fix.check(NODE)
    assert condition.broken, condition.message
    assert condition.reason == "CertificatesDue"
    assert len(condition.identities) == 10
    assert "3 days" in condition.message or "71." in condition.message

    outcome = await fix.apply(NODE, condition, steps(step_log))

    assert outcome.phase is Phase.SUCCEEDED
    after = serials(pki)
    assert all(after[name] != before[name] for name in before)
    verdict = await fix.verify(NODE, condition)
    assert not verdict.broken, verdict.message
    for name, certificate in pki.certificates().items():
        if name not in AUTHORITIES and name != "kubelet.conf":
            left = certificate.not_valid_after_utc - datetime.now(UTC)
            assert left > timedelta(days=364), name
    assert all(step.ok for step in step_log.steps)
    assert (await fix.check(NODE)).reason == "ConditionCleared"


async def test_one_due_certificate_renews_them_all(make_pki: MakePki, step_log: StepLog) -> None:
    pki = make_pki({"apiserver": timedelta(days=13)})
    fix = rotate(pki)
    before = serials(pki)
    condition = await fix.check(NODE)
    assert len(condition.identities) == 1
    assert "1 of 10" in condition.message
    await fix.apply(NODE, condition, steps(step_log))
    after = serials(pki)
    assert not before.items() & after.items()


@pytest.mark.parametrize(
    ("days", "lifetime", "due"),
    [(15, 365, False), (13, 365, True), (11, 30, False), (9, 30, True)],
)
async def test_due_is_14_days_or_a_third_of_life(
    make_pki: MakePki, days: int, lifetime: int, *, due: bool
) -> None:
    pki = make_pki({"apiserver": timedelta(days=days)}, lifetime=timedelta(days=lifetime))
    assert (await rotate(pki).check(NODE)).broken is due


async def test_not_this_node(make_pki: MakePki) -> None:
    with pytest.raises(CheckError, match="not node-2"):
        await rotate(make_pki(timedelta(days=1))).check(Target(node="node-2"))


async def test_c11_backup_holds_keys_is_private_and_never_under_manifests(
    make_pki: MakePki, step_log: StepLog
) -> None:
    pki = make_pki(timedelta(days=3))
    before = files(pki.directory)
    fix = rotate(pki)
    await fix.apply(NODE, await fix.check(NODE), steps(step_log))
    (directory,) = (pki.rootfs / BACKUPS.lstrip("/")).iterdir()
    for path in (directory, directory.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    backup = load(directory)
    assert {str(pki.rootfs) + path for path in backup.index.files} == set(before)
    assert any(path.endswith("pki/ca.key") for path in backup.index.files)

    for place in ("/etc/kubernetes/manifests", "/etc/kubernetes/manifests/x", "/etc/kubernetes"):
        refused = await rotate(pki, backup_directory=place).force(NODE)
        assert refused.reason == "BackupImpossible", place
    (pki.rootfs / "sly").symlink_to("/etc/kubernetes/manifests")
    assert (await rotate(pki, backup_directory="/sly").force(NODE)).reason == "BackupImpossible"


async def test_c1_a_renewal_that_fails_half_way_is_rolled_back(
    make_pki: MakePki, step_log: StepLog
) -> None:
    pki = make_pki(timedelta(days=3))
    before = files(pki.directory)

    async def failing(arguments: Sequence[str], timeout: float) -> commands.Completed:
        if "renew" in arguments:  # what kubeadm finds in the middle of its list
            (pki.directory / "pki/front-proxy-ca.key").unlink()
            (pki.directory / "pki/front-proxy-ca.key").write_text("gone bad")
        return await commands.run(arguments, timeout)

    fix = rotate(pki, failing)
    condition = await fix.check(NODE)
    with pytest.raises(FixError, match="old certificates are back") as caught:
        await fix.apply(NODE, condition, steps(step_log))
    assert caught.value.reason == "RolledBack"
    assert files(pki.directory) == before
    assert step_log.names == ["backup", "renew", "roll back"]
    renew = step_log.steps[1]
    assert renew.ok is False


async def test_c16_kubeadm_missing_hanging_or_lying(make_pki: MakePki, step_log: StepLog) -> None:
    pki = make_pki(timedelta(days=3))
    missing = RotateCertificates(Settings(), node_name="node-1", rootfs=pki.rootfs)
    condition = await missing.check(NODE)
    assert condition.reason == "KubeadmMissing"
    assert "install it" in condition.message

    before = files(pki.directory)

    async def hanging(arguments: Sequence[str], timeout: float) -> commands.Completed:
        if "renew" in arguments:
            return await commands.run(["sleep", "60"], 0.5)
        return await commands.run(arguments, timeout)

    fix = rotate(pki, hanging)
    with pytest.raises(FixError, match="did not end within"):
        await fix.apply(NODE, await fix.check(NODE), steps(step_log))
    assert files(pki.directory) == before

    async def idle(arguments: Sequence[str], timeout: float) -> commands.Completed:
        if "renew" in arguments:  # exit code 0, as kubeadm's for a MISSING one
            return commands.Completed(status=0, output="MISSING!")
        return await commands.run(arguments, timeout)

    fix = rotate(pki, idle)
    with pytest.raises(FixError, match="was not renewed"):
        await fix.apply(NODE, await fix.check(NODE), steps(StepLog()))
    assert files(pki.directory) == before


async def test_cancelled_in_the_renewal_puts_everything_back(
    make_pki: MakePki, step_log: StepLog
) -> None:
    pki = make_pki(timedelta(days=3))
    before = files(pki.directory)
    renewed = asyncio.Event()

    async def slow(arguments: Sequence[str], timeout: float) -> commands.Completed:
        done = await commands.run(arguments, timeout)
        if "renew" in arguments:
            renewed.set()
            await asyncio.sleep(60)
        return done

    fix = rotate(pki, slow)
    task = asyncio.create_task(fix.apply(NODE, await fix.check(NODE), steps(step_log)))
    await renewed.wait()
    assert files(pki.directory) != before
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert files(pki.directory) == before


async def test_c4_refused_before_anything_is_touched(make_pki: MakePki) -> None:
    pki = make_pki({"apiserver": timedelta(days=3), "etcd-ca": timedelta(days=300)})
    before = files(pki.rootfs)
    condition = await rotate(pki).check(NODE)
    assert (condition.broken, condition.reason) == (False, "CAEndsFirst")
    assert "etcd/ca.crt" in condition.message
    assert (await rotate(pki, accept_ca_ending_first=True).check(NODE)).broken

    key = pki.directory / "pki/etcd/ca.key"
    kept = key.read_bytes()
    key.unlink()
    condition = await rotate(pki).check(NODE)
    assert (condition.broken, condition.reason) == (False, "CAKeyMissing")
    key.write_bytes((pki.directory / "pki/ca.key").read_bytes())
    condition = await rotate(pki).check(NODE)
    assert condition.reason == "CAKeyMissing"
    assert "not the key of" in condition.message
    key.write_bytes(kept)
    assert files(pki.rootfs) == before


async def test_c3_key_of_another_certificate_is_seen(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    (pki.directory / "pki/apiserver.key").write_bytes(
        (pki.directory / "pki/front-proxy-client.key").read_bytes()
    )
    condition = await rotate(pki).check(NODE)
    assert condition.reason == "PairMismatch"
    assert "apiserver.key is not the key" in condition.message


async def test_c8_a_clock_before_the_ca_is_refused(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    settings = Settings(kubeadm=str(pki.binaries.kubeadm))
    past = (datetime.now(UTC) - timedelta(days=900)).timestamp()
    fix = RotateCertificates(settings, node_name="node-1", rootfs=pki.rootfs, clock=lambda: past)
    assert (await fix.force(NODE)).reason == "ClockWrong"


async def test_c8_a_clock_that_was_set_back_is_refused(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    later = (datetime.now(UTC) + timedelta(hours=2)).timestamp()
    os.utime(pki.directory / "pki/apiserver.crt", (later, later))
    condition = await rotate(pki).check(NODE)
    assert condition.reason == "ClockWrong"
    assert "set back" in condition.message


async def test_c14_a_renewal_that_would_not_help_is_refused(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    condition = await rotate(pki, act_below_days=500, act_below_fraction=1.0).check(NODE)
    assert condition.reason == "WouldNotHelp"


async def test_the_configuration_must_mean_this_pki(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    config = pki.directory / "kubeadm.yaml"
    text = config.read_text()
    config.write_text(text.replace("certificatesDir: /etc/kubernetes/pki\n", ""))  # its default
    assert certificates_directory(config.read_text()) == ""
    assert (await rotate(pki).check(NODE)).broken
    config.write_text(text.replace("/etc/kubernetes/pki", "/etc/kubernetes/ssl"))
    condition = await rotate(pki).check(NODE)
    assert condition.reason == "NoConfiguration"
    assert "/etc/kubernetes/ssl" in condition.message


async def test_a_half_written_certificate_is_no_condition_but_an_error(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    path = pki.directory / "pki/apiserver.crt"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckError, match=r"apiserver.crt can't be read .*truncated"):
        await rotate(pki).check(NODE)
