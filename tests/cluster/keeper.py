"""The process outside of a node that takes everything away when the node ends, however it ends.

It starts the node's PID 1 in a pid namespace of its own: when that process goes, the kernel kills
every other one in the node and drops its mounts and devices. The keeper waits for that, or for
its standard input to end, which happens when the process that wanted the node is gone (`kill -9`
too); then it removes cgroup, folder and state file. If the keeper itself is killed, so is the node
(PR_SET_PDEATHSIG), and the next run's `sweep` removes the rest.

Started by node.py as `python -m tests.cluster.keeper SPEC`. Prints one line of JSON: the pid of
the node's PID 1, or the error that kept it from starting.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from tests.cluster import cgroups, lifetime
from tests.cluster.node_init import NodeSpec, become_node, supervise
from tests.cluster.syscalls import Namespace, die_with_parent, unshare


def main(spec_file: Path) -> int:
    """Run one node until it ends or nobody wants it any more."""
    spec = NodeSpec.read(spec_file)
    state = next(state for state in lifetime.states() if state.name == spec.name)
    state = replace(
        state, keeper_pid=os.getpid(), keeper_start=lifetime.start_time(os.getpid()) or 0
    )
    state.write()
    wakeup_read, wakeup_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wakeup_write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    try:
        cgroups.create(spec.name)
        cgroups.hand_down_controllers()
        pid, answer = _start(spec)
        print(answer, flush=True)
        if pid:
            _wait(pid, None if state.detached else sys.stdin.fileno(), wakeup_read)
    finally:
        lifetime.dispose(state)
    return 0


def _start(spec: NodeSpec) -> tuple[int, str]:
    """Fork the node's PID 1; (its pid or 0, the line to print)."""
    told, tell = os.pipe2(os.O_CLOEXEC)
    keeper = os.getpid()
    unshare(Namespace.PID)  # from now on this process can have this one child
    pid = os.fork()
    if pid == 0:
        os.close(told)
        _be_node(spec, tell, keeper)
    os.close(tell)
    with os.fdopen(told) as pipe:
        error = pipe.read()
    if error:
        os.waitpid(pid, 0)
        return 0, json.dumps({"error": error})
    return pid, json.dumps({"pid": pid})


def _be_node(spec: NodeSpec, tell: int, keeper: int) -> NoReturn:
    """What the child does."""
    try:
        signal.set_wakeup_fd(-1)
        die_with_parent()
        if lifetime.start_time(keeper) is None:
            os._exit(1)  # it died before the line above
        become_node(spec)
    except BaseException:  # noqa: BLE001 - the keeper tells it
        os.write(tell, traceback.format_exc().encode())
        os._exit(1)
    os.close(tell)
    try:
        supervise(spec.services)
    finally:
        traceback.print_exc()
        os._exit(1)


def _wait(pid: int, lifeline: int | None, wakeup: int) -> None:
    """Until the node is gone; ends it at the end of the lifeline, or on a signal."""
    node = os.pidfd_open(pid)
    watched = [fd for fd in (node, wakeup, lifeline) if fd is not None]
    ready, _, _ = select.select(watched, [], [])
    if node not in ready:
        signal.pidfd_send_signal(node, signal.SIGKILL)
    os.close(node)
    os.waitpid(pid, 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
