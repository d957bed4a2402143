"""One node of the tests, seen from outside: start it, run things in it, look into it, end it.

A node is a set of namespaces (mount, pid, network, cgroup, uts, ipc) whose PID 1 keeps services
such as containerd and a kubelet running. It is no container in a container: its processes are
ordinary processes of the machine, seen in the machine's /proc with pids of the machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from deploy.local.debian import cache_directory
from tests.cluster import cgroups, lifetime
from tests.cluster.lifetime import NodeState
from tests.cluster.node_init import NodeSpec, Service

PROJECT = Path(__file__).resolve().parents[2]


class NodeError(RuntimeError):
    """A node, or something in it, isn't as it has to be; with the last lines of its logs."""


@dataclass(frozen=True)
class Node:
    """A running node."""

    state: NodeState
    pid: int
    """Its PID 1, as the machine counts."""
    keeper: subprocess.Popen[str] | None
    """None where another process started it (`up`)."""

    @property
    def name(self) -> str:
        """Its host name, and its cgroup on the machine."""
        return self.state.name

    @property
    def root(self) -> Path:
        """Its / as seen from outside: for `--path.rootfs`."""
        return Path(f"/proc/{self.pid}/root")

    @property
    def logs(self) -> Path:
        """The folder with one NAME.log for each service."""
        return Path(self.state.directory) / "logs"

    @property
    def pids(self) -> list[int]:
        """Every process of the node and its containers, as the machine counts."""
        return cgroups.processes(self.name)

    def command(self, argv: Sequence[str | Path], *, cwd: str | Path = PROJECT) -> list[str]:
        """What has to be run outside, in the folder PROJECT, for `argv` to run in the node."""
        enter = [sys.executable, "-m", "tests.cluster.enter", str(self.pid), self.name]
        return [*enter, "--cwd", str(cwd), "--", *map(str, argv)]

    def popen(
        self,
        argv: Sequence[str | Path],
        *,
        cwd: str | Path = PROJECT,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a program in the node, as root, in its service cgroup. Signals sent to the process
        returned reach it; killing that one kills it. `env` is added to this process' own."""
        return subprocess.Popen(
            self.command(argv, cwd=cwd),
            cwd=PROJECT,
            env={**os.environ, **(env or {})},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
            errors="replace",
        )

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        check: bool = True,
        timeout: float = 60,
        cwd: str | Path = PROJECT,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the node to its end, and capture what it prints.

        Raises NodeError with its output if it fails and `check` is set, or after `timeout` s.
        """
        with self.popen(
            argv,
            cwd=cwd,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            try:
                out, err = process.communicate(stdin, timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                raise NodeError(
                    f"{self.name}: not done after {timeout} s: {' '.join(map(str, argv))}\n"
                    f"{out}{err}"
                ) from None
        if check and process.returncode != 0:
            raise NodeError(
                f"{self.name}: exit {process.returncode}: {' '.join(map(str, argv))}\n{out}{err}"
            )
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def service_pid(self, name: str) -> int | None:
        """The process of a service, as the machine counts; None while it doesn't run."""
        try:
            inner = int((self.root / f"run/services/{name}.pid").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return next((pid for pid in self.pids if inner_pid(pid) == inner), None)

    def stop(self, name: str, *, timeout: float = 30) -> None:
        """Stop a service by TERM, and keep it stopped until `start`."""
        (self.root / f"run/services/{name}.down").touch()
        deadline = time.monotonic() + timeout
        while (pid := self.service_pid(name)) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            if time.monotonic() > deadline:
                raise NodeError(f"{self.name}: {name} doesn't end\n{self.last_lines(name)}")
            time.sleep(0.1)

    def start(self, name: str) -> None:
        """Let a stopped service run again."""
        (self.root / f"run/services/{name}.down").unlink(missing_ok=True)

    def last_lines(self, service: str, count: int = 15) -> str:
        """The end of a service's log, headed by its path."""
        path = self.logs / f"{service}.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else ["(no log)"]
        return "\n".join([f"--- {path}", *lines[-count:]])

    def remove(self) -> None:
        """End it, and wait until nothing of it is left on the machine."""
        end(self.state)
        if self.keeper is not None:
            self.keeper.wait(30)


def start_node(
    state: NodeState, *, services: Sequence[Service], programs: Mapping[str, Path]
) -> Node:
    """Start the node that `state` (from lifetime.reserve) stands for.

    It runs until it is removed or, unless it is detached, until this process ends.
    Raises NodeError if it can't be set up.
    """
    directory = Path(state.directory)
    directory.mkdir(mode=0o700, parents=True)
    spec = NodeSpec(
        name=state.name,
        directory=state.directory,
        shared=[str(PROJECT), tempfile.gettempdir()],
        read_only=sorted({sys.prefix, sys.base_prefix, str(cache_directory())}),
        programs={name: str(path) for name, path in programs.items()},
        services=list(services),
    )
    spec.write(directory / "spec.json")
    (directory / "logs").mkdir()
    with (directory / "logs" / "node.log").open("a") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.keeper", str(directory / "spec.json")],
            cwd=PROJECT,
            stdin=subprocess.DEVNULL if state.detached else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    assert keeper.stdout is not None
    line = keeper.stdout.readline()
    answer = json.loads(line) if line else {"error": (directory / "logs/node.log").read_text()}
    if "error" in answer:
        keeper.wait()
        raise NodeError(f"{state.name} can't be set up: {answer['error']}")
    started = next(other for other in lifetime.states() if other.name == state.name)
    return Node(started, int(answer["pid"]), keeper)


def running_nodes(cluster: str) -> list[Node]:
    """The nodes of a cluster that another process started, in their order."""
    found = []
    for state in lifetime.states():
        if state.cluster == cluster and state.keeper_lives():
            children = Path(f"/proc/{state.keeper_pid}/task/{state.keeper_pid}/children")
            pid = int(children.read_text().split()[0])
            found.append(Node(state, pid, None))
    return sorted(found, key=_index)


def _index(node: Node) -> int:
    return node.state.index


def end(state: NodeState, *, timeout: float = 60) -> None:
    """End a node and wait until its keeper has removed everything."""
    if state.keeper_lives():
        with suppress(ProcessLookupError):
            os.kill(state.keeper_pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while state.keeper_lives():
        if time.monotonic() > deadline:
            raise NodeError(
                f"{state.name} isn't gone after {timeout} s: see {state.directory}/logs"
            )
        time.sleep(0.05)
    if state.file.exists():
        lifetime.dispose(state)


def inner_pid(pid: int, depth: int = 1) -> int | None:
    """A process' pid as the node counts (depth 1), or its container (2); None if it has none."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    line = next((line for line in status.splitlines() if line.startswith("NSpid:")), "")
    pids = line.split()[1:]
    return int(pids[depth]) if len(pids) > depth else None
