"""A daemon that is told to stop (E41): nothing begins any more, and what only waits is let go."""

import asyncio
import signal
import time
from pathlib import Path

from remediator.model import Phase
from tests.engine.support import Daemon, alert, message


async def acting(directory: Path, *pods: str, **config: object) -> Daemon:
    """One runs until `hold` is gone; the others wait for their turn, all admitted."""
    options = {"shutdown_grace": "30s", **config}
    policy = {"max_concurrent": 1}
    daemon = Daemon(directory, settings={"deadline": 90}, config=options, policy=policy).start()
    await daemon.ready()
    daemon.break_("hold", *pods)
    await daemon.post(message(*map(alert, pods)))
    ends = time.monotonic() + 30
    while sorted(r["phase"] for r in await daemon.remediations()) != [
        *["Admitted"] * (len(pods) - 1),
        "Running",
    ]:
        assert time.monotonic() < ends, daemon.log()
        await asyncio.sleep(0.05)
    return daemon


async def test_e41_once_told_to_stop_nothing_begins(tmp_path: Path) -> None:
    daemon = await acting(tmp_path, "web-1", "web-2", "web-3")
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    while "waits for what is under way" not in daemon.log():
        await asyncio.sleep(0.05)
    (daemon.files / "hold").unlink()
    assert await asyncio.to_thread(daemon.process.wait, 20) == 0
    assert daemon.acts() == ["web-1"]
    daemon.start()
    await daemon.ready()
    assert {r["phase"] for r in await daemon.settled(3)} == {Phase.SUCCEEDED}
    assert sorted(daemon.acts()) == ["web-1", "web-2", "web-3"]
    daemon.stop()


async def test_e41_told_a_second_time_it_ends_at_once_and_the_next_start_resumes(
    tmp_path: Path,
) -> None:
    daemon = await acting(tmp_path, "web-1", "web-2")
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    while "waits for what is under way" not in daemon.log():
        await asyncio.sleep(0.05)
    daemon.process.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(daemon.process.wait, 5) == 0
    (daemon.files / "hold").unlink()
    daemon.start()
    await daemon.ready()
    assert {r["phase"] for r in await daemon.settled(2)} == {Phase.SUCCEEDED}
    assert daemon.acts() == ["web-1", "web-2"]
    daemon.stop()


async def test_e41_what_only_waits_for_the_hosts_lock_holds_up_no_stop(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, config={"shutdown_grace": "60s"})
    (tmp_path / "locks").write_text("a file where the folder should be\n")
    daemon.start()
    await daemon.ready()
    daemon.break_("web-1")
    await daemon.post(message(alert("web-1")))
    while "waits for the lock" not in daemon.log():
        await asyncio.sleep(0.05)
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(daemon.process.wait, 15) == 0
    assert daemon.acts() == []
