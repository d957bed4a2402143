"""`upkeep-remediator run rotate-certificates`, as a person on the node types it."""

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from tests.certificates.conftest import MakePki
from tests.cluster.pki import LEAVES, Pki

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.cluster]


def by_hand(pki: Pki, folder: Path, *arguments: str) -> tuple[int, dict[str, str], str]:
    """Exit status, the remediation as JSON, and what stood on standard error."""
    config = folder / "config.yaml"
    config.write_text(
        f"fixes: {{rotate-certificates: {{settings: {{kubeadm: {pki.binaries.kubeadm}}}}}}}\n"
    )
    command = [
        *(sys.executable, "-m", "remediator", "run", *arguments, "--node-name=node-1"),
        *(f"--config.file={config}", f"--journal={folder}/journal.db", "-o", "json"),
        *(f"--path.rootfs={pki.rootfs}", f"--path.locks={folder}/locks"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def test_force_renews_what_is_not_due(make_pki: MakePki, tmp_path: Path) -> None:
    pki = make_pki(timedelta(days=300))
    before = {name: c.serial_number for name, c in pki.certificates().items() if name in LEAVES}

    status, found, errors = by_hand(pki, tmp_path, "rotate-certificates")
    assert (status, found["phase"]) == (0, "Skipped"), errors

    status, found, errors = by_hand(pki, tmp_path, "rotate-certificates", "--force", "--dry-run")
    assert (status, found["phase"], found["reason"]) == (0, "Skipped", "DryRun"), errors
    same = {name: c.serial_number for name, c in pki.certificates().items() if name in LEAVES}
    assert same == before

    status, found, errors = by_hand(pki, tmp_path, "rotate-certificates", "--force")
    assert (status, found["phase"]) == (0, "Succeeded"), (found, errors)
    after = {name: c.serial_number for name, c in pki.certificates().items() if name in LEAVES}
    renewed = {name for name in before if after[name] != before[name]}
    assert renewed == set(before) - {"kubelet.conf"}


def test_force_is_for_what_can_be_due(make_pki: MakePki, tmp_path: Path) -> None:
    pki = make_pki(timedelta(days=300))
    status, found, errors = by_hand(pki, tmp_path, "reap-zombies", "--force")
    assert status == 1
    assert found == {}
    assert errors.endswith("reap-zombies acts on what is broken only; leave --force out\n")
