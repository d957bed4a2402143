"""The remediator's own metrics: every known label value is there from the start, at 0."""

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric

from remediator.alertmanager import OUTCOMES
from remediator.journal import Counts
from remediator.model import Fix, Phase, Remediation
from remediator.policy import REFUSALS
from remediator.worker import FAILURES

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter

_CODES = ("200", "400", "401", "403", "405", "413", "415", "500", "503")
_ACTIVE = tuple(phase for phase in Phase if not phase.terminal)
_ENDED = tuple(phase for phase in Phase if phase.terminal)
_BUCKETS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """Counts what happens in this process; the rest is read from the journal at each scrape."""

    def __init__(self, fixes: Mapping[str, Fix]) -> None:
        self.registry = CollectorRegistry()
        self._fixes = tuple(fixes)
        self._total = Counter(
            "upkeep_remediations_total",
            "Remediations that ended, by fix, phase and reason.",
            ["fix", "phase", "reason"],
            registry=self.registry,
        )
        self._duration = Histogram(
            "upkeep_remediation_duration_seconds",
            "From the claim to the end of remediations that acted.",
            ["fix"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._requests = Counter(
            "upkeep_webhook_requests_total",
            "Requests to /webhook by the status code they were answered with.",
            ["code"],
            registry=self.registry,
        )
        self._alerts = Counter(
            "upkeep_webhook_alerts_total",
            "Alerts in webhook messages by what became of them.",
            ["outcome"],
            registry=self.registry,
        )
        self._journal_errors = Counter(
            "upkeep_journal_errors_total",
            "Times the journal could not be used.",
            registry=self.registry,
        )
        self.reload_successful = Gauge(
            "upkeep_config_last_reload_successful",
            "1 where the last reload of the configuration took it over, 0 where it was refused.",
            registry=self.registry,
        )
        self.reload_successful.set(1)
        build = Gauge(
            "upkeep_build_info",
            "Version of Upkeep and of Python.",
            ["version", "python"],
            registry=self.registry,
        )
        build.labels(version("upkeep"), platform.python_version()).set(1)
        ProcessCollector(registry=self.registry)
        self._begin_at_zero(fixes)

    def _begin_at_zero(self, fixes: Mapping[str, Fix]) -> None:
        for name, fix in fixes.items():
            self._duration.labels(name)
            engine = {Phase.SKIPPED: REFUSALS, Phase.FAILED: FAILURES}
            for phase in _ENDED:
                for reason in {*engine.get(phase, ()), *fix.reasons.get(phase, ())}:
                    self._total.labels(name, phase.value, reason)
        self._by_code = {int(code): self._requests.labels(code) for code in _CODES}
        self._by_outcome = {outcome: self._alerts.labels(outcome) for outcome in OUTCOMES}

    def ended(self, remediation: Remediation) -> None:
        """See `remediator.worker.Events`."""
        self._total.labels(remediation.fix, remediation.phase.value, remediation.reason).inc()
        if remediation.started_at is not None and remediation.ended_at is not None:
            seconds = (remediation.ended_at - remediation.started_at).total_seconds()
            self._duration.labels(remediation.fix).observe(max(0.0, seconds))

    def cancelled(self, fix: str) -> None:
        """One was given up because its alerts resolved."""
        self._total.labels(fix, Phase.SKIPPED.value, "AlertResolved").inc()

    def request(self, code: int) -> None:
        """A request to /webhook was answered."""
        counter = self._by_code.get(code)
        (self._requests.labels(str(code)) if counter is None else counter).inc()

    def alerts(self, outcomes: Mapping[str, int]) -> None:
        """The alerts of one message, once it's durable."""
        for outcome, count in outcomes.items():
            self._by_outcome[outcome].inc(count)

    def journal_error(self) -> None:
        self._journal_errors.inc()

    def text(self, counts: Counts | None) -> bytes:
        """The exposition. Without `counts` (no journal) what it would tell is absent, not 0."""
        return generate_latest(self.registry) + generate_latest(
            _Families(self._journal_families(counts))
        )

    def _journal_families(self, counts: Counts | None) -> list[Metric]:
        up = GaugeMetricFamily("upkeep_journal_up", "1 where the journal can be used.")
        up.add_metric([], float(counts is not None))
        if counts is None:
            return [up]
        active = GaugeMetricFamily(
            "upkeep_remediations_active",
            "Remediations that have not ended, by fix and phase.",
            labels=["fix", "phase"],
        )
        last = GaugeMetricFamily(
            "upkeep_last_remediation_timestamp_seconds",
            "When a remediation last ended in a phase; 0 where none has.",
            labels=["fix", "phase"],
        )
        paused = GaugeMetricFamily(
            "upkeep_remediation_paused",
            "1 where the fix acts no more until a person resumes it.",
            labels=["fix"],
        )
        names = {pause.fix for pause in counts.pauses}
        for fix in self._fixes:
            for phase in _ACTIVE:
                active.add_metric([fix, phase.value], counts.active.get((fix, phase), 0))
            for phase in _ENDED:
                at = counts.last.get((fix, phase))
                last.add_metric([fix, phase.value], at.timestamp() if at else 0.0)
            paused.add_metric([fix], float(fix in names))
        return [up, active, last, paused]


class _Families:
    """What the encoder of prometheus-client takes for a registry."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
