"""What a person asks for and stops."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from remediator import flags
from remediator.config import Config
from remediator.hand import Hands, LiveJournal
from remediator.host import HostClock
from remediator.journal import ConflictError
from remediator.model import Condition, Phase, Target
from tests.engine.bench import RULES
from tests.engine.journal_contract import WAIT
from tests.engine.mend_file import MendFile, Settings
from tests.engine.support import NODE, request

TARGET = Target(node=NODE, pod="web-1")


class Looking(MendFile):
    """Looks for long."""

    async def check(self, target: Target) -> Condition:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)
        return await super().check(target)


def hands(directory: Path, fix: MendFile, *more: str) -> tuple[Hands, LiveJournal]:
    arguments = [f"--journal={directory / 'j.db'}", f"--path.locks={directory / 'locks'}", *more]
    _, given = flags.read(["run", "mend-file", "--pod=web-1", *arguments], {})
    journal = LiveJournal(given.journal, HostClock(), lambda _line: None)
    return Hands(given, Config(fixes={"mend-file": RULES}), fix, journal), journal


async def test_what_is_stopped_while_it_looks_has_done_nothing_and_is_over(tmp_path: Path) -> None:
    """Nobody else ends it where no daemon runs."""
    doing, journal = hands(tmp_path, Looking(Settings(directory=str(tmp_path))))
    found = await asyncio.wait_for(doing.run(TARGET, "ada"), 30)
    assert (found.phase, found.reason) == (Phase.SKIPPED, "Interrupted")
    assert await journal.due("mend-file", 10) == []
    await journal.aclose()


async def test_a_person_waits_for_no_approval_and_a_dry_run_takes_nobodys_place(
    tmp_path: Path,
) -> None:
    (tmp_path / "web-1").touch()
    fix = MendFile(Settings(directory=str(tmp_path)))
    dry, journal = hands(tmp_path, fix, "--dry-run")
    await journal.accept([request()], "r1")
    await journal.wait("r1-0", WAIT, due_in=60, expires_in=3600)
    with pytest.raises(ConflictError, match="Pending already"):
        await dry.run(TARGET, "ada")
    await journal.aclose()
    doing, journal = hands(tmp_path, fix)
    found = await doing.run(TARGET, "ada")
    assert (found.phase, found.reason) == (Phase.SUCCEEDED, "Mended")
    assert [r.reason for r in await journal.find()] == ["Mended", "ByHand"]
    await journal.aclose()
