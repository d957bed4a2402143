"""One scrape, over real HTTP: one that fails, hangs or repeats itself is alone in it."""

import asyncio
import contextlib
import gzip
import threading
from collections.abc import AsyncIterator, Callable, Iterable

import aiohttp
import pytest
from aiohttp import web
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from exporter.collectors import PartlyKnownError
from exporter.exposition import SteadyGauge
from exporter.server import Scraper, application


class Told:
    """A collector that does what the test tells it to."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect
        self.started = False

    async def start(self) -> None:
        self.started = True

    def collect(self) -> Iterable[Metric]:
        return self._collect()

    async def aclose(self) -> None:
        self.started = False


def _family(*labels: str) -> list[Metric]:
    family = GaugeMetricFamily("upkeep_test", "A test.", labels=["x"])
    for label in labels:
        family.add_metric([label], 1)
    return [family]


@contextlib.asynccontextmanager
async def _served(**collectors: Told) -> AsyncIterator[str]:
    runner = web.AppRunner(application(Scraper(collectors), list(collectors)))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port = runner.addresses[0][1]
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


async def _scrape(url: str, **headers: str) -> dict[str, float]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{url}/metrics", headers=headers) as answer,
    ):
        assert answer.status == 200
        text = await answer.text()
    return {
        f"{s.name}{sorted(s.labels.items())}": s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def _success(name: str) -> str:
    return f"upkeep_scrape_collector_success[('collector', '{name}')]"


async def test_a_failing_collector_is_its_own_series() -> None:
    def fail() -> Iterable[Metric]:
        raise OSError("no permission on /proc")

    async with _served(good=Told(lambda: _family("a")), bad=Told(fail)) as url:
        seen = await _scrape(url)
    assert seen[_success("good")] == 1
    assert seen[_success("bad")] == 0
    assert seen["upkeep_test[('x', 'a')]"] == 1
    assert any(name.startswith("upkeep_build_info") for name in seen)


async def test_a_failing_collector_may_still_say_what_it_knows() -> None:
    def fail(*labels: str) -> Iterable[Metric]:
        raise PartlyKnownError("the view is too old", _family(*labels))

    async with _served(
        old=Told(lambda: fail("age")), bad=Told(lambda: fail("twice", "twice"))
    ) as url:
        seen = await _scrape(url)
    assert seen[_success("old")] == 0
    assert seen["upkeep_test[('x', 'age')]"] == 1
    assert seen[_success("bad")] == 0
    assert "upkeep_test[('x', 'twice')]" not in seen


async def test_a_duplicate_label_set_never_reaches_prometheus() -> None:
    async with _served(bad=Told(lambda: _family("a", "a"))) as url:
        seen = await _scrape(url)
    assert seen[_success("bad")] == 0
    assert "upkeep_test[('x', 'a')]" not in seen


@pytest.mark.parametrize(
    "families",
    [
        lambda: [SteadyGauge("upkeep_test", "", []), SteadyGauge("upkeep_test", "", [({}, 1)])],
        lambda: [*_family("a"), SteadyGauge("upkeep_test", "A test.", [({"x": "a"}, 1)])],
        lambda: [SteadyGauge("upkeep_test", "A test.", [({"x": "a"}, 1)]), *_family("a")],
    ],
)
async def test_nor_does_one_of_a_steady_family(families: Callable[[], Iterable[Metric]]) -> None:
    async with _served(bad=Told(families)) as url:
        seen = await _scrape(url)
    assert seen[_success("bad")] == 0
    assert not any(name.startswith("upkeep_test") for name in seen)


async def test_a_hanging_collector_fails_alone_and_is_not_run_twice() -> None:
    release, runs = threading.Event(), []

    def hang() -> Iterable[Metric]:
        runs.append(1)
        release.wait(30)
        return _family("late")

    headers = {"X-Prometheus-Scrape-Timeout-Seconds": "0.4"}
    async with _served(slow=Told(hang), good=Told(lambda: _family("a"))) as url:
        for _ in range(3):
            seen = await _scrape(url, **headers)
            assert seen[_success("slow")] == 0
            assert seen[_success("good")] == 1
        assert len(runs) == 1
        release.set()
        for _ in range(100):
            seen = await _scrape(url, **headers)
            if seen[_success("slow")] == 1:
                break
            await asyncio.sleep(0.05)
        assert seen[_success("slow")] == 1


async def test_two_that_scrape_at_once_are_both_answered_in_their_time() -> None:
    """With a collector that hangs, the second of a pair must not wait for the first one's end."""
    release = threading.Event()
    hanging = Told(lambda: _family("late" if release.wait(30) else "never"))
    async with _served(slow=hanging, good=Told(lambda: _family("a"))) as url:
        began = asyncio.get_running_loop().time()
        asked = (_scrape(url, **{"X-Prometheus-Scrape-Timeout-Seconds": "2"}) for _ in range(4))
        for seen in await asyncio.gather(*asked):
            assert (seen[_success("slow")], seen[_success("good")]) == (0, 1)
            assert seen["upkeep_test[('x', 'a')]"] == 1
        assert asyncio.get_running_loop().time() - began < 4  # 6 if they waited for each other
        release.set()


@pytest.mark.parametrize("timeout", ["nan", "-1", "1e999", "soon", ""])
async def test_a_nonsense_scrape_timeout_is_ignored(timeout: str) -> None:
    async with _served(good=Told(lambda: _family("a"))) as url:
        seen = await _scrape(url, **{"X-Prometheus-Scrape-Timeout-Seconds": timeout})
    assert seen[_success("good")] == 1


async def test_pages_and_compression() -> None:
    collector = Told(lambda: _family("a"))
    async with _served(good=collector) as url, aiohttp.ClientSession() as session:
        assert collector.started
        for path in ("/-/healthy", "/-/ready", "/"):
            async with session.get(url + path) as answer:
                assert answer.status == 200
        raw = aiohttp.ClientSession(auto_decompress=False)
        async with raw, raw.get(f"{url}/metrics", headers={"Accept-Encoding": "gzip"}) as answer:
            assert answer.headers["Content-Encoding"] == "gzip"
            assert b"upkeep_build_info" in gzip.decompress(await answer.read())
        async with session.get(f"{url}/metrics", headers={"Accept-Encoding": "br"}) as answer:
            assert "Content-Encoding" not in answer.headers
        openmetrics = {"Accept": "application/openmetrics-text; version=1.0.0"}
        async with session.get(f"{url}/metrics", headers=openmetrics) as answer:
            assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
            assert (await answer.text()).endswith("# EOF\n")
    assert not collector.started
