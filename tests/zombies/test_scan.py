"""The cheap scan finds exactly what the full one does, or gives way to it."""

import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from exporter.checks.cgroups import CgroupError, CgroupTree
from exporter.checks.procfs import Procfs
from exporter.checks.zombies_scan import CheapScan, ProvenScan, Scan, full_scan, own_zombie
from tests.zombies.node import PROCFS, Node

pytestmark = pytest.mark.root


def pids(scan: Scan) -> set[int]:
    return {stat.pid for stat in scan.zombies}


def test_both_ways_find_the_same_and_nothing_is_listed_twice_for_it(node: Node) -> None:
    container = node.container("--zombies", "30", "--parents", "3", "--leaders", "2")
    cheap = CheapScan(PROCFS, CgroupTree())
    mine = set(container.zombies())
    assert len(mine) == 30
    for _ in range(20):
        assert mine <= pids(cheap())
    assert mine <= pids(full_scan(PROCFS))
    assert cheap.listed < 20, "a quiet moment is enough for the count alone"


def test_z5_leaders_with_live_threads_are_found_by_neither(node: Node) -> None:
    container = node.container("--leaders", "4", "--zombies", "1", "--parents", "1")
    half_dead = {
        pid
        for pid in container.processes()
        if PROCFS.stat(pid).state == "Z" and PROCFS.stat(pid).threads > 1
    }
    assert len(half_dead) == 4
    assert not half_dead & pids(full_scan(PROCFS))
    assert not half_dead & pids(CheapScan(PROCFS, CgroupTree())())


CHURN = """
import os
while True:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
"""


def test_exact_while_processes_come_and_go(soak: bool) -> None:
    """A new zombie is in the very next scan, however many processes are born and die meanwhile.

    Each birth during a scan hides one of the dead from a mere count.
    """
    cheap = CheapScan(PROCFS, CgroupTree())
    held: list[int] = []
    churn = [subprocess.Popen([sys.executable, "-S", "-c", CHURN]) for _ in range(2)]
    try:
        for _ in range(20_000 if soak else 500):
            held.append(os.posix_spawn("/bin/true", ["true"], {}))
            os.waitid(os.P_PID, held[-1], os.WEXITED | os.WNOWAIT)
            assert set(held) <= pids(cheap())
            if len(held) > 5:
                os.waitpid(held.pop(0), 0)
    finally:
        for process in churn:
            process.kill()
            process.wait()
        for pid in held:
            os.waitpid(pid, 0)
    assert not set(held) & pids(cheap())


def test_a_cgroup_that_takes_anothers_place_is_not_missed(node: Node) -> None:
    tree = CgroupTree()
    old, new = node.cgroup / "old", node.cgroup / "new"
    old.mkdir()
    tree.refresh()
    old.rmdir()
    new.mkdir()  # the link count of the folder above is what it was
    assert not tree.live_tasks().complete
    assert tree.live_tasks().complete
    with own_zombie():
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        (new / "cgroup.procs").write_text(str(child))
        assert str(child).encode() in b"".join(tree.live_tasks().lists).split()
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_the_proof_must_be_seen() -> None:
    scan = ProvenScan(PROCFS, CheapScan(PROCFS, CgroupTree()))
    scan()
    assert scan.cheap
    assert sum(scan.fallbacks.values()) == 0


class Blind(CheapScan):
    """Sees nothing: what a kernel would look like whose cgroups listed the dead."""

    def __call__(self) -> Scan:
        return Scan([])


class BlindToItsOwn(CheapScan):
    """Misses the zombies of this process alone, and so its proof."""

    def __call__(self) -> Scan:
        return Scan([stat for stat in super().__call__().zombies if stat.ppid != os.getpid()])


def test_a_scan_that_misses_its_proof_is_never_used() -> None:
    scan = ProvenScan(PROCFS, BlindToItsOwn(PROCFS, CgroupTree()))
    scan()
    assert not scan.cheap
    assert scan.fallbacks == {"cgroups": 0, "proof": 1, "mismatch": 0}


def test_a_mismatch_ends_the_cheap_way(node: Node) -> None:
    container = node.container("--zombies", "3", "--parents", "1")
    scan = ProvenScan(PROCFS, Blind(PROCFS, CgroupTree()))
    assert set(container.zombies()) <= pids(scan())
    assert scan.fallbacks == {"cgroups": 0, "proof": 0, "mismatch": 1}
    assert set(container.zombies()) <= pids(scan())


def test_the_two_are_compared_again_every_ten_minutes(node: Node) -> None:
    now = 0.0
    cheap = CheapScan(PROCFS, CgroupTree())
    scan = ProvenScan(PROCFS, cheap, clock=lambda: now)
    scan()
    assert scan.cheap
    node.container("--zombies", "3", "--parents", "1")
    cheap.__class__ = Blind
    assert pids(scan()) == set(), "between comparisons the cheap way is believed"
    now = 601.0
    assert len(pids(scan())) >= 3
    assert scan.fallbacks["mismatch"] == 1


def test_z15_without_a_free_slot_the_proof_waits_and_the_full_way_serves() -> None:
    class NoProcess(nullcontext[None]):
        def __enter__(self) -> None:
            raise BlockingIOError(11, "Resource temporarily unavailable")

    now = 0.0
    cheap = CheapScan(PROCFS, CgroupTree())
    scan = ProvenScan(PROCFS, cheap, clock=lambda: now, make_zombie=NoProcess)
    with own_zombie():
        assert any(stat.ppid == os.getpid() for stat in scan().zombies)
    assert not scan.cheap
    assert sum(scan.fallbacks.values()) == 0
    scan._make_zombie = own_zombie
    now = 601.0
    scan()
    assert scan.cheap


def test_no_cgroups_no_cheap_way(tmp_path: Path) -> None:
    with pytest.raises(CgroupError, match=r"--path\.cgroupfs"):
        CgroupTree(tmp_path)
    scan = ProvenScan(Procfs(), None)
    with own_zombie():
        assert any(stat.ppid == os.getpid() for stat in scan().zombies)
    assert scan.fallbacks["cgroups"] == 1
