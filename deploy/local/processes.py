"""Child processes with a log of their own that never outlive the process that started them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.local.observe import UnreachableError, get_text

_BOUND = Path(__file__).with_name("bound.py")
_TAIL = 15  # lines of a log shown when its program failed


class StartError(RuntimeError):
    """A program did not start or died; the sentence names it and shows its last lines."""


class Program:
    """One running program: its name, its log, and whether it lives."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it in a session of its own: Ctrl-C reaches us alone, and we stop it in order.

        It is bound to the calling *thread*, as the kernel counts parents: start programs from a
        thread that lives as long as they shall.
        """
        self.name = name
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-SE", str(_BOUND), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, url: str, token: str = "", *, within: float = 60.0) -> None:
        """Ask `url` until it answers 200; `StartError` if the program ends or `within` s pass."""
        deadline = time.monotonic() + within
        answer = "no answer yet"
        while time.monotonic() < deadline:
            if not self.running:
                raise StartError(self.last_words(f"ended with status {self._process.returncode}"))
            try:
                get_text(url, token)
            except UnreachableError as error:
                answer = str(error)
            else:
                return
            time.sleep(0.1)
        raise StartError(self.last_words(f"was not ready within {within:.0f} s ({answer})"))

    def last_words(self, what: str) -> str:
        """A sentence about this program with the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-_TAIL:]
        return "\n  ".join([f"{self.name} {what}; the end of {self.log}:", *lines])

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self._process.kill()
        self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def stop(self, *, within: float = 15.0) -> None:
        """SIGTERM, then SIGKILL after `within` seconds; returns when it is gone."""
        if self.running:
            self._process.terminate()
        try:
            self._process.wait(within)
        except subprocess.TimeoutExpired:
            self.kill()


def port_for(preferred: int) -> int:
    """`preferred` if it is free on 127.0.0.1, else a free port; 0 asks for any."""
    for port in (preferred, 0):
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            number: int = tried.getsockname()[1]
            return number
    raise StartError("no free port on 127.0.0.1")
