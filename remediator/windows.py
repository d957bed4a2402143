"""Maintenance windows: when a fix may act, in the wall time of the place where people look.

A window belongs to the day on which it opens; one that ends before it begins ends the next day.
Times are local: an hour that daylight saving skips never comes, one that it repeats counts twice.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from datetime import time as time_of_day
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class Window(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`days` from `start` to `end`, local time of `timezone`."""

    start: str
    """HH:MM, included."""
    end: str
    """HH:MM, excluded; at or before `start` means on the next day."""
    days: tuple[str, ...] = _DAYS
    """Days on which it opens: mon, tue, wed, thu, fri, sat, sun."""
    timezone: str = "UTC"
    """A name of the time zone database, such as Europe/Berlin."""

    def __post_init__(self) -> None:
        """Bad values are refused where the configuration is read, with the line."""
        _minutes(self.start)
        _minutes(self.end)
        zone(self.timezone)
        for day in self.days:
            if day not in _DAYS:
                raise ValueError(f"{day!r} is not one of {', '.join(_DAYS)}")
        if not self.days:
            raise ValueError("a window without days never opens; remove it")

    def contains(self, moment: datetime) -> bool:
        """Whether the window is open at `moment`."""
        local = moment.astimezone(zone(self.timezone))
        now = local.hour * 60 + local.minute
        start, end = _minutes(self.start), _minutes(self.end)
        today = _DAYS[local.weekday()] in self.days
        if start < end:
            return today and start <= now < end
        yesterday = _DAYS[local.weekday() - 1] in self.days
        return (today and now >= start) or (yesterday and now < end)

    def next_opening(self, moment: datetime) -> datetime:
        """When it next opens after `moment`, UTC."""
        place = zone(self.timezone)
        local = moment.astimezone(place)
        hour, minute = divmod(_minutes(self.start), 60)
        for ahead in range(9):
            day = (local + timedelta(days=ahead)).date()
            if _DAYS[day.weekday()] not in self.days:
                continue
            for fold in (0, 1):  # an hour that comes twice has two openings
                at = datetime.combine(day, time_of_day(hour, minute, fold=fold), place)
                opens = at.astimezone(UTC)
                if opens.astimezone(place).time() != at.time():
                    # Skipped by daylight saving: what is left of the window opens after it.
                    opens = self._after_the_gap(opens)
                if opens > moment and self.contains(opens):
                    return opens
        # Only where daylight saving skips every opening of the week: look again tomorrow.
        return moment + timedelta(days=1)

    def _after_the_gap(self, moment: datetime) -> datetime:
        """The first minute of what is open around `moment`; `moment` where it isn't."""
        for minutes in range(1, 181):
            if not self.contains(moment - timedelta(minutes=minutes)):
                return moment - timedelta(minutes=minutes - 1)
        return moment


def open_at(windows: Sequence[Window], moment: datetime) -> bool:
    """Whether any window is open; without windows, always."""
    return not windows or any(window.contains(moment) for window in windows)


def next_opening(windows: Sequence[Window], moment: datetime) -> datetime:
    """The earliest opening after `moment`, UTC."""
    return min(window.next_opening(moment) for window in windows)


def zone(name: str) -> tzinfo:
    """The time zone of that name; UTC needs no database."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(
            f"the time zone {name!r} is unknown here; write it as Europe/Berlin, or install tzdata"
        ) from None


def _minutes(text: str) -> int:
    hour, colon, minute = text.partition(":")
    if not (colon and len(hour) == 2 and len(minute) == 2 and (hour + minute).isdecimal()):
        raise ValueError(f'{text!r} is not a time of day such as "22:30"')
    if int(hour) > 23 or int(minute) > 59:
        raise ValueError(f"{text!r} is later than 23:59")
    return int(hour) * 60 + int(minute)
