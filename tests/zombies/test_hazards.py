"""The hazard catalogue of zombies, each on real processes. See docs/hazards/zombies.md."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from exporter.checks.procfs import ProcessGoneError, Procfs, ProcfsError
from exporter.checks.zombies import Identity
from exporter.checks.zombies_scan import own_zombie
from exporter.collectors.zombies import ZombiesCollector
from exporter.config import Config
from remediator.fixes.zombies.facts import PodFacts
from remediator.fixes.zombies.parents import Group, Processes, Reaps, Role, unchanged
from remediator.fixes.zombies.signals import Pidfds, Sent
from remediator.model import CheckError, Phase, Target
from tests.zombies.conftest import GUIDE, Log, MakeFix, run, target
from tests.zombies.node import NAMES, PROCFS, Container, Node, until

pytestmark = pytest.mark.root

ODD_NAMES = (b"tmux: server", b"a) Z (b", b"new\nline", b"\xff\xfe\x80", b") ) 1 (")


class Recorder(Pidfds):
    """Real process descriptors; keeps which signals went out."""

    def __init__(self) -> None:
        super().__init__(PROCFS, send=self._keep)
        self.sent: list[signal.Signals] = []

    def _keep(self, handle: int, number: int) -> None:
        self.sent.append(signal.Signals(number))
        signal.pidfd_send_signal(handle, number)


class Knows:
    """A cluster that says this of every pod."""

    def __init__(self, facts: PodFacts) -> None:
        self.facts = facts

    async def pod(self, namespace: str, pod: str, uid: str) -> PodFacts:
        return self.facts


def living(container: Container) -> list[int]:
    """Everything in the container that isn't a zombie, in order."""
    return sorted(set(container.processes()) - set(container.zombies()))


async def test_z1_a_process_named_like_a_stat_line_gets_nobody_killed(
    node: Node, fix: MakeFix
) -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    name = f"x Z {bystander.pid} y".encode()[:15].hex()
    try:
        container = node.container("--live", "60", "--parents", "1", "--name", name)
        condition = await fix(**GUIDE).check(target(container))
        assert condition.reason == "ConditionCleared"
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("name", ODD_NAMES)
async def test_z2_zombies_with_odd_names_are_seen_and_cleared(
    node: Node, fix: MakeFix, name: bytes
) -> None:
    container = node.container("--zombies", "6", "--parents", "1", "--name", name.hex())
    assert {PROCFS.stat(pid).comm for pid in container.zombies()} == {name}
    condition, outcome, _ = await run(fix(**GUIDE), container)
    assert len(condition.identities) == 6
    assert outcome.phase is Phase.SUCCEEDED


def take_pid(pid: int) -> subprocess.Popen[bytes]:
    """Start a process of our own that has exactly this pid, which must be free."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    for _ in range(500):
        last.write_text(str(pid - 1))
        process = subprocess.Popen(["sleep", "60"])
        if process.pid == pid:
            return process
        process.kill()
        process.wait()
    pytest.fail(f"pid {pid} could not be had")


@contextmanager
def reuser(victim: int, cgroup: Path) -> Iterator[Callable[[], None]]:
    """End `victim` and put an innocent process with its pid into its cgroup, when called."""
    innocent: list[subprocess.Popen[bytes]] = []

    def reuse() -> None:
        if not innocent:
            os.kill(victim, signal.SIGKILL)
            until(lambda: not Path(f"/proc/{victim}").exists())
            time.sleep(0.02)  # start times count in hundredths of a second
            innocent.append(take_pid(victim))
            (cgroup / "cgroup.procs").write_text(str(victim))

    try:
        yield reuse
        assert innocent, "the pid was never reused"
        assert innocent[0].poll() is None, "the innocent process was signalled"
    finally:
        for process in innocent:
            process.kill()
            process.wait()


@pytest.mark.parametrize("moment", ["before it is opened", "once it is opened", "before sending"])
async def test_z3_a_reused_pid_is_never_signalled(node: Node, fix: MakeFix, moment: str) -> None:
    container = node.container("--zombies", "6", "--parents", "1", "--term", "ignore")
    (parent,) = container.parents()
    with reuser(parent, container.cgroup) as reuse:

        def opened(pid: int) -> int:
            if moment == "before it is opened":
                reuse()
            handle = os.pidfd_open(pid)
            if moment == "once it is opened":
                reuse()
            return handle

        def sent(handle: int, number: int) -> None:
            if moment == "before sending":
                reuse()
            signal.pidfd_send_signal(handle, number)

        first = os.getpid()
        pidfds = Pidfds(PROCFS, lambda p: os.pidfd_open(p) if p == first else opened(p), sent)
        _, outcome, _ = await run(fix(**GUIDE, pidfds=pidfds), container)
        assert outcome.phase is Phase.SUCCEEDED, "the reaping first process took them"


async def test_z4_a_parent_replaced_since_the_check_is_left_alone(node: Node, fix: MakeFix) -> None:
    """The parent dies after the last look, and its zombies belong to a first process."""
    container = node.container("--zombies", "60", "--parents", "1", "--first", "never")
    (parent,) = container.parents()
    recorder = Recorder()
    reaper = fix(**GUIDE, pidfds=recorder)
    condition = await reaper.check(target(container))
    os.kill(parent, signal.SIGKILL)
    until(lambda: container.parents() == {container.first})
    outcome = await reaper.apply(target(container), condition, Log().steps)
    assert outcome.phase is Phase.SKIPPED
    assert set(recorder.sent) <= {signal.SIGCHLD}
    assert container.running


def test_z4_what_is_read_at_the_last_moment_decides(node: Node) -> None:
    container = node.container("--zombies", "6", "--parents", "1", "--first", "never")
    (parent,) = container.parents()
    recorder = Recorder()
    group_parent = Processes(PROCFS).parent(parent, container.ref)
    zombies = [PROCFS.stat(pid) for pid in container.zombies()]

    group = Group(group_parent, tuple(Identity(z.pid, z.starttime) for z in zombies), Reaps.UNKNOWN)
    assert unchanged(PROCFS, group, container.ref)
    other = node.container("--live", "1", "--parents", "1").ref
    assert not unchanged(PROCFS, group, other), "another container's"
    os.kill(parent, signal.SIGSTOP)
    stranger = group._replace(zombies=(Identity(os.getpid(), 1),))
    sent = recorder.send(
        group_parent.identity, signal.SIGKILL, lambda: unchanged(PROCFS, stranger, container.ref)
    )
    assert sent is Sent.CHANGED
    assert recorder.sent == []
    until(lambda: PROCFS.stat(parent).state in "Tt")  # stopped, and not ended


async def test_z5_leaders_with_live_threads_are_no_zombies(node: Node, fix: MakeFix) -> None:
    container = node.container("--leaders", "60", "--parents", "2")
    before = living(container)
    condition = await fix(**GUIDE).check(target(container))
    assert condition.reason == "ConditionCleared"
    assert living(container) == before


@pytest.mark.parametrize("name", ["containerd-shim-runc-v2", "conmon", "containerd", "kubelet"])
async def test_z6_a_parent_that_is_a_shim_is_never_signalled(
    node: Node, fix: MakeFix, name: str
) -> None:
    (node.folder / "runtime").mkdir()
    program = shutil.copy(node.program, node.folder / "runtime" / name)
    command = [str(program), "--zombies", "60", "--parents", "3"]
    container = node.container(program=command)
    until(lambda: len(container.zombies()) == 60)
    before, recorder = living(container), Recorder()
    _, outcome, _ = await run(fix(**GUIDE, pidfds=recorder), container)
    assert (outcome.phase, outcome.reason) == (Phase.SKIPPED, "WouldNotHelp")
    assert "part of a container runtime" in outcome.message
    assert recorder.sent == []
    assert living(container) == before


def values(collector: ZombiesCollector, metric: str) -> dict[tuple[str, ...], float]:
    """Samples of a metric by their labels but the node."""
    return {
        tuple(v for k, v in sample.labels.items() if k != "node"): sample.value
        for family in collector.collect()
        for sample in family.samples
        if sample.name == metric
    }


async def test_z7_zombies_of_the_host_are_counted_and_never_acted_on(
    node: Node, fix: MakeFix
) -> None:
    collector = ZombiesCollector(Config(node_name="n1", rootfs=node.rootfs, zombies_min_age=0))
    before = values(collector, "upkeep_zombie_processes")["", "", ""]
    with own_zombie():
        assert values(collector, "upkeep_zombie_processes")["", "", ""] == before + 1
        with pytest.raises(CheckError, match="namespace, pod and container"):
            await fix().check(Target(node="n1"))


@pytest.mark.parametrize(
    ("zombies", "reason"), [("10", "BelowActLimit"), ("60", "RestartNotAllowed")]
)
async def test_z8_the_first_process_is_left_alone(
    node: Node, fix: MakeFix, zombies: str, reason: str
) -> None:
    container = node.container("--zombies", zombies, "--parents", "0", "--first", "never")
    recorder = Recorder()
    _, outcome, _ = await run(fix(pidfds=recorder), container)
    assert (outcome.phase, outcome.reason) == (Phase.SKIPPED, reason)
    assert set(recorder.sent) == {signal.SIGCHLD}
    assert container.running


async def test_z9_a_parent_whose_end_would_only_add_a_zombie_lives(
    node: Node, fix: MakeFix
) -> None:
    container = node.container("--zombies", "60", "--parents", "3", "--first", "never")
    before, recorder = living(container), Recorder()
    condition, outcome, _ = await run(fix(**GUIDE, pidfds=recorder), container)
    assert "Leave 3 parents alone" in condition.plan[-1]
    assert (outcome.phase, outcome.reason) == (Phase.SKIPPED, "WouldNotHelp")
    assert "would get its zombies, doesn't reap them" in outcome.message
    assert set(recorder.sent) == {signal.SIGCHLD}
    assert living(container) == before


async def test_z9_one_parent_is_tried_where_it_can_not_be_known(node: Node, fix: MakeFix) -> None:
    """A first process that handles SIGCHLD, but only for children of its own making."""
    code = """
import os, signal, sys, time
signal.signal(signal.SIGCHLD, lambda *_: None)
for _ in range(3):
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for _ in range(20):
            if os.fork() == 0:
                os._exit(0)
        while True:
            time.sleep(60)
while True:
    time.sleep(60)
"""
    container = node.container(program=[sys.executable, "-S", "-c", code])
    until(lambda: len(container.zombies()) == 60)
    _, outcome, _ = await run(fix(**GUIDE), container)
    assert (outcome.phase, outcome.reason) == (Phase.FAILED, "ZombiesStayed"), "one was ended"
    assert "1 parents were ended" in outcome.message
    assert len(living(container)) == 3, "the first process and two of its three children"


@pytest.mark.parametrize("policy", ["Never", "OnFailure", ""])
async def test_z10_a_container_that_may_not_come_back_is_not_stopped(
    node: Node, fix: MakeFix, policy: str
) -> None:
    container = node.container("--zombies", "60", "--parents", "0", "--first", "never")
    facts = Knows(PodFacts(restart_policy=policy, why_unknown="" if policy else "it is down"))
    _, outcome, log = await run(fix(facts=facts), container)
    assert (outcome.phase, outcome.reason) == (Phase.SKIPPED, "RestartNotAllowed")
    assert (policy or "it is down") in outcome.message
    assert log.names == ["sigchld"]
    assert container.running


async def test_z12_a_container_that_exits_before_the_act(node: Node, fix: MakeFix) -> None:
    container = node.container("--zombies", "60", "--parents", "3")
    neighbour = node.container("--zombies", "60", "--parents", "3", names=NAMES._replace(pod="b"))
    before, recorder = sorted(neighbour.processes()), Recorder()
    reaper = fix(**GUIDE, pidfds=recorder)
    condition = await reaper.check(target(container))
    container.kill()
    outcome = await reaper.apply(target(container), condition, Log().steps)
    assert outcome.phase is Phase.SUCCEEDED
    assert recorder.sent == []
    assert not (await reaper.verify(target(container), condition)).broken
    assert sorted(neighbour.processes()) == before


async def test_z13_a_pod_of_an_opted_out_namespace_is_untouched(node: Node, fix: MakeFix) -> None:
    names = NAMES._replace(namespace="kube-system")
    container = node.container("--zombies", "60", "--parents", "3", names=names)
    recorder = Recorder()
    condition, outcome, log = await run(fix(pidfds=recorder), container)
    assert "kube-system stands in opt_out" in condition.opted_out
    assert (outcome.phase, outcome.reason) == (Phase.SKIPPED, "OptedOut")
    assert (recorder.sent, log.names) == ([], [])


@pytest.mark.parametrize("opt_out", [("shop",), ("shop/web-0",), ()])
async def test_z13_opted_out_by_the_local_list_or_by_annotation(
    node: Node, fix: MakeFix, opt_out: tuple[str, ...]
) -> None:
    container = node.container("--zombies", "60", "--parents", "3")
    facts = PodFacts() if opt_out else PodFacts(opted_out="node n1 has the annotation")
    recorder = Recorder()
    _, outcome, _ = await run(fix(opt_out=opt_out, facts=Knows(facts), pidfds=recorder), container)
    assert (outcome.reason, recorder.sent) == ("OptedOut", [])


async def test_z14_processes_of_a_container_inside_the_container_are_safe(
    node: Node, fix: MakeFix
) -> None:
    inner = [str(node.shim), "--pid", "--fork", str(node.program), "--zombies", "60"]
    outer = f"import os, subprocess; subprocess.Popen({[*inner, '--parents', '3']!r})"
    reaping = f"{outer}\nwhile True: os.wait()"  # the inner processes' first one is another
    container = node.container(program=[sys.executable, "-S", "-c", reaping])
    until(lambda: len(container.zombies()) == 60)
    before = living(container)
    condition, outcome, _ = await run(fix(**GUIDE), container)
    assert len(condition.identities) == 60, "counted for the outer container"
    assert (outcome.phase, outcome.reason) == (Phase.SKIPPED, "WouldNotHelp")
    assert living(container) == before


def test_z15_no_process_and_no_thread_is_needed_to_act(node: Node) -> None:
    """The fix runs where the kernel refuses every fork, and clears a flood."""
    container = node.container("--zombies", "60", "--parents", "3")
    slots = node.cgroup / "slots"
    slots.mkdir()
    command = [sys.executable, "-m", "tests.zombies.without_slots", str(node.rootfs), str(slots)]
    done = subprocess.run(
        [*command, container.names.pod], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    results = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results == [["no-fork"], ["no-thread"], ["Succeeded", "ParentsEnded"]]
    assert container.processes() == [container.first]


async def test_z16_ten_thousand_zombies_in_bounded_memory_and_time(
    node: Node, fix: MakeFix
) -> None:
    container = node.container("--zombies", "10000", "--parents", "50")
    collector = ZombiesCollector(Config(node_name="n1", rootfs=node.rootfs, zombies_min_age=0))
    key = ("shop", "web-0", "app")
    assert values(collector, "upkeep_zombie_processes")[key] == 10000
    before = resident()
    began = time.process_time()
    for _ in range(5):
        assert values(collector, "upkeep_zombie_processes")[key] == 10000
    assert time.process_time() - began < 5 * 1.0
    condition, outcome, log = await run(fix(), container)
    assert len(condition.identities) == 10000
    assert outcome.phase is Phase.SUCCEEDED
    assert log.names == ["sigchld", "sigterm"]
    assert max(len(str(step.data)) for step in log.written.values()) < 10_000
    assert resident() - before < 40_000_000


def resident() -> int:
    """Bytes of memory this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_z17_nobody_outside_the_container_may_ever_be_ended(node: Node) -> None:
    container = node.container("--zombies", "6", "--parents", "2")
    neighbour = node.container("--zombies", "6", "--parents", "2")
    processes = Processes(PROCFS)
    roles: dict[int, Role] = {}
    for name in PROCFS.names():
        if name.isdigit():
            with suppress(ProcessGoneError):
                roles[int(name)] = processes.parent(int(name), container.ref).role
    ordinary = {pid for pid, role in roles.items() if role is Role.ORDINARY}
    assert container.parents() <= ordinary <= set(container.processes())
    assert {roles[pid] for pid in neighbour.processes()} == {Role.HOST}
    assert roles[container.first] is Role.FIRST
    assert roles[container.shim.pid] is Role.RUNTIME
    assert roles[os.getpid()] is Role.RUNTIME
    assert roles[1] in (Role.HOST, Role.RUNTIME)
    assert roles.get(2, Role.RUNTIME) is Role.RUNTIME, "kthreadd"


@pytest.mark.parametrize("option", ["hidepid=1", "hidepid=2"])
def test_z18_a_proc_that_hides_processes_is_an_error_and_no_count(
    tmp_path: Path, option: str
) -> None:
    hidden = tmp_path / f"proc-{uuid.uuid4().hex[:8]}"
    hidden.mkdir()
    subprocess.run(["mount", "-t", "proc", "-o", option, "proc", str(hidden)], check=True)
    try:
        collector = ZombiesCollector(Config(node_name="n1", procfs=hidden, rootfs=tmp_path))
        assert list(collector.collect()), "root sees through it"
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_uid == os.getuid():
                folder.chmod(folder.stat().st_mode | 0o111)
        assert failure_as_nobody(lambda: list(collector.collect())) == "ProcfsError"
    finally:
        subprocess.run(["umount", str(hidden)], check=True)


def failure_as_nobody(act: Callable[[], object]) -> str:
    """Name of the exception that `act` ends with in an unprivileged child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            act()
        except Exception as error:  # noqa: BLE001 - told to the parent
            os.write(writing, type(error).__name__.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        return pipe.read()


async def test_z18_processes_that_can_not_be_read_forbid_acting(
    tmp_path: Path, fix: MakeFix
) -> None:
    """A copy of what is read of /proc, in which one process's stat is no file."""
    proc = tmp_path / "proc"
    (proc / "sys/kernel").mkdir(parents=True)
    for name in ("loadavg", "sys/kernel/pid_max", "sys/kernel/threads-max"):
        (proc / name).write_bytes(Path("/proc", name).read_bytes())
    (proc / "self").symlink_to(str(os.getpid()))
    (proc / "1").mkdir()
    (proc / "1/stat").write_bytes(Path("/proc/1/stat").read_bytes())
    (proc / "77/stat").mkdir(parents=True)
    collector = ZombiesCollector(Config(node_name="n1", procfs=proc, rootfs=tmp_path))
    assert values(collector, "upkeep_zombie_unreadable_processes") == {(): 1}
    with pytest.raises(CheckError, match=r"1 processes in .* can't be read"):
        await fix(procfs=proc).check(Target(node="n1", **NAMES._asdict()))
    (proc / "self").unlink()
    (proc / "self").symlink_to("1")
    with pytest.raises(CheckError, match="another pid namespace"):
        await fix(procfs=proc).check(Target(node="n1", **NAMES._asdict()))
    with pytest.raises(ProcfsError, match="is it a proc mount"):
        Procfs(tmp_path / "nothing").names()
