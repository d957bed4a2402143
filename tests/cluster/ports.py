"""Loopback ports that two test runs never share.

Asking the kernel for a free port and closing it again leaves a moment in which somebody else gets
it. So a port is reserved by an flock on a file named after it, which ends with the process, and is
taken from below the range that the kernel hands out for outgoing connections.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

FIRST, LAST = 20000, 29999


@contextmanager
def reserved_ports(count: int) -> Iterator[list[int]]:
    """`count` TCP ports that are free on loopback and ours while the context lasts.

    Raises RuntimeError if the range has no more free ones.
    """
    folder = Path(tempfile.gettempdir()) / f"upkeep-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with ExitStack() as stack:
        ports: list[int] = []
        for port in random.sample(range(FIRST, LAST + 1), LAST + 1 - FIRST):
            if len(ports) == count:
                break
            file = stack.enter_context((folder / str(port)).open("w"))
            if _lock(file) and _is_free(port):
                ports.append(port)
            else:
                file.close()
        if len(ports) < count:
            raise RuntimeError(f"fewer than {count} free ports between {FIRST} and {LAST}")
        yield ports


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
