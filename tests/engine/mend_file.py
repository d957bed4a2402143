"""A small real fix for the engine's tests: a file that exists is broken, removing it mends it.

It acts on real files from a real process, so that a `kill -9` can be judged by what is left: `acts`
holds one line for each act, and no target may ever have two.
"""

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from remediator.fixes import Edges, Entry
from remediator.model import CheckError, Condition, FixError, Outcome, Phase, Steps, Target


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the files are, and how it behaves."""

    directory: str = ""
    delay: float = 0.0
    """Seconds between the act and its completion."""
    misbehave: str = ""
    """fail, raise, hang, leave: how apply goes wrong; check-error, check-raise: how check does."""
    workload: str = ""
    deadline: float = 20.0


class MendFile:
    """Target: a node and a pod, whose file is `directory/POD`."""

    name = "mend-file"
    target_labels = ("node", "pod")
    reasons: Mapping[Phase, tuple[str, ...]] = {
        Phase.SUCCEEDED: ("Mended",),
        Phase.FAILED: ("Refused",),
        Phase.SKIPPED: ("ConditionCleared",),
    }

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.deadline = settings.deadline
        self.directory = Path(settings.directory)

    async def check(self, target: Target) -> Condition:
        if self.settings.misbehave == "check-error":
            raise CheckError("the folder can't be read; nothing is done")
        if self.settings.misbehave == "check-raise":
            raise ZeroDivisionError
        if not (self.directory / target.pod).exists():
            return Condition(broken=False, reason="ConditionCleared", message="no such file")
        opted_out = ""
        if (self.directory / f"{target.pod}.opt-out").exists():
            opted_out = "the pod's annotation upkeep.dev/remediation says disabled"
        return Condition(
            broken=True,
            reason="FileThere",
            message=f"the file of {target.pod} is there",
            identities=frozenset({target.pod}),
            plan=(f"remove the file of {target.pod}",),
            workload=self.settings.workload,
            opted_out=opted_out,
            detail=object(),
        )

    async def apply(self, target: Target, condition: Condition, steps: Steps) -> Outcome:
        assert condition.broken
        async with steps.step("mend", f"remove the file of {target.pod}", pod=target.pod):
            match self.settings.misbehave:
                case "fail":
                    raise FixError("Refused", "the file is in use; nothing was changed")
                case "raise":
                    raise ZeroDivisionError
                case "hang":
                    await asyncio.sleep(3600)
            self.act(target)
            await asyncio.sleep(self.settings.delay)
            while (self.directory / "hold").exists():  # until the test lets go
                await asyncio.sleep(0.02)
            if self.settings.misbehave != "leave":
                (self.directory / target.pod).unlink()
        return Outcome(phase=Phase.SUCCEEDED, reason="Mended", message="the file is gone")

    async def verify(self, target: Target, condition: Condition) -> Condition:
        assert target.pod in condition.identities
        return await self.check(target)

    async def resume(self, target: Target, steps: Steps) -> Outcome:
        assert steps.earlier[0].data == {"pod": target.pod}
        async with steps.step("finish", "finish what a dead process began"):
            if target.pod not in self.acts():
                self.act(target)
            (self.directory / target.pod).unlink(missing_ok=True)
        return Outcome(phase=Phase.SUCCEEDED, reason="Mended", message="finished after a crash")

    def acts(self) -> list[str]:
        """The targets acted on, one entry an act."""
        path = self.directory / "acts"
        return path.read_text().split() if path.exists() else []

    def act(self, target: Target) -> None:
        """Add a line."""
        handle = os.open(self.directory / "acts", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(handle, f"{target.pod}\n".encode())
        finally:
            os.close(handle)


def _make(settings: Any, _edges: Edges) -> MendFile:
    return MendFile(settings)


FIXES: Mapping[str, Entry] = {"mend-file": Entry(lambda: Settings, _make, on_node=True)}


def main() -> int:
    """The real daemon and command line, with this fix alone."""
    from exporter import logs
    from remediator import flags
    from remediator.cli import command
    from remediator.config import ConfigError
    from remediator.daemon import Daemon

    given, settings = flags.read(None)
    logs.configure(level=settings.log_level, format=settings.log_format)

    async def serve() -> int:
        return await Daemon(settings, FIXES).run()

    if given.command != "serve":
        return asyncio.run(command(given, settings, FIXES))
    try:
        return asyncio.run(serve())
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
