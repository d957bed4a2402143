"""Running a program of the host: arguments as a list, bounded in time, output kept short."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Sequence

import msgspec

_KEPT = 8192  # characters of output; kubeadm's says what failed in its last lines
_ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "HOME": "/root",
    "ETCDCTL_API": "3",  # an etcdctl before 3.4 speaks version 2 unless told
}


class Completed(msgspec.Struct, frozen=True, kw_only=True):
    """A program that ended."""

    status: int
    output: str
    """Its last words, stdout and stderr together."""


class CommandError(Exception):
    """A program that is not there, or that did not end in time."""


Run = Callable[[Sequence[str], float], Awaitable[Completed]]
"""Runs an argument list for at most so many seconds; CommandError where it can't."""


async def run(arguments: Sequence[str], timeout: float) -> Completed:  # noqa: ASYNC109
    """Run a program to its end; kill its process group when `timeout` seconds are over."""
    try:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env=_ENVIRONMENT,
        )
    except OSError as error:
        raise CommandError(f"{arguments[0]} can't be run: {error.strerror}") from None
    ended = False
    try:
        async with asyncio.timeout(timeout):
            output, _ = await process.communicate()
            ended = True
    except TimeoutError:
        raise CommandError(f"{arguments[0]} did not end within {timeout:g} s") from None
    finally:
        if not ended:  # timed out or cancelled: nothing of it goes on, nor of what it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    text = output.decode("utf-8", "replace").strip()
    return Completed(status=process.returncode or 0, output=text[-_KEPT:])
