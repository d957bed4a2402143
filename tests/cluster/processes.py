"""One component of a test cluster as a child process, with a log and a last word when it fails."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.cluster import die_with_parent


class ClusterError(RuntimeError):
    """A part of a test cluster didn't work; the message names it and has its last words."""


def last_lines(log: Path, count: int = 20) -> str:
    """The end of a log, for an error message; empty if there is none."""
    try:
        text = log.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-count:])


class Component:
    """A program that runs until stopped, and dies with this process whatever happens to it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        healthy: Callable[[], bool],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`healthy` is asked again and again after a start; it may raise OSError for "no"."""
        self.name = name
        self.command = list(command)
        self.log = log
        self._healthy = healthy
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id while it runs, else None."""
        if self._process is None or self._process.poll() is not None:
            return None
        return self._process.pid

    def launch(self) -> None:
        """Start the process without waiting for it to be of use. Its log is appended to."""
        if self.pid is not None:
            raise ClusterError(f"{self.name} runs already (pid {self.pid})")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                die_with_parent.wrap(self.command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is for us: we then stop it in order
            )

    def wait_healthy(self, timeout: float) -> None:
        """Wait until it is of use; ClusterError with its last lines if it exits or takes longer."""
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(OSError):
                if self._healthy():
                    return
            if self._process is None or self._process.poll() is not None:
                code = "not started" if self._process is None else self._process.returncode
                raise self.error(f"{self.name} ended ({code}) instead of becoming healthy")
            if time.monotonic() > deadline:
                raise self.error(f"{self.name} was not healthy within {timeout:.0f} s")
            time.sleep(0.1)

    def error(self, sentence: str) -> ClusterError:
        """An error of that sentence with the log's place and last lines."""
        return ClusterError(f"{sentence}; the end of {self.log}:\n{last_lines(self.log)}")

    def stop(self, *, kill: bool = False, timeout: float = 90) -> None:
        """SIGTERM, or SIGKILL with `kill`, and wait for the end; nothing if it doesn't run.

        An API server ends only once its watches do, hence the generous default. One that outlives
        `timeout` is killed, and ClusterError raised.
        """
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise self.error(f"{self.name} did not end within {timeout:.0f} s of SIGTERM") from None
