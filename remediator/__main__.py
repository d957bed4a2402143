"""`upkeep-remediator`: parse, then serve or run one command."""

import asyncio
import sys
from collections.abc import Sequence

from exporter import logs
from remediator import flags
from remediator.cli import command
from remediator.config import ConfigError
from remediator.daemon import Daemon


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    given, settings = flags.read(arguments)
    logs.configure(level=settings.log_level, format=settings.log_format)
    if given.command != "serve":
        return asyncio.run(command(given, settings))
    try:
        return asyncio.run(_serve(settings))
    except ConfigError as error:
        sys.stderr.write(f"upkeep-remediator: {logs.inert(str(error))}\n")
        return 2


async def _serve(settings: flags.Flags) -> int:
    return await Daemon(settings).run()


if __name__ == "__main__":
    sys.exit(main())
