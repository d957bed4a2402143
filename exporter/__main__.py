"""`upkeep-exporter`: parse, then either print one check for people or serve `/metrics`."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Sequence

from aiohttp import web

from exporter import config, logs, report
from exporter.collectors import COLLECTORS
from exporter.server import Scraper, application


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    settings, warnings = config.parse(arguments)
    logs.configure(level=settings.log_level, format=settings.log_format)
    log = logs.get_logger("exporter")
    for warning in warnings:
        log.warning(warning)
    return asyncio.run(_check(settings) if settings.check else _serve(settings))


async def _check(settings: config.Config) -> int:
    """Print one collector's findings; 1 and a sentence where it can't find out."""
    collector = COLLECTORS[settings.check](settings)
    await collector.start()
    try:
        found = await asyncio.to_thread(report.report_of, collector)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"upkeep-exporter: can't check {settings.check}: {error}\n")
        return 1
    finally:
        await collector.aclose()
    report.write(found, settings.output, sys.stdout)
    return 0


async def _serve(settings: config.Config) -> int:
    log = logs.get_logger("exporter")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    collectors = {name: COLLECTORS[name](settings) for name in settings.collectors}
    runner = web.AppRunner(application(Scraper(collectors), settings.collectors))
    await runner.setup()
    host, port = settings.listen
    try:
        site = web.TCPSite(runner, host or None, port)
        await site.start()
    except OSError as error:
        log.error(
            "can't listen; is another exporter running? choose another --web.listen-address",
            address=f"{host}:{port}",
            why=error.strerror or str(error),
        )
        await runner.cleanup()
        return 1
    log.info("listening", address=f"{host}:{port}", collectors=",".join(settings.collectors))
    await stop.wait()
    log.info("stopping")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(runner.cleanup(), 10)
    return 0


if __name__ == "__main__":
    sys.exit(main())
