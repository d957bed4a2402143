"""What a backup has to hold, what comes back of it, and what of others it leaves alone."""

import asyncio
import os
import resource
import shutil
import stat
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import pytest

from exporter.checks.certificates import Root
from remediator.fixes.certificates import backup as backups
from remediator.fixes.certificates import restore
from remediator.fixes.certificates.backup import (
    INDEX,
    Backup,
    BackupError,
    BackupWriter,
    Index,
    load,
    put_back,
)
from remediator.fixes.certificates.backup_place import link_problem
from remediator.fixes.certificates.etcd import Etcd, EtcdAccess, EtcdError, Member
from remediator.fixes.certificates.kept import discard_begun, prune
from remediator.fixes.certificates.layout import Layout
from remediator.fixes.certificates.plan import RefusedError
from remediator.fixes.certificates.restorable import foreign, usable
from remediator.fixes.certificates.restore import Restore, RestorePlan
from remediator.fixes.certificates.settings import Settings
from remediator.shield import shielded

pytestmark = [pytest.mark.root]

DIRECTORY = "/backups"
PKI = "etc/kubernetes/pki"


def write(root: Path, path: str, data: str) -> Path:
    file = root / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(data)
    return file


def back_up(root: Root) -> Backup:
    writer = BackupWriter(root, DIRECTORY, "x")
    files = writer.add_files(())
    serials = {"apiserver": "1"}
    index = Index(node="node-1", created=datetime.now(UTC), serials=serials, files=files)
    return writer.finish(index)


def test_c50_a_named_link_is_followed_into_the_backup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the host itself, whose root is no folder that links are followed in."""
    there = tmp_path / "etc/kubernetes"
    write(tmp_path, "srv/kubernetes/pki/apiserver.key", "old")
    write(tmp_path, "home/ops/kubeconfig", "old copy")
    there.parent.mkdir()
    there.symlink_to("../srv/kubernetes")
    copy = tmp_path / "config"
    copy.symlink_to("home/ops/kubeconfig")
    monkeypatch.setattr(backups, "SOURCES", (str(there),))
    writer = BackupWriter(Root(), f"{tmp_path}/backups", "x")
    hashes = writer.add_files([str(copy)])
    key = f"{there}/pki/apiserver.key"
    assert set(hashes) == {key, str(copy)}
    kept = writer.finish(Index(node="n", created=datetime.now(UTC), serials={}, files=hashes))
    Path(key).write_text("new")
    assert put_back(Root(), kept, [key]) == [key]
    assert (tmp_path / "srv/kubernetes/pki/apiserver.key").read_text() == "old"
    assert there.is_symlink()


def test_c50_of_two_hard_links_each_comes_back(tmp_path: Path) -> None:
    first = write(tmp_path, f"{PKI}/apiserver.key", "old")
    second = first.with_name("other.key")
    second.hardlink_to(first)
    kept = back_up(Root(tmp_path))
    assert set(kept.index.files) == {f"/{PKI}/apiserver.key", f"/{PKI}/other.key"}
    first.write_text("new")  # as kubeadm does, in place
    put_back(Root(tmp_path), kept, kept.index.files)
    assert (first.read_text(), second.read_text()) == ("old", "old")


def test_c50_what_is_needed_must_be_in_it_and_what_goes_meanwhile_need_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, f"{PKI}/apiserver.key", "old")
    swap = write(tmp_path, f"{PKI}/.apiserver.key.swp", "x")
    listed = os.scandir

    def going(path: Path) -> list[os.DirEntry[str]]:
        found = list(listed(path))
        if path.name == "pki":
            swap.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(os, "scandir", going)
    writer = BackupWriter(Root(tmp_path), DIRECTORY, "x")
    needed = f"/{PKI}/apiserver.key"
    assert set(writer.add_files((), [needed])) == {needed}
    writer = BackupWriter(Root(tmp_path), DIRECTORY, "y")
    with pytest.raises(BackupError, match=r"apiserver.crt did not get into the backup"):
        writer.add_files((), [needed, f"/{PKI}/apiserver.crt"])


def test_c50_a_large_file_beside_the_pki_needs_no_memory(tmp_path: Path) -> None:
    large = write(tmp_path, "etc/kubernetes/audit.log", "")
    os.truncate(large, 300 << 20)
    write(tmp_path, f"{PKI}/apiserver.key", "old")
    pid = os.fork()
    if pid == 0:  # in a process of its own, for its memory is measured
        status = 1
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            load(back_up(Root(tmp_path)).directory)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            status = 0 if grown < 100 << 10 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("etc/kubernetes/admin.conf", "/root/admin.conf"),
        ("etc/kubernetes/scheduler.conf", "/etc/kubernetes/kept/scheduler.conf"),
        (f"{PKI}/apiserver.key", "/etc/kubernetes/kept/apiserver.key"),
        (f"{PKI}/etcd/peer.crt", "/etc/ssl/etcd/peer.crt"),
        (f"{PKI}/ring", "ring"),
    ],
)
def test_c24_what_kubeadm_writes_is_where_a_roll_back_writes(
    tmp_path: Path, path: str, target: str
) -> None:
    root = Root(tmp_path)
    write(tmp_path, f"{PKI}/ca.crt", "x")
    assert link_problem(root, [f"/{path}"]) == ""
    if target.startswith("/"):
        write(tmp_path, target, "x")
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).symlink_to(target)
    assert f"/{path}" in link_problem(root, [f"/{path}"])
    if target.startswith("/etc"):  # where kubeadm doesn't write it, it's in the backup all the same
        assert link_problem(root, []) == ""


def test_c51_a_lost_directory_comes_back_with_owners_and_modes(tmp_path: Path) -> None:
    key = write(tmp_path, f"{PKI}/etcd/peer.key", "secret")
    key.chmod(0o640)
    os.chown(key, 12, 34)
    key.parent.chmod(0o750)
    os.chown(key.parent, 12, 34)
    kept = back_up(Root(tmp_path))
    shutil.rmtree(tmp_path / PKI)
    assert put_back(Root(tmp_path), kept, kept.index.files) == [f"/{PKI}/etcd/peer.key"]
    assert key.read_text() == "secret"
    for path, mode in ((key, 0o640), (key.parent, 0o750)):
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (mode, 12, 34)


def test_c51_a_right_content_gets_its_owner_and_mode_back(tmp_path: Path) -> None:
    key = write(tmp_path, f"{PKI}/apiserver.key", "secret")
    key.chmod(0o600)
    kept = back_up(Root(tmp_path))
    os.utime(key, (1, 1))
    key.chmod(0o644)
    os.chown(key, 12, 34)
    assert put_back(Root(tmp_path), kept, kept.index.files) == [f"/{PKI}/apiserver.key"]
    found = key.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o600, 0, 0)
    assert found.st_mtime == 1  # or a component would be restarted for it
    assert put_back(Root(tmp_path), kept, kept.index.files) == []


def test_c51_a_pipe_in_place_of_a_key_is_replaced(tmp_path: Path) -> None:
    key = write(tmp_path, f"{PKI}/apiserver.key", "secret")
    kept = back_up(Root(tmp_path))
    key.unlink()
    os.mkfifo(key)
    put_back(Root(tmp_path), kept, kept.index.files)
    assert key.read_text() == "secret"


def test_c52_another_key_for_service_accounts_is_another_cluster(tmp_path: Path) -> None:
    root = Root(tmp_path)
    key = write(tmp_path, f"{PKI}/sa.key", "old")
    kept = back_up(root)
    assert foreign(root, kept) == ""
    key.write_text("new")
    assert f"/{PKI}/sa.key" in foreign(root, kept)
    key.unlink()  # lost: this is what a backup is for
    assert foreign(root, kept) == ""


def test_c53_only_what_is_ours_and_too_old_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "backups"

    def kept(name: str, *, node: str = "node-1", whole: bool = True) -> None:
        (folder / name).mkdir(parents=True)
        serials = {"apiserver": "1"} if whole else {}
        index = Index(node=node, created=datetime.now(UTC), serials=serials, files={})
        (folder / name / INDEX).write_bytes(msgspec.json.encode(index))

    kept("20200101T000000Z-before-restore", whole=False)
    kept("20200102T000000Z")
    kept("20200103T000000Z")
    for number in range(4, 9):  # what was there before a restore is no set to go back to
        kept(f"2020010{number}T000000Z-before-restore", whole=False)
    kept("20200109T000000Z-before-restore")
    kept("20190101T000000Z", node="node-2")  # on a disk that nodes share
    for name in ("before-the-upgrade", "zz"):
        kept(name)
    (folder / "20180101T000000Z").mkdir()  # nobody knows what it is
    before = {path.name for path in folder.iterdir()}
    (folder / ".partial-x").mkdir()

    gone = ["20200101T000000Z-before-restore", "20200102T000000Z"]
    assert discard_begun(Root(tmp_path), DIRECTORY) == [".partial-x"]
    assert prune(Root(tmp_path), DIRECTORY, 5, node="node-1") == []
    assert prune(Root(tmp_path), DIRECTORY, 2, node="node-1") == gone
    assert {path.name for path in folder.iterdir()} == before - set(gone)
    assert prune(Root(tmp_path), "/nowhere", 2, node="node-1") == []


def test_c59_a_backup_of_another_user_is_not_put_back(tmp_path: Path) -> None:
    write(tmp_path, f"{PKI}/apiserver.key", "old")
    kept = back_up(Root(tmp_path))
    assert usable(kept.directory, "x").index == kept.index
    os.chown(kept.directory / INDEX, 12, -1)
    with pytest.raises(RefusedError, match="user 12's"):
        usable(kept.directory, "x")


@pytest.mark.parametrize(
    ("own", "others", "refused"),
    [(True, ("b",), True), (True, (), False), (False, ("b",), False), (None, (), False)],
)
async def test_c5_no_restore_is_begun_while_another_member_is_unhealthy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: bool | None,
    others: tuple[str, ...],
    refused: bool,
) -> None:
    """own: whether this node's member is healthy; None: it can't be asked."""

    async def healthy(_: object) -> bool:
        return own is not False

    async def members(_: object) -> tuple[Member, ...]:
        if own is None:
            raise EtcdError("not with these certificates")
        return tuple(Member(name=name, client_urls=(), is_learner=False) for name in "ab")

    async def unhealthy(_: object, members: tuple[Member, ...]) -> tuple[str, ...]:
        return others if members else ()

    there = EtcdAccess(endpoint="127.0.0.1:1", ca="", certificate="", key="")
    monkeypatch.setattr(restore, "find_access", lambda *_: there)
    for name, asked in (("healthy", healthy), ("members", members), ("unhealthy", unhealthy)):
        monkeypatch.setattr(Etcd, name, asked)
    fix = restore_below(tmp_path)
    if not refused:
        await fix._refuse_without_quorum()
        return
    with pytest.raises(RefusedError, match="not healthy: b of 2"):
        await fix._refuse_without_quorum()


@pytest.mark.parametrize("restart", ["all", "needed", "none"])
@pytest.mark.parametrize("expired", [(), ("/etc/kubernetes/pki/apiserver.crt",)])
def test_a_dry_run_of_a_restore_says_what_is_restarted(
    tmp_path: Path, restart: Literal["all", "needed", "none"], expired: tuple[str, ...]
) -> None:
    write(tmp_path, "etc/ssl/etcd/ssl/ca.pem", "x")
    write(tmp_path, "etc/kubernetes/manifests/kube-scheduler.yaml", "x")
    fix = restore_below(tmp_path, restart=restart)
    kept = back_up(Root(tmp_path))
    said = "\n".join(
        fix._describe(RestorePlan(backup=kept, path=DIRECTORY, expired=expired, locked=True))
    )
    assert ("systemd" in said) == (restart == "all" and not expired)
    assert (f"kube-scheduler ({restart})" in said) == (restart != "none" and not expired)
    assert ("restart nothing" in said) == bool(expired)


def restore_below(
    folder: Path, uptake: object = None, *, restart: Literal["all", "needed", "none"] = "all"
) -> Restore:
    none = cast("Any", None)
    return Restore(
        Settings(restart=restart),
        root=Root(folder),
        uptake=cast("Any", uptake),
        api=none,
        lease=none,
        clock=time.time,
        node_name="node-1",
    )


@pytest.mark.parametrize("healthy", [[True, False], [False, True], [False, False]])
async def test_c59_an_etcd_that_is_down_is_not_asked_for_its_quorum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, healthy: list[bool]
) -> None:
    """What is put back may be the very thing it waits for."""
    write(tmp_path, f"{PKI}/sa.pub", "x")
    asked = []

    class Uptake:
        async def restart(self, *_: object, quorum: bool) -> None:
            asked.append(quorum)

    async def says(_: object) -> bool:
        return healthy.pop(0)

    async def put_back(*_: object) -> Layout:
        return Layout(pki="", pairs=(), etcd="stacked")

    expected = any(healthy)
    there = EtcdAccess(endpoint="127.0.0.1:1", ca="", certificate="", key="")
    monkeypatch.setattr(restore, "find_access", lambda *_: there)
    monkeypatch.setattr(Etcd, "healthy", says)
    monkeypatch.setattr(Restore, "_put_back", put_back)
    plan = RestorePlan(backup=back_up(Root(tmp_path)), path=DIRECTORY, expired=(), locked=True)
    await restore_below(tmp_path, Uptake())._use(plan, "kept", cast("Any", None))
    assert asked == [expected]


async def test_c59_an_interruption_waits_for_the_files_to_be_whole() -> None:
    half, whole = asyncio.Event(), asyncio.Event()

    async def files() -> Layout:
        half.set()
        await asyncio.sleep(0.2)
        whole.set()
        return Layout(pki="", pairs=(), etcd="")

    task = asyncio.ensure_future(shielded(files()))
    await half.wait()
    task.cancel()
    await asyncio.sleep(0.05)
    task.cancel()  # the deadline, after a signal
    with pytest.raises(asyncio.CancelledError):
        await task
    assert whole.is_set()
