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
    subject: Alert | Remediation


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
        for labels, alert in firing.items():
            if labels not in self._firing:
                yield Event("firing", f"{alert.name}: {alert.summary}", alert)
        for labels, alert in self._firing.items():
            if labels not in firing:
                yield Event("resolved", f"{alert.name}: {alert.summary}", alert)
        self._firing = firing

    def _remediations(self) -> Iterator[Event]:
        for record in reversed(remediations(self._remediator, self._token)):
            before = self._records.get(record.id)
            self._records[record.id] = record
            if before is None or before.phase != record.phase:
                text = f"{record.fix} on {record.target}: {record.reason}. {record.message}"
                yield Event(record.phase, text, record)
            elif before.count != record.count:
                text = f"{record.fix} on {record.target}: {record.reason}, {record.count} times now"
                yield Event(record.phase, text, record)
