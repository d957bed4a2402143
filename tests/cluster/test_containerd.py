"""The private containerd: containers of every kind, and nothing left of any of it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster import cgroups, images, lifetime
from tests.cluster.containerd import Container, ContainerdHost, Pod, Qos, Shape
from tests.cluster.containerd import containerd_host as another_host
from tests.cluster.node import PROJECT, inner_pid
from tests.cluster.zombie_makers import (
    IMITATION,
    KINDS,
    ODD_NAMES,
    descendants,
    start_maker,
    zombie_maker,
    zombies,
)

pytestmark = [pytest.mark.root, pytest.mark.debian]


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether it comes true in that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def started(host: ContainerdHost, kind: str, count: int = 6, parents: int = 2) -> Container:
    """A container of that kind that has left its zombies."""
    return start_maker(host, zombie_maker(kind, count, parents=parents), pod=Pod())


def parents_of_zombies(container: Container) -> set[int]:
    """Their pids, as the machine counts."""
    return {process.parent for process in zombies(container.pid)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_leaves_what_it_promises(containerd_host: ContainerdHost, kind: str) -> None:
    container = started(containerd_host, kind)
    below = descendants(container.pid)
    assert inner_pid(container.pid, 2) == 1
    dead = [process for process in below if process.is_zombie]
    assert len(dead) == (0 if kind in {"leader", "imitation"} else 6)
    assert len([p for p in below if p.is_lookalike]) == (6 if kind == "leader" else 0)
    if kind in {"pid1", "exec"}:
        assert parents_of_zombies(container) == {container.pid}
    elif dead:
        assert len(parents_of_zombies(container) - {container.pid}) == 2
    container.stop()


def test_killing_the_parent_in_the_middle_lets_pid_1_reap(containerd_host: ContainerdHost) -> None:
    container = started(containerd_host, "parent")
    for parent in parents_of_zombies(container):
        os.kill(parent, signal.SIGCHLD)
        os.kill(parent, signal.SIGTERM)
    assert eventually(lambda: not descendants(container.pid))
    container.stop()


def test_a_daemon_under_a_pid_1_that_never_waits_only_joins_its_zombies(
    containerd_host: ContainerdHost,
) -> None:
    container = started(containerd_host, "daemon", parents=1)
    for parent in parents_of_zombies(container):
        os.kill(parent, signal.SIGKILL)
    assert eventually(lambda: parents_of_zombies(container) == {container.pid})
    assert len(zombies(container.pid)) == 7
    container.stop()


def test_sigchld_helps_only_a_parent_with_a_handler(containerd_host: ContainerdHost) -> None:
    deaf, hearing = (started(containerd_host, kind) for kind in ("parent", "sigchld"))
    for parent in parents_of_zombies(deaf) | parents_of_zombies(hearing):
        os.kill(parent, signal.SIGCHLD)
    assert eventually(lambda: not zombies(hearing.pid))
    assert len(zombies(deaf.pid)) == 6
    deaf.stop()
    hearing.stop()


def test_term_does_not_end_a_parent_that_ignores_it(containerd_host: ContainerdHost) -> None:
    container = started(containerd_host, "ignores-term")
    parents = parents_of_zombies(container)
    for parent in parents:
        os.kill(parent, signal.SIGTERM)
    time.sleep(0.5)
    assert parents_of_zombies(container) == parents
    for parent in parents:
        os.kill(parent, signal.SIGKILL)
    assert eventually(lambda: not zombies(container.pid))
    container.stop()


def test_term_does_not_end_a_pid_1_without_a_handler(containerd_host: ContainerdHost) -> None:
    container = started(containerd_host, "pid1")
    os.kill(container.pid, signal.SIGTERM)
    time.sleep(0.5)
    assert len(zombies(container.pid)) == 6
    os.kill(container.pid, signal.SIGKILL)
    assert eventually(lambda: not zombies(container.pid))
    container.stop()


def test_a_leader_that_ended_before_its_threads_is_not_dead(
    containerd_host: ContainerdHost,
) -> None:
    container = started(containerd_host, "leader")
    leader = next(p for p in descendants(container.pid) if p.is_lookalike)
    descriptor = os.pidfd_open(leader.pid)
    assert select.select([descriptor], [], [], 0) == ([], [], [])  # readable means: has ended
    os.close(descriptor)
    container.stop()


@pytest.mark.parametrize("name", [IMITATION, *ODD_NAMES], ids=ascii)
def test_zombies_with_odd_names(containerd_host: ContainerdHost, name: bytes) -> None:
    maker = zombie_maker("parent", 2, name=name)
    container = start_maker(containerd_host, maker)
    assert [process.name for process in zombies(container.pid)] == [name, name]
    container.stop()


def test_a_process_named_like_a_stat_line_lives(containerd_host: ContainerdHost) -> None:
    container = started(containerd_host, "imitation", count=1, parents=1)
    named = next(p for p in descendants(container.pid) if p.name == IMITATION)
    naive = Path(f"/proc/{named.pid}/stat").read_text().split()
    assert (naive[2], naive[3]) == ("Z", "4567")  # what splitting on spaces reads
    assert (named.state, named.threads) == ("S", 1)
    container.stop()


def test_a_flood(containerd_host: ContainerdHost) -> None:
    container = started(containerd_host, "parent", count=1000, parents=50)
    assert len(parents_of_zombies(container)) == 50
    container.stop()


@pytest.mark.parametrize("shape", ["cgroupfs", "systemd"])
@pytest.mark.parametrize("qos", ["guaranteed", "burstable", "besteffort"])
def test_containers_stand_where_a_kubelet_puts_them(
    containerd_host: ContainerdHost, shape: Shape, qos: Qos
) -> None:
    pod = Pod(pids_max=77, qos=qos)
    host = containerd_host
    container = host.run(images.WORKLOAD, ["sleep", "1000"], pod=pod, name="main", shape=shape)
    expected = {
        ("cgroupfs", "guaranteed"): f"/kubepods/pod{pod.uid}/{container.id}",
        ("cgroupfs", "burstable"): f"/kubepods/burstable/pod{pod.uid}/{container.id}",
        ("cgroupfs", "besteffort"): f"/kubepods/besteffort/pod{pod.uid}/{container.id}",
        ("systemd", "guaranteed"): "/kubepods.slice/kubepods-pod{uid}.slice/{scope}",
        ("systemd", "burstable"): "/kubepods.slice/kubepods-burstable.slice/"
        "kubepods-burstable-pod{uid}.slice/{scope}",
        ("systemd", "besteffort"): "/kubepods.slice/kubepods-besteffort.slice/"
        "kubepods-besteffort-pod{uid}.slice/{scope}",
    }[shape, qos].format(
        uid=pod.uid.replace("-", "_"), scope=f"cri-containerd-{container.id}.scope"
    )
    on_machine = Path(f"/proc/{container.pid}/cgroup").read_text()
    in_node = host.node.run(["cat", f"/proc/{inner_pid(container.pid)}/cgroup"]).stdout
    paths = {line.split(":", 2)[2] for line in in_node.splitlines()}
    assert paths == {expected}
    assert f"/{host.node.name}{expected}\n" in on_machine
    limits = [h.mount / f"{host.node.name}{expected}/../pids.max" for h in cgroups.hierarchies()]
    assert [path.read_text() for path in limits if path.exists()] == ["77\n"]
    container.stop()


def test_names_are_in_the_log_links(containerd_host: ContainerdHost) -> None:
    pod = Pod(name="web-1", namespace="tenant-a")
    argv = ["sh", "-c", "echo hello; sleep 1000"]
    container = containerd_host.run(images.WORKLOAD, argv, pod=pod, name="app")
    logs = containerd_host.node.root / "var/log"
    link = logs / f"containers/web-1_tenant-a_app-{container.id}.log"
    assert str(link.readlink()) == f"/var/log/pods/tenant-a_web-1_{pod.uid}/app/0.log"
    log = logs / f"pods/tenant-a_web-1_{pod.uid}/app/0.log"
    assert eventually(lambda: log.read_text() == "hello\n")
    container.stop()


def test_the_parent_of_a_container_is_a_real_shim(containerd_host: ContainerdHost) -> None:
    container = started(containerd_host, "pid1", count=1)
    parent = Path(f"/proc/{container.pid}/stat").read_text().rpartition(") ")[2].split()[1]
    assert Path(f"/proc/{parent}/comm").read_text() == "containerd-shim\n"
    container.stop()


def test_what_runs_in_a_node_ends_as_it_would_outside(containerd_host: ContainerdHost) -> None:
    node = containerd_host.node
    assert node.run(["sh", "-c", "exit 7"], check=False).returncode == 7
    assert node.run(["sh", "-c", "kill -TERM $$"], check=False).returncode == -signal.SIGTERM
    assert node.run(["cat"], stdin="passed on").stdout == "passed on"
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = node.popen(["sleep", "1000"], stdout=subprocess.DEVNULL)
        assert eventually(lambda p=process: bool(descendants(p.pid)))  # type: ignore[misc]
        program = descendants(process.pid)[0].pid
        process.send_signal(number)
        assert process.wait(20) == -number
        assert eventually(lambda pid=program: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]


def test_a_service_that_ends_is_started_again(containerd_host: ContainerdHost) -> None:
    node = containerd_host.node
    container = started(containerd_host, "pid1", count=1)
    before = node.service_pid("containerd")
    assert before is not None
    os.kill(before, signal.SIGKILL)
    assert eventually(lambda: node.service_pid("containerd") not in {None, before})
    assert eventually(lambda: node.run(["ctr", "version"], check=False).returncode == 0)
    assert len(zombies(container.pid)) == 1  # containers outlive their containerd
    container.stop()


def test_a_node_changes_nothing_of_the_machine(containerd_host: ContainerdHost) -> None:
    settings = ["vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "vm/swappiness"]
    before = [Path("/proc/sys", name).read_text() for name in settings]
    written = f"upkeep-written-{os.getpid()}"
    places = [
        f"{folder}/{written}" for folder in ("/etc", "/usr", "/root", "/var/lib", "/run", "/")
    ]
    containerd_host.node.run(["touch", *places])
    refused = containerd_host.node.run(["sysctl", "--write", "vm.swappiness=1"], check=False)
    assert refused.returncode != 0
    assert [Path("/proc/sys", name).read_text() for name in settings] == before
    assert [place for place in places if Path(place).exists()] == []
    assert containerd_host.node.name not in Path("/proc/self/mountinfo").read_text()


def test_two_hosts_never_meet(containerd_host: ContainerdHost, tmp_path: Path) -> None:
    with another_host(tmp_path) as other:
        assert other.node.name != containerd_host.node.name
        assert other.node.state.network != containerd_host.node.state.network
        container = started(other, "pid1", count=1)
        assert containerd_host.ctr("task", "list").find(container.id) == -1
        assert not set(other.node.pids) & set(containerd_host.node.pids)
    assert containerd_host.ctr("version")


def traces(node: str, pids: list[int]) -> list[str]:
    """What is left of a node on the machine."""
    left = [str(path) for h in cgroups.hierarchies() for path in h.mount.glob(f"{node}*")]
    left += [f"process {pid}" for pid in pids if Path(f"/proc/{pid}").exists()]
    left += [str(state.file) for state in lifetime.states() if state.name == node]
    return left + [device for device in os.listdir("/sys/class/net") if device == node]  # noqa: PTH208


def test_teardown_leaves_only_logs(tmp_path: Path) -> None:
    with another_host(tmp_path) as host:
        started(host, "parent")
        pids = [pid for pid in host.node.pids if Path(f"/proc/{pid}").exists()]
        assert len(pids) > 5
        assert traces(host.node.name, pids)
        directory = Path(host.node.state.directory)
    assert traces(host.node.name, pids) == []
    assert [path.name for path in directory.iterdir()] == ["logs"]
    assert {path.name for path in (directory / "logs").iterdir()} >= {"containerd.log"}


_CRASHING = """
import signal, sys
from pathlib import Path
from tests.cluster.containerd import Pod, containerd_host
from tests.cluster.zombie_makers import start_maker, zombie_maker
with containerd_host(Path(sys.argv[1])) as host:
    start_maker(host, zombie_maker("parent", 5), pod=Pod())
    print(host.node.name, *host.node.pids, flush=True)
    signal.pause()
"""


def crashing(tmp_path: Path) -> tuple[subprocess.Popen[str], str, list[int]]:
    """A process with a containerd_host of its own; it, and the host's name and processes."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CRASHING, str(tmp_path)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    name, *pids = process.stdout.readline().split()
    assert traces(name, []) != []
    return process, name, [int(pid) for pid in pids]


def test_kill_9_of_the_test_process_leaves_only_logs(tmp_path: Path) -> None:
    process, name, pids = crashing(tmp_path)
    process.kill()
    process.wait()
    assert eventually(lambda: traces(name, pids) == []), traces(name, pids)
    assert [path.name for path in (tmp_path / name).iterdir()] == ["logs"]


def test_after_kill_9_of_the_keeper_the_next_run_cleans_up(tmp_path: Path) -> None:
    process, name, pids = crashing(tmp_path)
    keeper = next(state.keeper_pid for state in lifetime.states() if state.name == name)
    os.kill(keeper, signal.SIGKILL)
    process.kill()
    process.wait()
    gone = eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert gone, "the node outlived its keeper"
    lifetime.sweep()
    assert eventually(lambda: traces(name, pids) == []), traces(name, pids)
    assert [path.name for path in (tmp_path / name).iterdir()] == ["logs"]


def test_the_same_files_make_the_same_image(tmp_path: Path) -> None:
    image = images.workload_image()
    for name in ("one", "two"):
        images._write(image, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
