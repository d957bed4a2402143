"""Runs the fix where no process and no thread can be started any more; for test_z15.

Arguments: the root with the log folders, a cgroup with a pids controller, the pod.
"""

import asyncio
import os
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

from remediator.config import Seconds
from remediator.fixes.zombies import ReapZombies, Settings
from remediator.model import Step, Steps, Target


async def main(rootfs: Path, cgroup: Path, pod: str) -> None:
    """Print what can't be done, then how the fix ended."""
    settings = Settings(min_age=Seconds(0.3), wait_sigchld=Seconds(1.0), wait_sigterm=Seconds(5.0))
    fix = ReapZombies(settings, rootfs=rootfs)
    (cgroup / "cgroup.procs").write_text("0")
    (cgroup / "pids.max").write_text((cgroup / "pids.current").read_text())
    try:
        os.fork()
    except BlockingIOError:
        print("RESULT no-fork")
    try:
        threading.Thread(target=print).start()
    except RuntimeError:
        print("RESULT no-thread")
    target = Target(node="n1", namespace="shop", pod=pod, container="app")
    condition = await fix.check(target)

    async def record(_index: int, _step: Step) -> None:
        """Steps aren't wanted here."""

    outcome = await fix.apply(target, condition, Steps(record, lambda: datetime.now(UTC)))
    print("RESULT", outcome.phase, outcome.reason)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
