"""`upkeep-remediator restore`: what it lists, refuses, and puts back."""

import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from remediator.host import host_lock
from tests.certificates.command import remediator
from tests.certificates.conftest import MakePki
from tests.cluster.pki import LEAVES, Pki, set_remaining

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.cluster]

ROTATE = ("run", "rotate-certificates", "--force")


def backups(pki: Pki) -> Path:
    return pki.rootfs / "var/lib/upkeep/backups"


def files(pki: Pki) -> dict[str, tuple[bytes, int, int, int]]:
    """Contents, mode and owner by path."""
    there = {str(p): (p, p.stat()) for p in sorted(pki.directory.rglob("*")) if p.is_file()}
    return {n: (p.read_bytes(), s.st_mode, s.st_uid, s.st_gid) for n, (p, s) in there.items()}


@pytest.fixture
def renewed(make_pki: MakePki, tmp_path: Path) -> Pki:
    """A PKI that was renewed, with the backup of what it was."""
    pki = make_pki(timedelta(days=300))
    status, found, errors = remediator(pki, tmp_path, *ROTATE)
    assert (status, found["phase"]) == (0, "Succeeded"), errors
    return pki


def only_backup(pki: Pki) -> str:
    (found,) = (p.name for p in backups(pki).iterdir() if p.is_dir())
    return found


def refused(pki: Pki, folder: Path, *arguments: str) -> dict[str, Any]:
    """What it said, having touched nothing."""
    before = files(pki)
    kept = sorted(backups(pki).iterdir())
    status, found, errors = remediator(pki, folder, "restore", *arguments)
    assert (status, found.get("phase")) == (1, "Skipped"), (found, errors)
    assert not found["steps"]
    assert files(pki) == before
    assert sorted(backups(pki).iterdir()) == kept
    answer: dict[str, Any] = found
    return answer


def test_what_was_there_comes_back_and_goes_again(make_pki: MakePki, tmp_path: Path) -> None:
    pki = make_pki(timedelta(days=300))
    os.chown(pki.directory / "pki/apiserver.key", 12, 34)
    (pki.directory / "pki/apiserver.key").chmod(0o640)
    old = files(pki)
    assert remediator(pki, tmp_path, *ROTATE)[0] == 0
    new = files(pki)
    backup = only_backup(pki)
    (pki.directory / "pki/apiserver.key").unlink()
    (pki.directory / "pki/ca.key").write_text("lost")

    status, found, errors = remediator(pki, tmp_path, "restore", backup, "--dry-run")
    assert (status, found["reason"]) == (0, "DryRun"), errors
    status, found, errors = remediator(pki, tmp_path, "restore", backup)
    assert (status, found["reason"]) == (0, "Restored"), (found, errors)
    assert files(pki) == old
    assert [step["name"] for step in found["steps"]] == ["backup", "put back"]

    # What was there was no whole set, so it is kept, but not for putting back.
    kept = next(p.name for p in backups(pki).glob("*-before-restore"))
    assert refused(pki, tmp_path, kept)["reason"] == "BackupUnsound"
    assert files(pki) == old != new
    assert refused(pki, tmp_path, backup)["reason"] == "AlreadyThere"

    # By its path on the host, and back once more to what a restore kept.
    assert remediator(pki, tmp_path, *ROTATE)[0] == 0
    newest = files(pki)
    status, found, errors = remediator(
        pki, tmp_path, "restore", f"/var/lib/upkeep/backups/{backup}"
    )
    assert (status, found["reason"]) == (0, "Restored"), (found, errors)
    assert files(pki) == old
    kept = max(p.name for p in backups(pki).glob("*-before-restore"))
    assert kept in found["message"]
    assert remediator(pki, tmp_path, "restore", kept)[0] == 0
    assert files(pki) == newest


def test_the_list_says_what_there_is(renewed: Pki, tmp_path: Path) -> None:
    (backups(renewed) / ".partial-20200101T000000Z").mkdir()
    status, found, _ = remediator(renewed, tmp_path, "restore")
    assert status == 0
    whole, half = found
    assert whole["name"] == only_backup_but_partial(renewed)
    assert whole["node"] == "node-1"
    assert "10 certificates" in whole["holds"]
    assert whole["size"] > 10_000
    made = datetime.fromisoformat(whole["created"])
    assert abs(datetime.now(UTC) - made) < timedelta(minutes=10)
    assert half["created"] is None
    assert "not finished" in half["holds"]


def only_backup_but_partial(pki: Pki) -> str:
    (found,) = (p.name for p in backups(pki).iterdir() if p.is_dir() and p.name[0] != ".")
    return found


def test_what_is_no_backup_is_refused_in_a_sentence(renewed: Pki, tmp_path: Path) -> None:
    name = only_backup(renewed)
    backup = backups(renewed) / name
    set_remaining(renewed.directory, timedelta(days=200))  # so that there is something to restore

    assert "lists them" in refused(renewed, tmp_path, "nothing")["message"]
    assert refused(renewed, tmp_path, "/etc/kubernetes")["reason"] == "NoBackup"

    half = backups(renewed) / "half"
    shutil.copytree(backup, half)
    archive = half / "files.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-2000])
    said = refused(renewed, tmp_path, "half")
    assert (said["reason"], "whole" in said["message"]) == ("BackupUnsound", True)
    shutil.rmtree(half)

    (backup / "files.tar.gz").chmod(0o640)
    said = refused(renewed, tmp_path, name)
    assert said["reason"] == "BackupOpen"
    assert "0640" in said["message"]
    (backup / "files.tar.gz").chmod(0o600)

    index = json.loads((backup / "index.json").read_bytes())
    for changed, reason in (
        ({"node": "node-2"}, "BackupForeign"),
        ({"files": index["files"] | {"/etc/kubernetes/pki/../../passwd": "00"}}, "BackupUnsound"),
    ):
        (backup / "index.json").write_text(json.dumps(index | changed))
        assert refused(renewed, tmp_path, name)["reason"] == reason
    (backup / "index.json").write_text(json.dumps(index))

    with host_lock(tmp_path / "locks", "rotate-certificates"):
        assert refused(renewed, tmp_path, name)["reason"] == "Locked"
    assert remediator(renewed, tmp_path, "restore", name)[0] == 0


def test_c51_c52_a_lost_pki_comes_back_and_what_others_changed_stays(
    make_pki: MakePki, tmp_path: Path
) -> None:
    pki = make_pki(timedelta(days=300))
    encryption = pki.directory / "pki/secrets_encryption.yaml"
    encryption.write_text("old key")
    old = files(pki)
    assert remediator(pki, tmp_path, *ROTATE)[0] == 0
    encryption.write_text("new key")  # what is encrypted since is lost without it
    backup = only_backup(pki)
    status, found, errors = remediator(pki, tmp_path, "restore", backup)
    assert (status, found["reason"]) == (0, "Restored"), (found, errors)
    assert encryption.read_text() == "new key"
    step = found["steps"][-1]
    assert (step["name"], step["data"]["directory"]) == (
        "put back",
        f"/var/lib/upkeep/backups/{backup}",  # the host's: another container may finish it
    )
    (pki.directory / "pki/ca.key").unlink()  # every certificate is there still
    assert remediator(pki, tmp_path, "restore", backup, "--dry-run")[1]["reason"] == "DryRun"
    shutil.rmtree(pki.directory / "pki")
    status, found, errors = remediator(pki, tmp_path, "restore", backup)
    assert (status, found["reason"]) == (0, "Restored"), (found, errors)
    assert files(pki) == old


def test_another_ca_comes_back_only_by_force(renewed: Pki, tmp_path: Path) -> None:
    name = only_backup(renewed)
    before = files(renewed)
    set_remaining(renewed.directory, {"ca": timedelta(days=3000)})
    said = refused(renewed, tmp_path, name)
    assert (said["reason"], "another CA" in said["message"]) == ("BackupForeign", True)
    status, found, errors = remediator(renewed, tmp_path, "restore", name, "--force")
    assert (status, found["reason"]) == (0, "Restored"), errors
    ca = str(renewed.directory / "pki/ca.crt")
    assert files(renewed)[ca] == before[ca]


def test_expired_ones_come_back_only_by_force(make_pki: MakePki, tmp_path: Path) -> None:
    pki = make_pki(timedelta(days=-1))
    old = files(pki)
    assert remediator(pki, tmp_path, *ROTATE)[0] == 0
    name = only_backup(pki)
    said = refused(pki, tmp_path, name)
    assert said["reason"] == "BackupExpired"
    assert "apiserver.crt" in said["message"]
    status, found, errors = remediator(pki, tmp_path, "restore", name, "--force")
    assert (status, found["reason"]) == (0, "Restored"), errors
    assert "nothing was restarted" in found["message"]
    assert files(pki) == old
    ends = [c.not_valid_after_utc for n, c in pki.certificates().items() if n in LEAVES]
    assert max(ends) < datetime.now(UTC)
