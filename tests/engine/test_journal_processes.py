"""Several processes on one journal file: what one commits, every other one finds."""

import asyncio
import json
from pathlib import Path

from tests.engine.support import Daemon, alert, message, running


async def test_e29_a_command_that_ends_takes_no_journal_away_from_the_daemon(
    tmp_path: Path,
) -> None:
    """The last to close a journal folds its log into it and deletes the log: the daemon isn't gone.

    Closing any descriptor of a file drops every lock that the process holds on it, SQLite's too.
    """
    policy = {"mode": "approval"}
    first = Daemon(tmp_path, policy=policy).start()
    await first.ready()
    assert (await first.post(message(alert("web-1"))))[0] == 200
    first.stop()
    # This one finds the file and reads it before it writes, as after each restart.
    async with running(tmp_path, policy=policy) as daemon:
        daemon.journal = first.journal
        await daemon.remediations()
        assert (await daemon.post(message(alert("web-2"))))[0] == 200
        paused = daemon.cli("pause", "mend-file", "--why=looking")
        assert paused.returncode == 0, paused.stderr
        assert daemon.journal.with_name("remediator.db-wal").exists()
        for number in range(3):
            assert (await daemon.post(message(alert(f"after-{number}"))))[0] == 200
        listed = daemon.cli("list", "-o", "json")
        pods = {found["target"]["pod"] for found in json.loads(listed.stdout)}
        assert pods == {"web-1", "web-2", "after-0", "after-1", "after-2"}
        assert await daemon.metric("upkeep_remediation_paused", fix="mend-file") == 1


def test_a_journal_that_may_not_be_looked_at_is_said(tmp_path: Path) -> None:
    """As by somebody who isn't root; here by a name that no folder can have."""
    daemon = Daemon(tmp_path)
    daemon.journal = tmp_path / ("x" * 300) / "remediator.db"
    listed = daemon.cli("list")
    assert listed.returncode == 1
    assert "File name too long" in listed.stderr
    assert "Traceback" not in listed.stderr


async def test_a_second_daemon_on_one_journal_is_refused(tmp_path: Path) -> None:
    """Each would count its own slots and storms."""
    async with running(tmp_path) as first:
        second = Daemon(tmp_path).start()
        assert second.process is not None
        assert await asyncio.to_thread(second.process.wait, 30) == 1
        assert "another daemon works on this journal" in first.log()
        elsewhere = Daemon(tmp_path)
        elsewhere.journal = tmp_path / "another" / "remediator.db"
        await elsewhere.start().ready()
        elsewhere.stop()
    again = Daemon(tmp_path).start()  # the first has gone, its file hasn't
    await again.ready()
    again.stop()
