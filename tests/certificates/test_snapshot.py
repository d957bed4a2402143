"""Snapshots of a real etcd: both ways to it, both layouts, and what can cut one short."""

import hashlib
import json
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from deploy.local.debian import binary
from remediator.fixes.certificates.etcd import EtcdError
from remediator.fixes.certificates.snapshot import SnapshotError, read_snapshot
from remediator.model import FixError
from tests.certificates.conftest import MakePki, StepLog
from tests.certificates.real_etcd import Layout, RealEtcd, proxy, real_etcd
from tests.certificates.test_rotate import NODE, files, rotate, steps
from tests.cluster.pki import Pki

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.cluster]


def status(snapshot: Path) -> dict[str, int]:
    """What etcdctl itself says of a file; it fails for one that isn't whole."""
    said = subprocess.run(
        [binary("etcdctl"), "snapshot", "status", snapshot, "--write-out=json"],
        env={"ETCDCTL_API": "3"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found: dict[str, int] = json.loads(said)
    return found


@pytest.mark.parametrize("by", ["gateway", "etcdctl"])
@pytest.mark.parametrize("layout", ["stacked", "kubespray"])
async def test_a_snapshot_with_and_without_etcdctl(
    make_pki: MakePki, tmp_path: Path, layout: Layout, by: str
) -> None:
    with real_etcd(make_pki(), layout, gateway=by == "gateway") as etcd:
        if by == "etcdctl":
            etcd.install_etcdctl()
        else:
            assert not (etcd.rootfs / "usr").exists()
        etcd.fill(8)
        target = tmp_path / "snapshot.db"
        async with proxy(etcd):
            members = await etcd.client.members()
            own = await etcd.client.status()
            assert await etcd.client.healthy()
            assert await etcd.client.unhealthy(members) == ()
            taken = await etcd.client.snapshot(target)
        assert taken.by == by
        assert [m.client_urls for m in members] == [(f"https://127.0.0.1:{etcd.named}",)]
        assert own["version"].startswith("3.")
        assert taken.size >= int(own["dbSize"])
        data = target.read_bytes()
        assert len(data) > 800 * 1024
        assert len(data) == taken.size + 32
        assert hashlib.sha256(data[:-32]).hexdigest() == taken.sha256 == data[-32:].hex()
        assert stat.S_IMODE(target.stat().st_mode) == 0o600
        assert status(target)["totalKey"] >= 8


async def test_no_gateway_and_no_etcdctl_is_said(make_pki: MakePki, tmp_path: Path) -> None:
    with real_etcd(make_pki(), "stacked", gateway=False) as etcd:
        async with proxy(etcd):
            assert await etcd.client.healthy()  # which is no part of the gateway
            with pytest.raises(EtcdError, match=r"gateway off.*there is no etcdctl in"):
                await etcd.client.members()
            with pytest.raises(EtcdError, match=r"gateway off.*there is no etcdctl in"):
                await etcd.client.snapshot(tmp_path / "snapshot.db")


@contextmanager
def filled_etcd(pki: Pki, by: str) -> Iterator[RealEtcd]:
    """One with data enough to be cut short; by: the only way to a snapshot of it."""
    with real_etcd(pki, "stacked", gateway=by == "gateway") as etcd:
        etcd.fill(20)
        if by == "etcdctl":
            etcd.install_etcdctl()
        yield etcd


@pytest.mark.parametrize("by", ["gateway", "etcdctl"])
async def test_c10_a_stream_cut_in_the_middle_leaves_nothing_and_touches_nothing(
    make_pki: MakePki, step_log: StepLog, by: str
) -> None:
    pki = make_pki(timedelta(days=3))
    with filled_etcd(pki, by) as etcd:
        before = files(pki.directory)
        fix = rotate(pki, restart="none")
        async with proxy(etcd, cut_after=700 * 1024):
            condition = await fix.check(NODE)
            assert condition.broken, condition.message
            with pytest.raises(FixError, match="no certificate was changed") as caught:
                await fix.apply(NODE, condition, steps(step_log))
        assert caught.value.reason == "BackupFailed"
        assert step_log.names == ["snapshot"]
        assert step_log.steps[0].ok is False
        assert files(pki.directory) == before
        assert list(etcd.backups.iterdir()) == []
        async with proxy(etcd):  # the network is well again: nothing stands in the way
            await fix.apply(NODE, await fix.check(NODE), steps(StepLog()))
        (backup,) = etcd.backups.glob("2*")
        index = json.loads((backup / "index.json").read_bytes())
        assert index["etcd"]["snapshot"]["by"] == by
        assert index["etcd"]["unhealthy"] == []
        assert len(index["etcd"]["members"]) == 1
        assert index["etcd"]["status"]["version"]
        assert status(backup / "etcd-snapshot.db")["totalKey"] >= 20


def test_c10_a_snapshot_that_ends_early_or_is_none_is_seen(tmp_path: Path) -> None:
    page = bytearray(4096)
    page[16:20] = (0xED0CDAED).to_bytes(4, "little")
    data = bytes(page) * 3
    path = tmp_path / "snapshot.db"

    def read(content: bytes, database_size: int) -> int:
        path.write_bytes(content)
        return read_snapshot(path, database_size=database_size, by="gateway").size

    def whole(content: bytes) -> bytes:
        return content + hashlib.sha256(content).digest()

    assert read(whole(data), len(data)) == len(data)
    for cut in (0, 31, 32, 33, 4096, len(data), len(data) + 31):
        with pytest.raises(SnapshotError, match="cut short"):
            read(whole(data)[:cut], len(data))
    with pytest.raises(SnapshotError, match="of a database of"):
        read(whole(data), len(data) + 1)
    with pytest.raises(SnapshotError, match="begin"):
        read(whole(bytes(8192)), 8192)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that can be filled up."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("by", ["gateway", "etcdctl"])
async def test_c9_a_disk_that_fills_up_during_the_snapshot_touches_nothing(
    make_pki: MakePki, step_log: StepLog, disk: Path, by: str
) -> None:
    pki = make_pki(timedelta(days=3))
    with filled_etcd(pki, by) as etcd:
        before = files(pki.directory)
        target = etcd.rootfs / "backups"
        target.mkdir()
        subprocess.run(["mount", "--bind", disk, target], check=True)
        try:
            fix = rotate(pki, restart="none", backup_directory="/backups")
            async with proxy(etcd):
                condition = await fix.check(NODE)
                assert condition.broken, condition.message
                room = shutil.disk_usage(disk).free - 700 * 1024  # a third of what is needed
                (disk / "filler").write_bytes(bytes(room))
                with pytest.raises(FixError, match=r"(?i)no space left.*no certificate was"):
                    await fix.apply(NODE, condition, steps(step_log))
            assert step_log.names == ["snapshot"]
            assert [path.name for path in disk.iterdir()] == ["filler"]
            assert files(pki.directory) == before
        finally:
            subprocess.run(["umount", target], check=True)
