"""What changed since the last look: alerts that fire or are over, remediations that move.

A record of the remediator may pass several phases between two looks; it is told as it stands then.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from deploy.local.observe import Alert, Remediation, alerts, remediations


@dataclass(frozen=True)
class Event:
    """One line for people."""

    kind: str
    """firing, resolved, or the phase of a remediation."""
    text: str
    alerts: tuple[Alert, ...] = ()
    """The alerts of one name that fire or are over since the last look."""
    record: Remediation | None = None


class Events:
    """Compares what the stack shows with what it showed before."""

    def __init__(self, prometheus: str, remediator: str, token: str = "") -> None:
        self._prometheus = prometheus
        self._remediator = remediator
        self._token = token
        self._firing: dict[tuple[tuple[str, str], ...], Alert] = {}
        self._records: dict[str, Remediation] = {}

    def new(self) -> Iterator[Event]:
        """Events since the last call; `UnreachableError` where a page gives no answer."""
        yield from self._alerts()
        yield from self._remediations()

    def _alerts(self) -> Iterator[Event]:
        firing = {a.labels: a for a in alerts(self._prometheus) if a.state == "firing"}
        begun = [alert for labels, alert in firing.items() if labels not in self._firing]
        over = [alert for labels, alert in self._firing.items() if labels not in firing]
        self._firing = firing
        for kind, changed in (("firing", begun), ("resolved", over)):
            for name in dict.fromkeys(alert.name for alert in changed):
                same = tuple(alert for alert in changed if alert.name == name)
                more = f" (and {len(same) - 1} more)" if len(same) > 1 else ""
                yield Event(kind, f"{name}: {same[0].summary}{more}", alerts=same)

    def _remediations(self) -> Iterator[Event]:
        for record in reversed(remediations(self._remediator, self._token)):
            before = self._records.get(record.id)
            self._records[record.id] = record
            what = f"{record.fix} on {record.target}"
            if before is None or before.phase != record.phase:
                why = ": ".join(word for word in (record.reason, record.message) if word)
                yield Event(record.phase, f"{what}. {why}".rstrip(". "), record=record)
            elif before.count != record.count:
                again = f"{what}. {record.reason}, {record.count} times now"
                yield Event(record.phase, again, record=record)
