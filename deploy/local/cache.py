"""Where programs that were downloaded or built once are kept, and how runs share that place."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Progress = Callable[[str], None]


def print_progress(message: str) -> None:
    """The default `progress`: one line on stderr, at once."""
    print(message, file=sys.stderr, flush=True)


def cache_directory() -> Path:
    """`$UPKEEP_CACHE`, else `$XDG_CACHE_HOME/upkeep`, else `~/.cache/upkeep`; may not exist yet."""
    if own := os.environ.get("UPKEEP_CACHE"):
        return Path(own).absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).absolute() / "upkeep"
    return Path.home() / ".cache" / "upkeep"


@contextmanager
def exclusive(lock: Path, what: str, progress: Progress = print_progress) -> Iterator[None]:
    """Hold an flock on the file `lock`; says `what` it waits for if another process has it.

    The kernel lets go of it when the process dies, so there are no stale locks.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"another process is {what}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
