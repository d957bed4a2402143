"""Certificates as metrics: when each ends, what is served, which component is stale.

Files are looked at in each scrape (a stat each; parsed only when changed). Endpoints and processes
are looked at once a minute, beside the scrapes, so that a dead endpoint never makes one wait.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import msgspec
from prometheus_client.core import GaugeMetricFamily, Metric

from exporter.checks.certificates import (
    DAY,
    Certificate,
    CertificateReader,
    Inventory,
    ReadError,
    Root,
    is_due,
)
from exporter.checks.certificates.components import (
    ServedFile,
    Staleness,
    find_processes,
    served_files,
    staleness,
)
from exporter.checks.certificates.served import ProbeError, Served, probe
from exporter.config import Config
from exporter.exposition import SteadyGauge
from exporter.logs import get_logger
from exporter.report import Report, Row

log = get_logger("exporter.certificates")

_LABELS = ("path", "name", "serial", "subject", "issuer", "usage", "managed_by")


class _Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What the endpoints and processes were like when they were last looked at."""

    names: Mapping[str, str] = {}
    served: Mapping[str, Served] = {}
    errors: tuple[ReadError, ...] = ()
    stale: tuple[Staleness, ...] = ()


class CertificatesCollector:
    """The metrics `upkeep_certificate_…`."""

    def __init__(
        self,
        config: Config,
        *,
        interval: float = 60.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """interval: seconds between two looks at endpoints and processes."""
        self._node = config.node_name
        self._root = Root(config.rootfs)
        self._procfs = config.procfs
        self._endpoints = config.certificate_endpoints
        self._interval = interval
        self._clock = clock
        self._reader = CertificateReader(self._root, config.certificate_paths, clock=clock)
        self._observation = _Observation()
        self._show(Inventory(certificates=(), errors=()))
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look at endpoints and processes from now on."""
        self._task = asyncio.create_task(self._observe_forever())

    async def aclose(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _observe_forever(self) -> None:
        # A thread of its own, kept: a node without a free pid can still be observed.
        with contextlib.closing(_Thread()) as thread:
            while True:
                try:
                    await asyncio.wrap_future(thread.pool.submit(self.observe))
                except Exception:
                    log.exception("looking at endpoints and components failed")
                await asyncio.sleep(self._interval)

    def observe(self) -> None:
        """Look at endpoints and processes once; seconds where an endpoint does not answer."""
        files = served_files(self._root)
        endpoints = self._endpoints or tuple(file.endpoint for file in files)
        served: dict[str, Served] = {}
        errors = []
        for endpoint in dict.fromkeys(endpoints):
            try:
                served[endpoint] = probe(endpoint)
            except ProbeError as error:
                errors.append(ReadError(path=endpoint, reason=error.reason))
        processes = find_processes(self._procfs, self._root)
        self._observation = _Observation(
            names={file.endpoint: file.name for file in files},
            served=served,
            errors=tuple(errors),
            stale=staleness(self._on_disk(files), files, served, processes, self._root),
        )

    def _on_disk(self, files: tuple[ServedFile, ...]) -> Inventory:
        # Not the scrapes' reader: a path outside its patterns counts too, and it has one thread.
        if not files:
            return Inventory(certificates=(), errors=())
        return CertificateReader(self._root, [file.path for file in files]).read()

    def collect(self) -> Iterable[Metric]:
        """One scrape's families."""
        inventory = self._reader.read()
        if inventory is not self._shown:
            self._show(inventory)
        observation = self._observation
        errors = {*inventory.errors, *observation.errors}
        return [
            self._days_left(),
            *self._constant,
            self._served_family(observation),
            self._stale_family(observation),
            self._errors_family(errors),
        ]

    def _show(self, inventory: Inventory) -> None:
        """Make what stays the same until a file changes: labels, and the instants' families."""
        by_labels: dict[tuple[str, ...], Certificate] = {}
        for certificate in inventory.certificates:
            key = tuple(_utf8(getattr(certificate, label)) for label in _LABELS)
            other = by_labels.get(key)
            if other is None or certificate.not_after < other.not_after:
                by_labels[key] = certificate
        series = [
            ({"node": self._node, **dict(zip(_LABELS, key, strict=True))}, certificate)
            for key, certificate in by_labels.items()
        ]
        self._ends = [certificate.not_after for _, certificate in series]
        self._minute = math.nan  # of which the days are; none yet
        self._days = SteadyGauge(
            "upkeep_certificate_expiry_days",
            "Days until the certificate ends, to the minute; negative once it has.",
            [(labels, 0.0) for labels, _ in series],
        )
        self._constant = [
            SteadyGauge(
                f"upkeep_certificate_{what}_timestamp_seconds",
                f"When the certificate {text}, as a Unix time.",
                [(labels, getattr(certificate, what)) for labels, certificate in series],
            )
            for what, text in (("not_after", "ends"), ("not_before", "begins"))
        ]
        self._shown = inventory

    def _days_left(self) -> Metric:
        """The days as of the minute's beginning: a scrape within it needn't write them again."""
        minute = self._clock() // 60 * 60
        if minute != self._minute:
            self._days = self._days.at([(end - minute) / DAY for end in self._ends])
            self._minute = minute
        return self._days

    def _served_family(self, observation: _Observation) -> Metric:
        family = GaugeMetricFamily(
            "upkeep_certificate_served_not_after_timestamp_seconds",
            "When the certificate that the endpoint serves now ends, as a Unix time.",
            labels=["node", "endpoint", "name"],
        )
        for endpoint, served in observation.served.items():
            name = observation.names.get(endpoint, "")
            family.add_metric([self._node, endpoint, name], served.certificate.not_after)
        return family

    def _stale_family(self, observation: _Observation) -> Metric:
        family = GaugeMetricFamily(
            "upkeep_certificate_stale",
            "1 while the component still uses an older certificate than the one on disk.",
            labels=["node", "name", "component"],
        )
        for one in observation.stale:
            family.add_metric([self._node, one.name, one.component], float(one.stale))
        return family

    def _errors_family(self, errors: Iterable[ReadError]) -> Metric:
        family = GaugeMetricFamily(
            "upkeep_certificate_read_errors",
            "1 for each file or endpoint whose certificate could not be read.",
            labels=["node", "path", "reason"],
        )
        for path, reason in sorted({(_utf8(error.path), error.reason) for error in errors}):
            family.add_metric([self._node, path, reason], 1.0)
        return family

    def report(self) -> Report:
        """The findings for people, what ends first on top."""
        self.observe()
        inventory = self._reader.read()
        now = self._clock()
        rows = [
            _row(certificate, now)
            for certificate in sorted(inventory.certificates, key=lambda c: (c.not_after, c.path))
        ]
        notes = [f"{e.path}: {e.reason}" for e in {*inventory.errors, *self._observation.errors}]
        notes += [
            f"{one.component} still uses an older certificate than {one.name} on disk"
            for one in self._observation.stale
            if one.stale
        ]
        return Report(
            columns=("name", "ends_in", "ends", "usage", "managed_by", "subject", "path"),
            rows=tuple(rows),
            notes=tuple(sorted(notes)),
            nothing="no certificates found in the places where Kubernetes keeps them",
        )


class _Thread:
    """One thread that exists from the start."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="certificates")
        self.pool.submit(time.monotonic).result()

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def _utf8(text: str) -> str:
    """A file's name may be any bytes; one that can't be encoded would fail the whole scrape."""
    return text.encode("utf-8", "backslashreplace").decode()


def _row(certificate: Certificate, now: float) -> Row:
    remaining = certificate.remaining(now)
    urgent = remaining < 0 or is_due(certificate, now)
    try:
        ends = datetime.fromtimestamp(certificate.not_after, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (OverflowError, ValueError):
        ends = f"{certificate.not_after:.0f}"
    return Row(
        cells={
            "name": certificate.name,
            "ends_in": _period(remaining),
            "ends": ends,
            "usage": certificate.usage,
            "managed_by": certificate.managed_by,
            "subject": certificate.subject,
            "path": certificate.path,
        },
        data={**msgspec.structs.asdict(certificate), "expiry_days": remaining / DAY},
        level="bad" if urgent else "warning" if remaining < 30 * DAY else "",
    )


def _period(seconds: float) -> str:
    """`364 d`, `5.5 h` or `expired 3 d ago`."""
    size = abs(seconds)
    text = f"{size / DAY:.0f} d" if size >= 2 * DAY else f"{size / 3600:.1f} h"
    return f"expired {text} ago" if seconds < 0 else text
