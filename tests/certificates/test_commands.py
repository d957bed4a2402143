"""Programs of the host, run by the remediator."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remediator.fixes.certificates.commands import CommandError, run

_RUNNER = """
import asyncio, sys
from remediator.fixes.certificates.commands import run
asyncio.run(run(sys.argv[1:], 60))
"""


async def test_its_last_words_are_kept_and_its_status() -> None:
    done = await run(["/bin/sh", "-c", "echo out; echo err >&2; exit 3"], 10)
    assert (done.status, done.output) == (3, "out\nerr")
    done = await run(["/bin/sh", "-c", "seq 100000"], 10)
    assert done.output.endswith("99999\n100000")
    assert len(done.output) == 8192


async def test_nothing_of_what_does_not_end_in_time_goes_on(tmp_path: Path) -> None:
    later = tmp_path / "later"
    with pytest.raises(CommandError, match="did not end within"):
        await run(["/bin/sh", "-c", f"(sleep 1; touch {later}) & sleep 60"], 0.5)
    time.sleep(1.5)
    assert not later.exists()


def test_c28_what_outlives_the_remediator_may_speak_on(tmp_path: Path) -> None:
    """A program's word into a pipe that nobody reads would end it, between two certificates."""
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    script = f"touch {begun}; sleep 1; echo renewed; echo renewed too; touch {ended}"
    runner = subprocess.Popen([sys.executable, "-c", _RUNNER, "/bin/sh", "-c", script])
    _await(begun)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    _await(ended)


def _await(file: Path) -> None:
    ends = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < ends, f"no {file.name}"
        time.sleep(0.05)
