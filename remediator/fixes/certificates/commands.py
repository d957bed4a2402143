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
    """Run a program, and what it starts, to their end; kill them all after `timeout` seconds."""
    # Not a pipe: a kubeadm that outlives us would be ended by its next word into it, half-way.
    output = os.memfd_create("output")
    try:
        status = await _run(arguments, timeout, output)
        begin = max(0, os.fstat(output).st_size - 4 * _KEPT)
        text = os.pread(output, 4 * _KEPT, begin).decode("utf-8", "replace").strip()
    finally:
        os.close(output)
    return Completed(status=status, output=text[-_KEPT:])


async def _run(arguments: Sequence[str], timeout: float, output: int) -> int:  # noqa: ASYNC109
    # Nobody writes into this pipe: it closes once the program and all that it started have ended.
    alive, held = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env=_ENVIRONMENT,
            pass_fds=(held,),
        )
    except OSError as error:
        os.close(alive)
        raise CommandError(f"{arguments[0]} can't be run: {error.strerror}") from None
    finally:
        os.close(held)
    loop, closed = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(alive, closed.set)
    ended = False
    try:
        async with asyncio.timeout(timeout):
            await closed.wait()
            status = await process.wait()
            ended = True
    except TimeoutError:
        raise CommandError(f"{arguments[0]} did not end within {timeout:g} s") from None
    finally:
        loop.remove_reader(alive)
        os.close(alive)
        if not ended:  # timed out or cancelled: nothing of it goes on, nor of what it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return status
