"""What a person asks for and stops."""

import asyncio
import os
import signal
from pathlib import Path

from remediator import flags
from remediator.config import Config
from remediator.hand import Hands, LiveJournal
from remediator.host import HostClock
from remediator.model import Condition, Phase, Target
from tests.engine.bench import RULES
from tests.engine.mend_file import MendFile, Settings
from tests.engine.support import NODE


class Looking(MendFile):
    """Looks for long."""

    async def check(self, target: Target) -> Condition:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)
        return await super().check(target)


async def test_what_is_stopped_while_it_looks_has_done_nothing_and_is_over(tmp_path: Path) -> None:
    """Nobody else ends it where no daemon runs."""
    arguments = [f"--journal={tmp_path / 'j.db'}", f"--path.locks={tmp_path / 'locks'}"]
    _, given = flags.read(["run", "mend-file", "--pod=web-1", *arguments], {})
    journal = LiveJournal(given.journal, HostClock(), lambda _line: None)
    fix = Looking(Settings(directory=str(tmp_path)))
    hands = Hands(given, Config(fixes={"mend-file": RULES}), fix, journal)
    target = Target(node=NODE, pod="web-1")
    found = await asyncio.wait_for(hands.run(target, "ada"), 30)
    assert (found.phase, found.reason) == (Phase.SKIPPED, "Interrupted")
    assert await journal.due("mend-file", 10) == []
    await journal.aclose()
