"""E12 through the worker and its journal: what a step of the wall clock moves, and what not.

Storms and cooldowns are measured on the boot clock; windows and expiries follow the wall clock.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from remediator.config import FixPolicy, Seconds
from remediator.model import Phase
from remediator.windows import Window
from tests.engine.bench import Bench, approval

HOUR = 3600.0
STEPS = pytest.mark.parametrize("step", [HOUR, -HOUR], ids=["forward", "back"])


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)  # it's 03:04:05
    yield made
    await made.journal.aclose()


async def act_twice(bench: Bench) -> None:
    for pod in ("web-1", "web-2"):
        asked = await bench.ask(pod)
        await bench.worker().handle(asked)
        assert await bench.end(asked) == (Phase.SUCCEEDED, "Mended")


@STEPS
async def test_e12_a_step_of_the_clock_ends_no_storm(bench: Bench, step: float) -> None:
    bench.policy = FixPolicy(cooldown=Seconds(0), max_acts=2, window=Seconds(HOUR))
    await act_twice(bench)
    bench.clock.step(step)
    bench.clock.pass_time(HOUR - 1)
    third = await bench.ask("web-3")
    await bench.worker().handle(third)
    assert await bench.end(third) == (Phase.SKIPPED, "StormBreaker")


@STEPS
async def test_e12_a_step_of_the_clock_makes_no_storm_last(bench: Bench, step: float) -> None:
    bench.policy = FixPolicy(cooldown=Seconds(0), max_acts=2, window=Seconds(HOUR))
    await act_twice(bench)
    bench.clock.step(step)
    bench.clock.pass_time(HOUR)
    third = await bench.ask("web-3")
    await bench.worker().handle(third)
    assert await bench.end(third) == (Phase.SUCCEEDED, "Mended")


@STEPS
async def test_e12_a_step_of_the_clock_moves_no_cooldown_in_the_journal(
    bench: Bench, step: float
) -> None:
    bench.policy = FixPolicy(cooldown=Seconds(HOUR), max_acts=10)
    await act_twice(bench)
    bench.clock.step(step)
    bench.clock.pass_time(HOUR - 1)
    again = await bench.ask("web-1")
    await bench.worker().handle(again)
    assert await bench.end(again) == (Phase.SKIPPED, "Cooldown")
    bench.clock.pass_time(1)
    again = await bench.ask("web-1")
    await bench.worker().handle(again)
    assert await bench.end(again) == (Phase.SUCCEEDED, "Mended")


async def test_e36_a_clock_that_jumps_by_years_forgets_no_cooldown(bench: Bench) -> None:
    bench.policy = FixPolicy(cooldown=Seconds(HOUR), max_acts=10)
    await act_twice(bench)
    bench.clock.step(10 * 365 * 86400)
    again = await bench.ask("web-1")
    await bench.worker().handle(again)
    assert await bench.end(again) == (Phase.SKIPPED, "Cooldown")


async def test_e36_an_act_in_the_future_of_a_clock_since_put_right_does_not_hold_for_ever(
    bench: Bench,
) -> None:
    bench.policy = FixPolicy(cooldown=Seconds(HOUR), max_acts=10)
    await act_twice(bench)
    bench.clock.step(-10 * 365 * 86400)
    bench.clock.boot_id, bench.clock.boot = "the next boot", HOUR - 1
    again = await bench.ask("web-1")
    await bench.worker().handle(again)
    assert await bench.end(again) == (Phase.SKIPPED, "Cooldown")
    bench.clock.pass_time(1)
    again = await bench.ask("web-1")
    await bench.worker().handle(again)
    assert await bench.end(again) == (Phase.SUCCEEDED, "Mended")


@STEPS
async def test_e12_a_window_follows_the_wall_clock_at_once(bench: Bench, step: float) -> None:
    opens = "04:00" if step > 0 else "02:00"
    closes = "05:00" if step > 0 else "03:00"
    bench.policy = FixPolicy(maintenance_windows=(Window(start=opens, end=closes),))
    asked = await bench.ask()
    await bench.worker().handle(asked)
    assert await bench.end(asked) == (Phase.PENDING, "OutsideWindow")
    assert await bench.due() == []
    bench.clock.step(step)
    (due,) = await bench.due()
    await bench.worker().handle(due)
    assert await bench.end(asked) == (Phase.SUCCEEDED, "Mended")


async def test_e12_a_window_that_a_step_closes_is_closed(bench: Bench) -> None:
    night = Window(start="03:00", end="04:00")
    bench.policy = FixPolicy(maintenance_windows=(night,))
    bench.clock.step(HOUR)
    asked = await bench.ask()
    await bench.worker().handle(asked)
    assert await bench.end(asked) == (Phase.PENDING, "OutsideWindow")


@STEPS
async def test_e12_an_expiry_follows_the_wall_clock(bench: Bench, step: float) -> None:
    bench.policy = approval()
    expires = bench.policy.expires
    asked = await bench.ask()
    await bench.worker().handle(asked)
    bench.clock.step(step)
    bench.clock.pass_time(expires - step - 1)
    for due in await bench.due():
        await bench.worker().handle(due)
    assert await bench.end(asked) == (Phase.PENDING, "NeedsApproval")
    bench.clock.pass_time(1)
    (due,) = await bench.due()
    await bench.worker().handle(due)
    assert await bench.end(asked) == (Phase.SKIPPED, "Expired")
