"""A configuration read again while the daemon works (E45), and a fix that keeps others waiting."""

import asyncio
import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from remediator import daemon as daemon_module
from remediator import flags
from remediator.config import Config
from remediator.daemon import Daemon
from remediator.model import Phase, Remediation
from remediator.scheduler import Scheduler
from tests.engine.bench import RULES, Bench, Gated, until
from tests.engine.mend_file import FIXES


def configure(path: Path, max_acts: int) -> None:
    path.write_text(f"fixes: {{mend-file: {{max_acts: {max_acts}}}}}\n")


@pytest.fixture
def made(tmp_path: Path) -> Daemon:
    configure(tmp_path / "c.yml", 1)
    _, given = flags.read(
        [
            *("serve", "--web.listen-address=127.0.0.1:0"),
            *(f"--config.file={tmp_path / 'c.yml'}", f"--journal={tmp_path / 'j.db'}"),
        ],
        {},
    )
    return Daemon(given, FIXES)


def most(made: Daemon) -> int:
    return made._config.fixes["mend-file"].max_acts


async def test_e45_a_reload_that_fails_unexpectedly_is_said_and_leaves_the_old_one(
    made: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(tmp_path / "c.yml", 2)
    with monkeypatch.context() as broken:

        def make_fixes(*_: object) -> None:
            raise ZeroDivisionError

        broken.setattr(daemon_module, "make_fixes", make_fixes)
        assert "unexpected error" in await made.reload()
    assert most(made) == 1
    assert b"upkeep_config_last_reload_successful 0" in made._metrics.text(None)
    assert await made.reload() == ""
    assert most(made) == 2
    assert b"upkeep_config_last_reload_successful 1" in made._metrics.text(None)


async def test_e45_of_two_reloads_at_once_the_later_one_counts(
    made: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, began = asyncio.Event(), asyncio.Event()

    async def slowly(_demands: object) -> None:
        if not began.is_set():
            began.set()
            await gate.wait()

    monkeypatch.setattr(made.listener, "reload", slowly)
    configure(tmp_path / "c.yml", 2)
    first = asyncio.create_task(made.reload())
    await began.wait()
    configure(tmp_path / "c.yml", 3)
    second = asyncio.create_task(made.reload())
    for _ in range(10):
        await asyncio.sleep(0)
    gate.set()
    assert [await first, await second] == ["", ""]
    assert most(made) == 3


async def test_e45_a_slot_that_a_reload_adds_is_used_at_once(bench: Bench) -> None:
    fix = Gated(bench)
    doing = bench.worker(fix)
    asked = [await bench.ask(f"web-{n}") for n in range(2)]
    tasks = [asyncio.create_task(doing.handle(r)) for r in asked]
    await until(lambda: bench.acts)
    bench.policy = msgspec.structs.replace(RULES, max_concurrent=2)
    await doing.reconfigured()
    await until(lambda: len(bench.acts) == 2, seconds=10)
    fix.gate.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 30)
    assert {await bench.end(r) for r in asked} == {(Phase.SUCCEEDED, "Mended")}


async def test_what_goes_wrong_with_one_fix_keeps_no_other_waiting(bench: Bench) -> None:
    asked = await bench.ask()
    handled: list[str] = []

    async def handle(remediation: Remediation) -> None:
        handled.append(remediation.id)

    async def due(fix: str, limit: int) -> list[Remediation]:
        if fix == "broken":
            raise ZeroDivisionError
        return await type(bench.journal).due(bench.journal, fix, limit)

    bench.journal.due = due  # type: ignore[method-assign]
    worker = SimpleNamespace(
        fixes={"broken": None, "mend-file": None}, handle=handle, stop=frozenset
    )
    scheduler = Scheduler(bench.journal, cast("Any", worker), Config)
    running = asyncio.create_task(scheduler.run())
    await until(lambda: asked.id in handled)
    await scheduler.stop(1)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(running, 5)
