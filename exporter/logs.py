"""Logs of both programs: one line an event, logfmt or JSON, on standard error.

What is logged often comes from people who must not be trusted (process names, labels, API
objects), so control characters are escaped here, once, for every line: a name can neither forge a
second line nor send escape codes to a terminal.
"""

import codecs
import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

codecs.lookup("unicode_escape")  # at its first use there may be no file descriptor to load it with

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("logfmt", "json")


def inert(text: str) -> str:
    """Escape whatever isn't printable, bidirectional overrides included; plain text stays."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "replace").decode("ascii")
        for c in text
    )


def hush(stream: TextIO) -> None:
    """After a BrokenPipeError (`| head`): what else is written, at the end too, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _inert_values(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if key == "exception":  # keeps its lines, which both formats escape
            event[key] = "\n".join(inert(line) for line in str(value).split("\n"))
        elif isinstance(value, str):
            event[key] = inert(value)
        elif not isinstance(value, (bool, int, float, type(None))):
            event[key] = inert(str(value))
    return event


def configure(*, level: str = "info", format: str = "logfmt") -> None:  # noqa: A002
    """Route structlog and the standard library's logging to standard error in one format."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        structlog.processors.format_exc_info,
        _inert_values,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if format == "json"
        else structlog.processors.LogfmtRenderer(
            key_order=["ts", "level", "event"], drop_missing=True, bool_as_flag=False
        )
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger that takes key=value pairs: `log.info("scraped", collector="zombies")`."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(name)
    return logger
