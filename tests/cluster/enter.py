"""Run a program inside a node: `python -m tests.cluster.enter PID CGROUP [--cwd DIR] -- ARGV…`.

Like nsenter into all namespaces of the node's PID 1, but the program also stands in the node's
cgroup, gets the signals sent to this process, dies when this process is killed, and its exit
status or deadly signal becomes that of this process.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from tests.cluster import cgroups
from tests.cluster.node_init import SERVICES_CGROUP
from tests.cluster.syscalls import Namespace, die_with_parent, setns

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(arguments: list[str]) -> int:
    """Join the node, fork, run the program, and end as it ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pid", type=int)
    parser.add_argument("cgroup")
    parser.add_argument("--cwd", default="/")
    parser.add_argument("argv", nargs="+")
    options = parser.parse_args(arguments)
    node = os.pidfd_open(options.pid)
    cgroups.join(f"{options.cgroup}/{SERVICES_CGROUP}")
    setns(
        node,
        Namespace.CGROUP
        | Namespace.UTS
        | Namespace.IPC
        | Namespace.NETWORK
        | Namespace.PID  # for children only: hence the fork
        | Namespace.MOUNT,
    )
    os.chdir(options.cwd)
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    child = os.fork()
    if child == 0:
        _become(options.argv, node)
    for number in _FORWARDED:
        signal.signal(number, lambda got, _: os.kill(child, got))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    _, status = os.waitpid(child, 0)
    return _end_likewise(status)


def _become(argv: list[str], node: int) -> None:
    die_with_parent()
    os.close(node)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - no shell is wanted
    except OSError as error:
        print(f"{argv[0]} can't be run in the node: {error}", file=sys.stderr)
        os._exit(127)


def _end_likewise(status: int) -> int:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.pause()  # a signal that dumps core may take a moment
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
