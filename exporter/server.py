"""The exporter's HTTP server: one scrape runs every collector, and none can spoil another's.

Each collector has one thread of its own, made at start so that a node without a free pid can still
be scraped. A collector that fails, or is still busy when the scrape's time is up, is reported by
its own series; the others are answered as ever.
"""

import asyncio
import platform
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version

from aiohttp import web
from prometheus_client import ProcessCollector
from prometheus_client.core import CollectorRegistry, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder, gzip_accepted

from exporter.collectors import Collector, PartlyKnownError
from exporter.exposition import DuplicateSeriesError, SteadyGauge, gzip_of, text_of
from exporter.logs import get_logger

log = get_logger("exporter.server")

_SCRAPE_TIMEOUT = 10.0  # seconds, where the scraper doesn't say its own
_MARGIN = 0.5  # seconds kept back of it, to encode and send the answer


@dataclass(frozen=True, slots=True)
class _Run:
    """How one run of a collector ended, and how long it took in seconds."""

    families: list[Metric]
    error: Exception | None
    seconds: float


def _run(collector: Collector) -> _Run:
    began = time.monotonic()
    families: list[Metric] = []
    error: Exception | None = None
    try:
        try:
            families = _checked(collector.collect())
        except PartlyKnownError as partly:
            families, error = _checked(partly.known), partly
    except Exception as other:  # noqa: BLE001 - one failing collector never fails the scrape
        error = other
    return _Run(families, error, time.monotonic() - began)


class Scraper:
    """Runs the collectors for `/metrics`."""

    def __init__(self, collectors: Mapping[str, Collector]) -> None:
        self._collectors = collectors
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._busy: dict[str, Future[_Run]] = {}
        self._began: dict[str, float] = {}
        self._failing: dict[str, str] = {}
        process = CollectorRegistry()
        ProcessCollector(registry=process)
        self._process = process
        self._build = _build_info()
        self.started = False

    async def start(self) -> None:
        """Make the threads, then start the collectors."""
        loop = asyncio.get_running_loop()
        for name, collector in self._collectors.items():
            thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
            await loop.run_in_executor(thread, time.monotonic)  # the thread exists from here on
            self._threads[name] = thread
            await collector.start()
        self.started = True

    async def aclose(self) -> None:
        """Stop the collectors; a thread that hangs in the kernel is left behind, see `hanging`."""
        self.started = False
        for collector in self._collectors.values():
            await collector.aclose()
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)

    @property
    def hanging(self) -> bool:
        """Whether a collector's thread is still at work; Python would wait for it at its end."""
        return any(not run.done() for run in self._busy.values())

    async def scrape(self, timeout: float = _SCRAPE_TIMEOUT) -> list[Metric]:  # noqa: ASYNC109
        """All families; never raises for a collector's failure.

        timeout: seconds the scraper waits; a collector not done by then has failed this time.
        """
        success = GaugeMetricFamily(
            "upkeep_scrape_collector_success",
            "1 where the collector gave its series in this scrape, 0 where it failed.",
            labels=["collector"],
        )
        duration = GaugeMetricFamily(
            "upkeep_scrape_collector_duration_seconds",
            "How long the collector took in this scrape.",
            labels=["collector"],
        )
        families: list[Metric] = [success, duration, self._build, *self._process.collect()]
        # Scrapes at once share a run: none waits until another one's time is up.
        runs = {name: self._begin(name) for name in self._collectors}
        waiting = [asyncio.wrap_future(run) for run in runs.values()]
        if waiting:
            await asyncio.wait(waiting, timeout=max(timeout - _MARGIN, timeout / 2))
        for name, run in runs.items():
            works, found = self._found(name, run)
            success.add_metric([name], float(works))
            duration.add_metric([name], self._seconds(name, run))
            families.extend(found)
        return families

    def _begin(self, name: str) -> Future[_Run]:
        run = self._busy.get(name)
        if run is None or run.done():  # one still busy with an earlier scrape isn't run twice
            self._began[name] = time.monotonic()
            run = self._threads[name].submit(_run, self._collectors[name])
            self._busy[name] = run
        return run

    def _seconds(self, name: str, run: Future[_Run]) -> float:
        return run.result().seconds if run.done() else time.monotonic() - self._began[name]

    def _found(self, name: str, run: Future[_Run]) -> tuple[bool, list[Metric]]:
        """Whether the collector succeeded, and the families it gave."""
        if not run.done():
            self._say_once(name, "it was still busy when the scrape's time was up", None)
            return False, []
        ended = run.result()
        if ended.error is not None:
            self._say_once(name, f"{type(ended.error).__name__}: {ended.error}", ended.error)
        elif self._failing.pop(name, None) is not None:
            log.info("the collector works again", collector=name)
        return ended.error is None, ended.families

    def _say_once(self, name: str, why: str, error: BaseException | None) -> None:
        """Log a failure when it begins or changes, not at every scrape."""
        if self._failing.get(name) == why:
            return
        self._failing[name] = why
        expected = error is None or isinstance(error, OSError | ValueError)
        log.error(
            "the collector failed", collector=name, why=why, exc_info=None if expected else error
        )


def _build_info() -> Metric:
    family = GaugeMetricFamily(
        "upkeep_build_info", "Version of Upkeep and of Python.", labels=["version", "python"]
    )
    family.add_metric([version("upkeep"), platform.python_version()], 1)
    return family


def _checked(families: Iterable[Metric]) -> list[Metric]:
    """The families as a list; `DuplicateSeriesError` rather than an answer Prometheus refuses."""
    result = list(families)
    steady = Counter(family.name for family in result if isinstance(family, SteadyGauge))
    seen = set()
    for family in result:
        if isinstance(family, SteadyGauge) and steady[family.name] == 1:
            continue  # compared its own label sets when it was made
        for sample in family.samples:
            if sample.name in steady:
                raise DuplicateSeriesError(f"{sample.name} was given by two families")
            series = (sample.name, tuple(sorted(sample.labels.items())))
            if series in seen:
                raise DuplicateSeriesError(f"{sample.name}{sample.labels} was given twice")
            seen.add(series)
    return result


_INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Upkeep exporter</title></head>
<body><h1>Upkeep exporter</h1><p>Version {version}; collectors: {collectors}.</p>
<ul><li><a href="/metrics">Metrics</a></li><li><a href="/-/healthy">Healthy</a></li>
<li><a href="/-/ready">Ready</a></li></ul></body></html>
"""


def application(scraper: Scraper, collectors: Sequence[str]) -> web.Application:
    """The exporter's pages: `/metrics`, `/-/healthy`, `/-/ready` and `/`."""

    async def metrics(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        families = await scraper.scrape(_timeout(request))
        headers = {"Content-Type": content_type}
        if gzip_accepted(request.headers.get("Accept-Encoding", "")):
            headers["Content-Encoding"] = "gzip"
            return web.Response(body=gzip_of(encode, families), headers=headers)
        return web.Response(body=text_of(encode, families), headers=headers)

    async def healthy(_request: web.Request) -> web.Response:
        return web.Response(text="Upkeep exporter is healthy.\n")

    async def ready(_request: web.Request) -> web.Response:
        if scraper.started:
            return web.Response(text="Upkeep exporter is ready.\n")
        return web.Response(status=503, text="Upkeep exporter is starting or stopping.\n")

    async def index(_request: web.Request) -> web.Response:
        text = _INDEX.format(version=version("upkeep"), collectors=", ".join(collectors))
        return web.Response(text=text, content_type="text/html")

    async def lifecycle(_app: web.Application) -> AsyncIterator[None]:
        await scraper.start()
        yield
        await scraper.aclose()

    app = web.Application()
    app.cleanup_ctx.append(lifecycle)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/-/healthy", healthy)
    app.router.add_get("/-/ready", ready)
    app.router.add_get("/", index)
    return app


def _timeout(request: web.Request) -> float:
    """Prometheus says how long it waits; anything else in that header is as good as none."""
    text = request.headers.get("X-Prometheus-Scrape-Timeout-Seconds", "")
    try:
        seconds = float(text)
    except ValueError:
        return _SCRAPE_TIMEOUT
    return seconds if 0 < seconds <= 600 else _SCRAPE_TIMEOUT
