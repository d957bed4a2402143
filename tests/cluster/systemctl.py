"""`systemctl` of a test's node: the verbs that Upkeep and kubeadm use, on the node's PID 1.

A node has no systemd. Its PID 1 (node_init.py) keeps services running all the same; this program
stands where systemctl does and starts, stops and shows them as systemd would. Each call is a line
in /var/log/services/systemctl.log, for tests to see who asked for what. Nothing but the standard
library: it runs in the node, alone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

MARKS = Path("/run/services")
CALLS = Path("/var/log/services/systemctl.log")
_SECONDS = 30.0
_NOT_ACTIVE = 3
_NO_SUCH_UNIT = 5


def main(arguments: list[str]) -> int:
    """One call; the exit status is systemctl's."""
    with CALLS.open("a") as log:
        log.write(" ".join(arguments) + "\n")
    words = [word for word in arguments if not word.startswith("-")]
    verb, units = words[0], [word.removesuffix(".service") for word in words[1:]]
    if verb in ("daemon-reload", "enable", "status"):
        return 0
    for unit in units:
        if status := act(verb, unit, arguments):
            return status
    return 0


def act(verb: str, unit: str, arguments: list[str]) -> int:
    """Do it to one unit; its exit status."""
    known = (CALLS.parent / f"{unit}.log").exists() or (MARKS / f"{unit}.down").exists()
    if verb == "show":
        show(unit, arguments, known=known)
        return 0
    if not known and verb != "start":
        print(f"Unit {unit}.service not found.", file=sys.stderr)
        return _NO_SUCH_UNIT
    if verb == "is-active":
        print("active" if pid(unit) else "inactive")
        return 0 if pid(unit) else _NOT_ACTIVE
    if verb in ("stop", "restart"):
        stop(unit)
    if verb in ("start", "restart"):
        (MARKS / f"{unit}.down").unlink(missing_ok=True)
        if not waited(lambda: pid(unit) != 0):
            print(f"Job for {unit}.service failed.", file=sys.stderr)
            return 1
    return 0


def show(unit: str, arguments: list[str], *, known: bool) -> None:
    """Print the properties asked for, with their names or (`--value`) without."""
    all_of_them = {
        "LoadState": "loaded" if known else "not-found",
        "ActiveState": "active" if pid(unit) else "inactive",
        "MainPID": str(pid(unit)),
    }
    asked = [word.partition("=")[2] for word in arguments if word.startswith("--property=")]
    for name in ",".join(asked).split(",") if asked else all_of_them:
        bare = "--value" in arguments
        print(all_of_them.get(name, "") if bare else f"{name}={all_of_them.get(name, '')}")


def stop(unit: str) -> None:
    """TERM, and KILL when its time is up."""
    (MARKS / f"{unit}.down").touch()
    for number in (signal.SIGTERM, signal.SIGKILL):
        if main_pid := pid(unit):
            with suppress(ProcessLookupError):
                os.kill(main_pid, number)
        if waited(lambda: pid(unit) == 0):
            return


def pid(unit: str) -> int:
    """Of the unit's process, as the node counts; 0 while it doesn't run."""
    try:
        return int((MARKS / f"{unit}.pid").read_text() or 0)
    except FileNotFoundError:
        return 0


def waited(condition: Callable[[], bool]) -> bool:
    """Whether it came true in time."""
    ends = time.monotonic() + _SECONDS
    while not condition():
        if time.monotonic() > ends:
            return False
        time.sleep(0.05)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
