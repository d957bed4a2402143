"""The way back: restoring, full disks, cut snapshots, and copies of admin.conf."""

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from exporter.checks.certificates import Root
from remediator.fixes.certificates.backup import (
    BackupError,
    BackupWriter,
    load,
    put_back,
    read_files,
)
from remediator.fixes.certificates.backup_place import directory_problem, space_problem
from remediator.fixes.certificates.copies import renew_copy
from remediator.fixes.certificates.etcd import Member, quorum_problem
from remediator.fixes.certificates.kept import prune
from tests.certificates.conftest import MakePki, StepLog
from tests.certificates.test_rotate import BACKUPS, NODE, files, rotate, steps
from tests.cluster.pki import Pki, set_remaining

pytestmark = [pytest.mark.root, pytest.mark.debian]


async def rotated(pki: Pki) -> str:
    """A rotation, and the name of its backup."""
    fix = rotate(pki)
    await fix.apply(NODE, await fix.force(NODE), steps(StepLog()))
    return max(p.name for p in (pki.rootfs / BACKUPS.lstrip("/")).iterdir())


async def test_only_so_many_backups_are_kept(make_pki: MakePki) -> None:
    pki = make_pki()
    name = await rotated(pki)
    folder = pki.rootfs / BACKUPS.lstrip("/")
    for number in range(7):
        shutil.copytree(folder / name, folder / f"2020010{number}T000000Z")
    (folder / ".partial-x").mkdir()
    (folder / "somebody-elses").mkdir()
    prune(Root(pki.rootfs), BACKUPS, 3, node="node-1")
    assert {p.name for p in folder.iterdir()} == {
        name,
        "20200106T000000Z",
        "20200105T000000Z",
        "somebody-elses",
    }


async def test_c1_no_damaged_archive_is_put_back(make_pki: MakePki) -> None:
    pki = make_pki()
    root = Root(pki.rootfs)
    folder = pki.rootfs / BACKUPS.lstrip("/") / await rotated(pki)
    backup = load(folder)
    archive = folder / "files.tar.gz"
    whole = archive.read_bytes()
    step = len(whole) // 12
    damaged = [whole[:cut] for cut in range(0, len(whole), step)]
    damaged += [
        whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]
        for at in range(12, len(whole), step)  # behind the header, whose time may be any
    ]
    now = {path: Path(root.resolve(path)).read_bytes() for path in backup.index.files}
    then = read_files(backup, lambda _path: True)
    assert now != then
    refused = 0
    for data in damaged:
        archive.write_bytes(data)
        try:
            load(folder)
            put_back(root, backup, now)
        except BackupError:
            refused += 1
        else:  # the damage is in what pads it
            assert read_files(backup, lambda _path: True) == then
        with suppress(BackupError):  # damaged only since it was loaded
            put_back(root, backup, now)
        for path, renewed in now.items():
            assert Path(root.resolve(path)).read_bytes() in (renewed, then[path])
    assert refused > len(damaged) * 0.8


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


async def test_c9_a_full_disk_touches_nothing(make_pki: MakePki, small_disk: Path) -> None:
    pki = make_pki(timedelta(days=3))
    target = pki.rootfs / "backups"
    target.mkdir()
    subprocess.run(["mount", "--bind", small_disk, target], check=True)
    try:
        before = files(pki.directory)
        condition = await rotate(pki, backup_directory="/backups").check(NODE)
        assert (condition.broken, condition.reason) == (False, "BackupImpossible")
        assert "MiB free" in condition.message
        (target / "filler").write_bytes(bytes(30 * 1024))
        writer = BackupWriter(Root(pki.rootfs), "/backups", "x")  # it filled up after the check
        with pytest.raises(BackupError, match="No space left"):
            writer.add_files(())
        writer.discard()
        assert [p.name for p in target.iterdir()] == ["filler"]
        assert files(pki.directory) == before
    finally:
        subprocess.run(["umount", target], check=True)


def test_space_counts_what_is_to_be_saved(make_pki: MakePki) -> None:
    root = Root(make_pki().rootfs)
    assert space_problem(root, "/var/lib/upkeep/backups") == ""
    assert "make room" in space_problem(root, "/var/lib/upkeep/backups", extra=1 << 60)
    assert "absolute" in directory_problem(root, "backups")


@pytest.mark.parametrize("what", ["pki", "pki/etcd", "pki/apiserver.key"])
async def test_c24_a_pki_that_a_backup_would_miss_is_not_renewed(
    make_pki: MakePki, what: str
) -> None:
    pki = make_pki(timedelta(days=3))
    shutil.move(pki.directory / what, pki.rootfs / "elsewhere")
    up = "../" * (2 + what.count("/"))
    (pki.directory / what).symlink_to(f"{up}elsewhere")
    condition = await rotate(pki).check(NODE)
    assert (condition.broken, condition.reason) == (False, "BackupImpossible")
    assert "is /elsewhere" in condition.message
    assert f"/etc/kubernetes/{what}" in condition.message
    (pki.directory / what).unlink()
    inside = pki.directory / "ssl"
    shutil.move(pki.rootfs / "elsewhere", inside)
    (pki.directory / what).symlink_to("/etc/kubernetes/ssl")
    assert (await rotate(pki).check(NODE)).broken


def test_c5_no_member_goes_while_another_is_unhealthy() -> None:
    members = tuple(
        Member(name=f"m{n}", client_urls=(f"https://10.0.0.{n}:2379",), is_learner=False)
        for n in range(3)
    )
    assert quorum_problem(members, ()) == ""
    assert "m1" in quorum_problem(members, ("m1",))


def test_a_copy_of_the_same_identity_is_renewed(make_pki: MakePki) -> None:
    pki = make_pki()
    admin = pki.directory / "admin.conf"
    copy = pki.rootfs / "root/.kube/config"
    copy.parent.mkdir(parents=True)
    old = admin.read_bytes()
    copy.write_bytes(old)
    os.chown(copy, 1000, 1001)
    copy.chmod(0o600)
    set_remaining(pki.directory, {"admin.conf": timedelta(days=300)})
    said = renew_copy(Root(pki.rootfs), "/root/.kube/config")
    assert "renewed" in said
    assert copy.read_bytes() == admin.read_bytes()
    assert copy.with_name("config.old").read_bytes() == old
    for path in (copy, copy.with_name("config.old")):
        found = path.stat()
        assert (found.st_uid, found.st_gid) == (1000, 1001)
        assert stat.S_IMODE(found.st_mode) == 0o600
    assert "up to date" in renew_copy(Root(pki.rootfs), "/root/.kube/config")


def test_a_copy_that_cannot_be_written_is_said_and_no_failure(make_pki: MakePki) -> None:
    pki = make_pki()
    folder = pki.rootfs / "root/.kube"
    folder.mkdir(parents=True)
    shutil.copy(pki.directory / "admin.conf", folder / "config")
    set_remaining(pki.directory, {"admin.conf": timedelta(days=300)})
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        said = renew_copy(Root(pki.rootfs), "/root/.kube/config")
    finally:
        subprocess.run(["umount", folder], check=True)
    assert said == "/root/.kube/config could not be renewed: Read-only file system"


@pytest.mark.parametrize("whose", ["other-cluster", "other-user", "token", "garbage"])
def test_c15_somebody_elses_kubeconfig_is_untouched(
    make_pki: MakePki, tmp_path: Path, whose: str
) -> None:
    pki = make_pki()
    copy = pki.rootfs / "root/.kube/config"
    copy.parent.mkdir(parents=True)
    if whose == "other-cluster":
        set_remaining(pki.directory, {"ca": timedelta(days=3000)})  # another CA's certificate
        shutil.copy(pki.directory / "admin.conf", copy)
        set_remaining(pki.directory, {"ca": timedelta(days=3100)})
    elif whose == "other-user":
        shutil.copy(pki.directory / "scheduler.conf", copy)
    elif whose == "token":
        copy.write_text("{users: [{name: u, user: {token: abc}}], clusters: []}")
    else:
        copy.write_text("no kubeconfig\n")
    before = files(copy.parent)
    assert "left alone" in renew_copy(Root(pki.rootfs), "/root/.kube/config")
    assert files(copy.parent) == before


def test_an_unfinished_backup_is_none(make_pki: MakePki) -> None:
    writer = BackupWriter(Root(make_pki().rootfs), BACKUPS, "x")
    writer.add_files(())
    assert writer.partial.name.startswith(".")
    with pytest.raises(BackupError, match="not a whole backup"):
        load(writer.partial)
