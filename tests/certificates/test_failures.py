"""What goes wrong in the middle: said by its reason, undone whole, no key in any word."""

import asyncio
import base64
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import cast

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from remediator.config import ConfigError, load
from remediator.fixes import settings_types
from remediator.fixes.certificates import RotateCertificates, Settings, commands
from remediator.fixes.certificates.plan import RotationPlan
from remediator.fixes.certificates.renewal import await_kubeadm
from remediator.journal import JournalError
from remediator.model import FixError, Step
from tests.certificates.command import command_line, remediator
from tests.certificates.conftest import MakePki, StepLog
from tests.certificates.test_rotate import BACKUPS, NODE, files, rotate, serials, steps
from tests.cluster.pki import Pki, set_remaining

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.cluster]


class FullLog(StepLog):
    """A journal whose disk is full from one record on."""

    def __init__(self, records: int) -> None:
        super().__init__()
        self._left = records

    async def record(self, index: int, step: Step) -> None:
        if self._left == 0:
            raise JournalError("no space left on device")
        self._left -= 1
        await super().record(index, step)


@pytest.mark.parametrize("records", [0, 3, 4, 6])
async def test_c29_a_journal_that_goes_away_leaves_nothing_half_way(
    make_pki: MakePki, records: int
) -> None:
    pki = make_pki(timedelta(days=3))
    before = files(pki.directory)
    fix = rotate(pki)
    condition = await fix.check(NODE)
    with pytest.raises((JournalError, FixError)) as caught:
        await fix.apply(NODE, condition, steps(FullLog(records)))
    assert "no space left" in str(caught.value)
    assert files(pki.directory) == before
    if records > 2:
        assert isinstance(caught.value, FixError)
        assert caught.value.reason == "RolledBack"


async def test_c3_a_renewal_with_another_key_is_undone_before_a_restart(
    make_pki: MakePki, step_log: StepLog
) -> None:
    pki = make_pki(timedelta(days=3))
    before = files(pki.directory)
    there = pki.directory / "pki"

    async def mixing(arguments: Sequence[str], timeout: float) -> commands.Completed:
        done = await commands.run(arguments, timeout)
        if "renew" in arguments:
            (there / "apiserver.key").write_bytes((there / "front-proxy-client.key").read_bytes())
        return done

    fix = rotate(pki, mixing)
    with pytest.raises(FixError, match=r"apiserver.key is not the key") as caught:
        await fix.apply(NODE, await fix.check(NODE), steps(step_log))
    assert caught.value.reason == "RolledBack"
    assert step_log.names == ["backup", "renew", "roll back"]
    assert files(pki.directory) == before


def sign_again(pki: Pki, *, without: str = "", by: str = "ca") -> None:
    """The API server's certificate, by another CA or without one of its names."""
    path, key = pki.directory / "pki/apiserver.crt", pki.directory / f"pki/{by}.key"
    old = x509.load_pem_x509_certificate(path.read_bytes())
    ca = x509.load_pem_x509_certificate(key.with_suffix(".crt").read_bytes())
    builder = x509.CertificateBuilder(issuer_name=ca.subject, subject_name=old.subject)
    builder = builder.public_key(old.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(old.not_valid_before_utc)
    builder = builder.not_valid_after(old.not_valid_after_utc)
    for extension in old.extensions:
        value = extension.value
        if isinstance(value, x509.SubjectAlternativeName):
            value = x509.SubjectAlternativeName([n for n in value if n.value != without])
        builder = builder.add_extension(value, extension.critical)
    private = load_pem_private_key(key.read_bytes(), password=None)
    signed = builder.sign(cast("RSAPrivateKey", private), SHA256())
    path.write_bytes(signed.public_bytes(Encoding.PEM))


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # of kubeadm's CA
@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"without": "kubernetes.default"}, "apiserver has lost the name kubernetes.default"),
        ({"by": "front-proxy-ca"}, "apiserver is of another CA"),
    ],
)
async def test_c46_a_renewal_that_loses_a_name_or_its_ca_is_undone_before_a_restart(
    make_pki: MakePki, step_log: StepLog, wrong: dict[str, str], why: str
) -> None:
    pki = make_pki(timedelta(days=3))
    before = files(pki.directory)

    async def careless(arguments: Sequence[str], timeout: float) -> commands.Completed:
        done = await commands.run(arguments, timeout)
        if "renew" in arguments:
            sign_again(pki, **wrong)
        return done

    fix = rotate(pki, careless)
    with pytest.raises(FixError, match=why) as caught:
        await fix.apply(NODE, await fix.check(NODE), steps(step_log))
    assert caught.value.reason == "RolledBack"
    assert files(pki.directory) == before


async def failing(arguments: Sequence[str], timeout: float) -> commands.Completed:
    if "renew" in arguments:
        return commands.Completed(status=1, output="error: no")
    return await commands.run(arguments, timeout)


async def test_c1_a_backup_that_went_bad_says_so_when_it_is_needed(
    make_pki: MakePki, step_log: StepLog
) -> None:
    pki = make_pki(timedelta(days=3))

    async def spoiling(arguments: Sequence[str], timeout: float) -> commands.Completed:
        if "renew" in arguments:
            for archive in (pki.rootfs / BACKUPS.lstrip("/")).glob("*/files.tar.gz"):
                archive.write_bytes(archive.read_bytes()[:-3000])
        return await failing(arguments, timeout)

    fix = rotate(pki, spoiling)
    with pytest.raises(FixError, match="could not be put back") as caught:
        await fix.apply(NODE, await fix.check(NODE), steps(step_log))
    assert caught.value.reason == "RollbackFailed"


async def test_c12_a_component_that_never_comes_back_is_named(
    make_pki: MakePki, step_log: StepLog
) -> None:
    pki = make_pki(timedelta(days=3))
    before = files(pki.directory)
    fix = rotate(pki, component_timeout=1.0)
    condition = await fix.check(NODE)
    assert isinstance(condition.detail, RotationPlan)
    plan = msgspec.structs.replace(condition.detail, components=("kube-scheduler",))
    condition = msgspec.structs.replace(condition, detail=plan)
    with pytest.raises(FixError, match="kube-scheduler did not come back") as caught:
        await fix.apply(NODE, condition, steps(step_log))
    assert caught.value.reason == "RestartFailed"
    assert files(pki.directory) == before


async def test_c16_another_version_of_kubeadm(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))

    def says(version: str) -> commands.Run:
        async def run(arguments: Sequence[str], timeout: float) -> commands.Completed:
            return commands.Completed(status=0, output=version)

        return run

    assert (await rotate(pki, says("v1.10.3")).check(NODE)).reason == "KubeadmTooOld"
    assert (await rotate(pki, says("what?")).check(NODE)).reason == "KubeadmFailed"


async def test_c16_what_a_command_started_ends_with_it(tmp_path: Path) -> None:
    script = f"sleep 100 & echo $! > {tmp_path}/pid; exit 0"
    with pytest.raises(commands.CommandError, match="did not end within"):
        await commands.run(["sh", "-c", script], 0.5)
    left = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    deadline = time.monotonic() + 10
    while left.exists() and ") Z " not in left.read_text():  # nobody may reap it for us
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_c4_a_missing_ca_is_named(make_pki: MakePki) -> None:
    pki = make_pki(timedelta(days=3))
    (pki.directory / "pki/front-proxy-ca.crt").unlink()
    condition = await rotate(pki).check(NODE)
    assert (condition.broken, condition.reason) == (False, "CAMissing")
    assert "front-proxy-ca.crt" in condition.message


async def test_c14_what_a_renewal_can_not_help_asks_for_none(
    make_pki: MakePki, step_log: StepLog
) -> None:
    pki = make_pki(timedelta(days=3))
    fix = rotate(pki)
    await fix.apply(NODE, await fix.check(NODE), steps(step_log))
    renewed = serials(pki)
    again = await fix.check(NODE)  # the alert fires on until its next look, and asks once more
    assert (again.broken, again.reason) == (False, "ConditionCleared")

    set_remaining(pki.directory, {"ca": timedelta(days=3)})
    on_ca = await fix.check(NODE)
    assert (on_ca.broken, on_ca.reason) == (False, "ConditionCleared")
    assert serials(pki) == renewed


@pytest.mark.parametrize("sabotage", ["", "exit 1"])
def test_c20_no_key_in_any_word_of_a_rotation(
    make_pki: MakePki, tmp_path: Path, sabotage: str
) -> None:
    pki = make_pki(timedelta(days=3))
    secrets = _secrets(pki)
    kubeadm = tmp_path / "bin/kubeadm"
    kubeadm.parent.mkdir()
    kubeadm.write_text(
        # As a verbose kubeadm would, it prints what it reads.
        f'#!/bin/sh\ncase "$*" in *renew*) cat {pki.directory}/pki/*.key; {sabotage};; esac\n'
        f'exec {pki.binaries.kubeadm} "$@"\n'
    )
    kubeadm.chmod(0o755)
    typed = command_line(pki, tmp_path, "run", "rotate-certificates", kubeadm=kubeadm)
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("}}}", ", kubeadm_timeout: 5s}}}"))
    done = subprocess.run([*typed, "--log.level=debug"], capture_output=True, check=False)
    assert done.stdout
    secrets |= _secrets(pki)
    journal = b"".join(p.read_bytes() for p in tmp_path.glob("journal.db*"))
    for place in (done.stdout, done.stderr, journal):
        assert b"PRIVATE KEY" not in place
        assert not [secret for secret in secrets if secret in place]


def _secrets(pki: Pki) -> set[bytes]:
    """A line out of the middle of every key, as it's written and as a kubeconfig holds it."""
    found = set()
    for path in pki.directory.rglob("*.key"):
        found.add(path.read_bytes().splitlines()[5])
    for path in pki.directory.glob("*.conf"):
        for data in re.findall(rb"client-key-data: (\S+)", path.read_bytes()):
            found |= {data[200:260], base64.b64decode(data).splitlines()[5]}
    return found


async def test_c28_only_the_hosts_own_kubeadm_is_waited_for(tmp_path: Path) -> None:
    words = b"/usr/bin/kubeadm\0certs\0renew\0all\0"
    uid, container = "0a1b2c3d-0000-4000-8000-0123456789ab", "b" * 64
    tenants = tmp_path / "proc/99999999"  # no process of this machine has so high a number
    tenants.mkdir(parents=True)
    (tenants / "cmdline").write_bytes(words)
    (tenants / "cgroup").write_text(f"0::/kubepods/burstable/pod{uid}/{container}\n")
    (tenants / "stat").write_text("99999999 (kubeadm) S " + "0 " * 40)
    begun = time.monotonic()
    await await_kubeadm(tmp_path / "proc", 30)
    assert time.monotonic() - begun < 10

    sleeper = ["-c", "import time; time.sleep(100)", "kubeadm", "certs", "renew"]
    process_ = subprocess.Popen([sys.executable, *sleeper])
    try:
        (tmp_path / "proc" / str(process_.pid)).symlink_to(f"/proc/{process_.pid}")
        waiting = asyncio.create_task(await_kubeadm(tmp_path / "proc", 2))
        await asyncio.sleep(1)
        assert not waiting.done()
        assert process_.poll() is None
        await asyncio.wait_for(waiting, 30)  # longer than its remediator would have let it run
        assert process_.wait(10) == -signal.SIGKILL
    finally:
        process_.kill()
        process_.wait()


async def test_c28_while_somebody_else_renews_nothing_is_begun(
    make_pki: MakePki, tmp_path: Path
) -> None:
    pki = make_pki(timedelta(days=3))
    process = tmp_path / "proc/99999999"
    process.mkdir(parents=True)
    (process / "cmdline").write_bytes(b"kubeadm\0certs\0renew\0all\0")
    (process / "cgroup").write_text("0::/system.slice/k8s-certs-renew.service\n")
    (process / "stat").write_text("99999999 (kubeadm) S " + "0 " * 40)
    (process / "root").symlink_to(pki.rootfs)
    fix = RotateCertificates(
        Settings(kubeadm=str(pki.binaries.kubeadm)),
        node_name="node-1",
        rootfs=pki.rootfs,
        procfs=tmp_path / "proc",
    )
    busy = await fix.check(NODE)
    assert (busy.broken, busy.reason) == (False, "KubeadmBusy")
    assert "pid 99999999" in busy.message
    (process / "root").unlink()
    (process / "root").symlink_to(tmp_path)  # another host's files
    assert (await fix.check(NODE)).broken


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_c30_a_signal_or_a_lost_terminal_leaves_nothing_half_way(
    make_pki: MakePki, tmp_path: Path, number: signal.Signals
) -> None:
    pki = make_pki(timedelta(days=3))
    before = files(pki.directory)
    old = serials(pki)
    kubeadm, mark = tmp_path / "bin/kubeadm", tmp_path / "begun"
    kubeadm.parent.mkdir()
    kubeadm.write_text(
        f'#!/bin/sh\n{pki.binaries.kubeadm} "$@" || exit 1\n'
        f'case "$*" in *renew*) touch {mark}; sleep 3;; esac\n'
    )
    kubeadm.chmod(0o755)
    typed = command_line(
        pki, tmp_path, "run", "rotate-certificates", output="table", kubeadm=kubeadm
    )
    out, into = os.pipe()
    process = subprocess.Popen(typed, stdout=into, stderr=into)
    os.close(into)
    deadline = time.monotonic() + 120
    while not mark.exists():
        assert process.poll() is None, os.read(out, 4096)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert files(pki.directory) != before
    os.close(out)  # whatever it says from now on is an error
    process.send_signal(number)
    status = process.wait(60)

    listed = remediator(pki, tmp_path, "list", output="")
    assert listed[0] == 0
    if number is signal.SIGHUP:
        assert not old.items() & serials(pki).items()
    else:
        assert status == 1
        assert files(pki.directory) == before
    status, again, _ = remediator(pki, tmp_path, "run", "rotate-certificates")
    wanted = "ConditionCleared" if number is signal.SIGHUP else "Renewed"
    assert (status, again["reason"]) == (0, wanted)


def test_durations_are_written_as_everywhere(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "fixes: {rotate-certificates: {settings: {deadline: 2h, component_timeout: 5m}}}"
    )
    settings = load(config, settings_types())[1]["rotate-certificates"]
    assert (settings.deadline, settings.component_timeout) == (7200, 300)
    config.write_text("fixes: {rotate-certificates: {settings: {deadline: 0}}}")
    with pytest.raises(ConfigError, match="longer than nothing"):
        load(config, settings_types())
