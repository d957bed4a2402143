"""`upkeep-exporter`: parse, then either print one check for people or serve `/metrics`."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

from exporter import config, logs, report
from exporter.collectors import COLLECTORS
from exporter.kubernetes import AccessError, check_access
from exporter.server import Scraper, application
from exporter.web import Listener, WebConfigError


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
    try:
        report.write(found, settings.output, sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        logs.hush(sys.stdout)
    except OSError as error:
        sys.stderr.write(f"upkeep-exporter: the findings can't be written: {error.strerror}\n")
        return 1
    return 0


async def _serve(settings: config.Config) -> int:
    log = logs.get_logger("exporter")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _say_nothing_to_reload)
    if "rollouts" in settings.collectors:
        try:
            check_access(settings.kubeconfig, os.environ)
        except AccessError as error:
            log.error("rollouts can't be seen until this is mended", why=str(error))
    collectors = {name: COLLECTORS[name](settings) for name in settings.collectors}
    scraper = Scraper(collectors)
    app = application(scraper, settings.collectors)
    listener = Listener(app, settings.listen, settings.web_config_file)
    host, port = settings.listen
    try:
        await listener.start()
    except WebConfigError as error:
        log.error("the web configuration can't be used", why=str(error))
        return 1
    except OSError as error:
        log.error(
            "can't listen; is another exporter running? choose another --web.listen-address",
            address=f"{host}:{port}",
            why=error.strerror or str(error),
        )
        return 1
    log.info("listening", address=f"{host}:{port}", collectors=",".join(settings.collectors))
    await stop.wait()
    log.info("stopping")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(listener.aclose(), 10)
    if scraper.hanging:
        log.warning("ends while a collector hangs")
        logging.shutdown()
        os._exit(0)
    return 0


def _say_nothing_to_reload() -> None:
    """SIGHUP, which makes other daemons reload, would end this one by default."""
    logs.get_logger("exporter").info(
        "nothing to reload: the web configuration is read as it changes"
    )


if __name__ == "__main__":
    sys.exit(main())
