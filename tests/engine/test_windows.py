"""Maintenance windows: across midnight, across daylight saving, against a slow plain model."""

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remediator.windows import Window, next_opening, open_at

BERLIN = ZoneInfo("Europe/Berlin")


def berlin(text: str, fold: int = 0) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN, fold=fold)


@pytest.mark.parametrize(
    ("moment", "is_open"),
    [
        ("2026-01-02 21:59", False),  # a Friday
        ("2026-01-02 22:00", True),
        ("2026-01-03 03:59", True),  # Saturday, of Friday's window
        ("2026-01-03 04:00", False),
        ("2026-01-03 22:30", False),  # Saturday has none of its own
    ],
)
def test_a_window_across_midnight_belongs_to_its_first_day(moment: str, is_open: bool) -> None:
    window = Window(days=("fri",), start="22:00", end="04:00", timezone="Europe/Berlin")
    assert window.contains(berlin(moment)) is is_open


def test_an_hour_that_daylight_saving_skips_never_comes() -> None:
    window = Window(start="02:00", end="03:00", timezone="Europe/Berlin")
    spring = datetime(2026, 3, 29, 0, 0, tzinfo=UTC)  # 01:00 there; at 01:00 UTC it's 03:00
    assert not any(window.contains(spring + timedelta(minutes=m)) for m in range(180))
    assert window.next_opening(spring) == datetime(2026, 3, 30, 0, 0, tzinfo=UTC)


def test_an_hour_that_daylight_saving_repeats_counts_twice() -> None:
    window = Window(start="02:00", end="03:00", timezone="Europe/Berlin")
    assert window.contains(berlin("2026-10-25 02:30", fold=0))
    assert window.contains(berlin("2026-10-25 02:30", fold=1))


def test_the_opening_is_named_right_where_the_clocks_change() -> None:
    """Forward at 02:00 on the last Sunday of March, back at 03:00 on that of October."""
    skipped = Window(start="02:30", end="04:00", timezone="Europe/Berlin")
    spring = datetime(2026, 3, 28, 12, 0, tzinfo=UTC)
    assert skipped.next_opening(spring) == datetime(2026, 3, 29, 1, 0, tzinfo=UTC)  # 03:00 there
    assert skipped.contains(datetime(2026, 3, 29, 1, 0, tzinfo=UTC))
    twice = Window(start="02:00", end="02:15", timezone="Europe/Berlin")
    first = datetime(2026, 10, 25, 0, 0, tzinfo=UTC)
    assert twice.next_opening(first - timedelta(hours=3)) == first
    assert twice.next_opening(first) == first + timedelta(hours=1)
    assert twice.next_opening(first + timedelta(hours=1)) == first + timedelta(hours=25)


def test_a_bad_window_is_refused_where_it_is_written() -> None:
    for options in (
        {"start": "24:00", "end": "04:00"},
        {"start": "9:00", "end": "10:00"},
        {"start": "09:00", "end": "10:00", "days": ["monday"]},
        {"start": "09:00", "end": "10:00", "days": []},
        {"start": "09:00", "end": "10:00", "timezone": "Mars/Olympus"},
        {"start": "09:00", "end": "10:00", "timezone": "../etc/passwd"},
    ):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(options, Window)


minutes = st.integers(0, 24 * 60 - 1).map(lambda m: f"{m // 60:02d}:{m % 60:02d}")
zones = st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"])
days = st.sets(st.sampled_from(["mon", "tue", "wed", "thu", "fri", "sat", "sun"]), min_size=1)


@settings(max_examples=60, deadline=None)
@given(
    start=minutes,
    end=minutes,
    zone=zones,
    on=days,
    at=st.dates(date(2026, 1, 1), date(2026, 12, 31)),
)
def test_the_next_opening_is_an_opening_and_the_first(
    start: str, end: str, zone: str, on: set[str], at: date
) -> None:
    window = Window(start=start, end=end, timezone=zone, days=tuple(sorted(on)))
    now = datetime(at.year, at.month, at.day, 12, 34, tzinfo=UTC)
    opens = next_opening([window], now)
    assert opens > now
    if open_at([window], now):
        return
    between = now
    while between < min(opens, now + timedelta(days=8)):
        assert not window.contains(between), between
        between += timedelta(minutes=7)
    if opens - now != timedelta(days=1):
        assert window.contains(opens)
