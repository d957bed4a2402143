"""etcd as a unit of the host: what systemd says of it, and which of its files may come back."""

import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from exporter.checks.certificates import Root
from exporter.checks.certificates.components import read_process
from remediator.fixes.certificates.backup import Backup, BackupWriter, Index
from remediator.fixes.certificates.commands import CommandError, Completed
from remediator.fixes.certificates.host_etcd import HostEtcd, restorable_files
from remediator.fixes.certificates.restart import RestartError
from tests.cluster.kubespray import ENVIRONMENT, ETCD_SSL, write_certificates, write_host_etcd

PROC = Path("/proc")


def unit(answer: str, status: int = 0) -> HostEtcd:
    """On this machine's root, where systemctl answers so."""

    async def run(arguments: Sequence[str], timeout: float) -> Completed:
        assert arguments[0] == "systemctl"
        if not answer:
            raise CommandError("systemctl can't be run: No such file or directory")
        return Completed(status=status, output=answer)

    return HostEtcd(Root(), PROC, run)


async def test_the_process_is_the_one_that_systemd_names() -> None:
    process = await unit(f"MainPID={os.getpid()}").find()
    assert process == read_process(PROC, "etcd", os.getpid())


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("MainPID=0", "etcd.service does not run"),
        ("System has not been booted with systemd", "does not know etcd.service"),
        ("", "No such file"),
    ],
)
async def test_c32_where_systemd_knows_of_no_etcd_it_is_said(answer: str, why: str) -> None:
    with pytest.raises(RestartError, match=why):
        await unit(answer).find()


async def test_c32_a_restart_that_fails_is_said() -> None:
    with pytest.raises(RestartError, match="Job for etcd"):
        await unit("Job for etcd.service failed.", status=1).restart()


async def test_c32_the_unit_of_another_root_is_not_this_machines(tmp_path: Path) -> None:
    with pytest.raises(RestartError, match="on the host itself"):
        await HostEtcd(Root(tmp_path), PROC).find()


def test_c32_older_is_who_started_before_any_of_its_files_was_written(tmp_path: Path) -> None:
    write_host_etcd(tmp_path, "node-1", "127.0.0.1")
    process = read_process(PROC, "etcd", os.getpid())
    assert process is not None
    etcd = HostEtcd(Root(tmp_path), PROC)
    files = sorted((tmp_path / ETCD_SSL.lstrip("/")).iterdir())
    before, after = process.started_at - 60, time.time() + 60
    for path in files:
        os.utime(path, (before, before))
    assert not etcd.is_older_than_its_files(process)
    read = {"ca.pem", "member-node-1.pem", "member-node-1-key.pem"}
    for path in files:
        os.utime(path, (after, after))
        assert etcd.is_older_than_its_files(process) == (path.name in read), path
        os.utime(path, (before, before))


@pytest.fixture
def backup(tmp_path: Path) -> Backup:
    write_host_etcd(tmp_path, "node-1", "127.0.0.1")
    writer = BackupWriter(Root(tmp_path), "/backups", "x")
    files = writer.add_files(())
    index = Index(node="node-1", created=datetime.now(UTC), serials={}, files=files)
    return writer.finish(index)


def test_c32_etcds_files_come_back_under_the_same_ca_only(tmp_path: Path, backup: Backup) -> None:
    root, now = Root(tmp_path), time.time()
    folder = tmp_path / ETCD_SSL.lstrip("/")
    everything = sorted(f"{ETCD_SSL}/{path.name}" for path in folder.iterdir())
    assert len(everything) == 8
    write_certificates(folder, "node-1", "127.0.0.1")  # renewed under the same CA
    assert restorable_files(root, backup, now) == everything
    assert restorable_files(root, backup, now + timedelta(days=36600).total_seconds()) == []
    (folder / "ca.pem").unlink()  # lost: this is what a backup is for
    assert restorable_files(root, backup, now) == everything
    write_certificates(folder, "node-1", "127.0.0.1")  # another CA
    assert restorable_files(root, backup, now) == []
    (tmp_path / ENVIRONMENT.lstrip("/")).unlink()
    assert restorable_files(root, backup, now) == []
