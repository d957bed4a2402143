"""`upkeep-remediator run rotate-certificates`, as a person on the node or a timer types it."""

import os
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from tests.certificates.command import command_line, remediator
from tests.certificates.conftest import MakePki
from tests.cluster.pki import LEAVES, Pki

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.cluster]

ROTATE = ("run", "rotate-certificates")


def serials(pki: Pki) -> dict[str, int]:
    found = pki.certificates()
    return {n: c.serial_number for n, c in found.items() if n in LEAVES and n != "kubelet.conf"}


def test_force_renews_what_is_not_due(make_pki: MakePki, tmp_path: Path) -> None:
    pki = make_pki(timedelta(days=300))
    before = serials(pki)

    status, found, errors = remediator(pki, tmp_path, *ROTATE)
    assert (status, found["phase"]) == (0, "Skipped"), errors

    status, found, errors = remediator(pki, tmp_path, *ROTATE, "--force", "--dry-run")
    assert (status, found["phase"], found["reason"]) == (0, "Skipped", "DryRun"), errors
    assert serials(pki) == before

    status, found, errors = remediator(pki, tmp_path, *ROTATE, "--force")
    assert (status, found["phase"]) == (0, "Succeeded"), (found, errors)
    after = serials(pki)
    assert not before.items() & after.items()


def test_force_is_for_what_can_be_due(make_pki: MakePki, tmp_path: Path) -> None:
    pki = make_pki(timedelta(days=300))
    status, found, errors = remediator(pki, tmp_path, "run", "reap-zombies", "--force")
    assert status == 1
    assert found == {}
    assert errors.endswith("reap-zombies acts on what is broken only; leave --force out\n")


def test_each_step_is_shown_when_it_begins_and_ends(make_pki: MakePki, tmp_path: Path) -> None:
    pki = make_pki(timedelta(days=3))
    command = command_line(pki, tmp_path, *ROTATE, output="table")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    said = [line[10:] for line in done.stdout.splitlines()]
    assert said[0].startswith("backup: back up keys, certificates and configuration to /var/lib/")
    assert said[1].startswith("  ok after ")
    assert said[2] == "renew: kubeadm certs renew all"
    assert "10 certificates renewed, keys match" in said[3]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("Succeeded (Renewed), hand-"), done.stdout
    assert done.stderr == ""


def test_a_timer_is_held_by_what_holds_an_alert(make_pki: MakePki, tmp_path: Path) -> None:
    pki = make_pki(timedelta(days=3))
    before = serials(pki)
    timer = (*ROTATE, "--scheduled")

    assert (
        remediator(pki, tmp_path, "pause", "rotate-certificates", output="")[0] == 1
    )  # no journal
    status, found, errors = remediator(pki, tmp_path, *timer, "--dry-run")
    assert (status, found["reason"], found["origin"]) == (0, "DryRun", "alert"), errors
    assert remediator(pki, tmp_path, "pause", "rotate-certificates", output="")[0] == 0
    status, found, errors = remediator(pki, tmp_path, *timer)
    assert (status, found["phase"], found["reason"]) == (0, "Skipped", "Paused"), errors
    assert remediator(pki, tmp_path, "resume", "rotate-certificates", output="")[0] == 0

    status, found, errors = remediator(pki, tmp_path, *timer, policy="mode: approval")
    assert (status, found["phase"], found["reason"]) == (0, "Pending", "NeedsApproval"), errors
    assert serials(pki) == before
    assert remediator(pki, tmp_path, "approve", found["id"], output="")[0] == 0
    status, found, errors = remediator(pki, tmp_path, *timer, policy="mode: approval")
    assert (status, found["phase"], found["reason"]) == (0, "Succeeded", "Renewed"), errors
    after = serials(pki)
    assert not before.items() & after.items()

    status, found, errors = remediator(pki, tmp_path, *timer)
    assert (status, found["reason"]) == (0, "ConditionCleared"), errors
    assert serials(pki) == after
    status, _, errors = remediator(pki, tmp_path, *timer, "--force")
    assert status == 1
    assert "leave one out" in errors


def test_c28_a_kubeadm_that_outlives_its_remediator_is_waited_for(
    make_pki: MakePki, tmp_path: Path
) -> None:
    pki = make_pki(timedelta(days=3))
    before = serials(pki)
    slow = tmp_path / "slow/kubeadm"
    slow.parent.mkdir()
    mark = tmp_path / "begun"
    slow.write_text(
        # Without a pipe: one would end it at its first word, since nobody reads that any more.
        f'#!/bin/sh\ncase "$*" in *renew*) touch {mark}; sleep 4; exec >/dev/null 2>&1;; esac\n'
        f'exec {pki.binaries.kubeadm} "$@"\n'
    )
    slow.chmod(0o755)
    command = command_line(pki, tmp_path, *ROTATE, kubeadm=slow)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not mark.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    assert serials(pki) == before

    status, found, errors = remediator(pki, tmp_path, *ROTATE, kubeadm=slow)

    assert (status, found["reason"]) == (0, "ConditionCleared"), errors
    after = serials(pki)
    assert not before.items() & after.items()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as journal:
        (left,) = journal.execute("SELECT phase, reason FROM remediations WHERE seq = 1")
    assert left == ("Succeeded", "Renewed")
    time.sleep(5)  # whatever was still to come of it
    assert serials(pki) == after
