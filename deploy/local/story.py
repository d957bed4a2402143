"""The course of one broken thing, as events tell it: broken, alert, decision, healed, clear."""

from dataclasses import dataclass, field

from deploy.local.events import Event
from deploy.local.observe import Alert, Remediation

COLUMNS = ("condition", "broken", "alert fired", "decided", "healed", "alert clear")


@dataclass
class Course:
    """One row. Times are seconds on a clock that the caller owns; None: not yet."""

    condition: str
    fix: str
    what: str
    """What was broken, for people."""
    broken: float | None = None
    fired: float | None = None
    decided: float | None = None
    healed: float | None = None
    clear: float | None = None
    decision: str = ""
    """The last thing the remediator said of it."""
    record: str = ""
    """The id of the record that healed it."""
    alerts: set[tuple[tuple[str, str], ...]] = field(default_factory=set)
    """Firing now."""

    @property
    def done(self) -> bool:
        """Healed by the remediator, and the alerts are over."""
        return self.healed is not None and self.clear is not None

    def see(self, event: Event, now: float) -> None:
        """Take in an event, if it is about this."""
        for alert in event.alerts:
            self._see_alert(event.kind, alert, now)
        if event.record is not None and event.record.fix == self.fix:
            self._see_remediation(event.record, now)

    def _see_alert(self, kind: str, alert: Alert, now: float) -> None:
        if alert["remediation"] != self.fix:
            return
        if kind == "firing":
            self.fired = now if self.fired is None else self.fired
            self.alerts.add(alert.labels)
            self.clear = None
        else:
            self.alerts.discard(alert.labels)
            if not self.alerts:
                self.clear = now

    def _see_remediation(self, record: Remediation, now: float) -> None:
        self.decided = now if self.decided is None else self.decided
        because = f" ({record.reason})" if record.reason else ""
        self.decision = f"{record.phase}{because} {record.message}".rstrip()
        if record.phase == "Succeeded" and self.healed is None:
            self.healed = now
            self.record = record.id

    def row(self, now: float) -> tuple[str, ...]:
        """The cells under COLUMNS."""
        if self.broken is None:
            return (self.condition, "", "", "", "", "")
        cells = [self.condition, f"{now - self.broken:4.0f} s ago" if not self.done else "yes"]
        waiting = "…"
        for moment in (self.fired, self.decided, self.healed, self.clear):
            cells.append(waiting if moment is None else f"after {moment - self.broken:.0f} s")
            waiting = "" if moment is None else "…"
        return tuple(cells)


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """The rows in columns, headed by COLUMNS."""
    everything = [COLUMNS, *rows]
    widths = [max(len(row[i]) for row in everything) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in everything
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
