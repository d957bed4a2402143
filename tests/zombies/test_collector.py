"""The series: always there for the host, a container's from its first zombie until it is gone."""

import os
import time
from pathlib import Path

import pytest

from exporter.checks.cgroups import ContainerRef
from exporter.checks.containers import ContainerNames, LogFolders
from exporter.checks.zombies import ZombieWatch
from exporter.checks.zombies_scan import full_scan
from exporter.collectors.zombies import ZombiesCollector
from exporter.config import Config
from tests.zombies.node import PROCFS, Node, until
from tests.zombies.test_hazards import values

pytestmark = pytest.mark.root

APP = ("shop", "web-0", "app")
HOST = ("", "", "")


def collector(node: Node, **options: float) -> ZombiesCollector:
    return ZombiesCollector(
        Config(node_name="n1", rootfs=node.rootfs, **{"zombies_min_age": 0.0, **options})  # type: ignore[arg-type]
    )


def test_a_containers_series_live_from_its_first_zombie_until_it_is_gone(node: Node) -> None:
    made = collector(node)
    container = node.container("--zombies", "7", "--parents", "1")
    node.container("--live", "3", "--parents", "1", names=ContainerNames("shop", "calm-0", "app"))
    assert values(made, "upkeep_zombie_processes").keys() == {HOST, APP}
    assert values(made, "upkeep_zombie_processes")[APP] == 7
    for parent in container.parents():
        os.kill(parent, 15)
    until(lambda: not container.zombies())
    assert values(made, "upkeep_zombie_processes")[APP] == 0
    assert values(made, "upkeep_zombie_oldest_age_seconds")[APP] == 0
    container.kill()
    container.cgroup.rmdir()
    assert values(made, "upkeep_zombie_processes").keys() == {HOST}


def test_without_cgroups_the_links_tell_what_is_gone(node: Node, tmp_path: Path) -> None:
    config = Config(
        node_name="n1", rootfs=node.rootfs, cgroupfs=tmp_path / "none", zombies_min_age=0
    )
    made = ZombiesCollector(config)
    container = node.container("--zombies", "7", "--parents", "1")
    assert values(made, "upkeep_zombie_processes")[APP] == 7
    assert values(made, "upkeep_zombie_scan_fallbacks_total")["cgroups",] == 1
    for parent in container.parents():
        os.kill(parent, 15)
    until(lambda: not container.zombies())
    assert values(made, "upkeep_zombie_processes")[APP] == 0
    container.link.unlink()
    assert values(made, "upkeep_zombie_processes").keys() == {HOST}


def test_a_zombie_counts_once_it_is_old_enough(node: Node) -> None:
    made = collector(node, zombies_min_age=0.5)
    node.container("--zombies", "3", "--parents", "1")
    assert values(made, "upkeep_zombie_processes").keys() == {HOST}
    time.sleep(0.6)
    assert values(made, "upkeep_zombie_processes")[APP] == 3
    assert 0.5 < values(made, "upkeep_zombie_oldest_age_seconds")[APP] < 20


def test_slots_of_the_node_and_of_a_pod_with_a_limit(node: Node) -> None:
    made = collector(node)
    container = node.container("--zombies", "7", "--parents", "1")
    (container.cgroup.parent / "pids.max").write_text("100")
    assert values(made, "upkeep_pids_used")["shop", "web-0"] == 9
    limits = values(made, "upkeep_pids_limit")
    assert limits["shop", "web-0"] == 100
    assert limits["", ""] <= int(Path("/proc/sys/kernel/pid_max").read_text())
    assert 0 < values(made, "upkeep_pids_used")["", ""] < limits["", ""]
    (container.cgroup.parent / "pids.max").write_text("max")
    assert values(made, "upkeep_pids_limit").keys() == {("", "")}


def test_no_label_set_comes_twice_when_a_container_overlaps_its_successor(node: Node) -> None:
    made = collector(node)
    first = node.container("--zombies", "3", "--parents", "1")
    node.container("--zombies", "4", "--parents", "1", pod_uid=first.ref.pod_uid)
    samples = [
        tuple(sample.labels.values())
        for family in made.collect()
        for sample in family.samples
        if sample.name == "upkeep_zombie_processes"
    ]
    assert len(samples) == len(set(samples))
    assert values(made, "upkeep_zombie_processes")[APP] == 7


def test_the_age_counts_from_the_first_sight(node: Node) -> None:
    now = 100.0
    watch = ZombieWatch(
        PROCFS, LogFolders(node.rootfs), lambda: full_scan(PROCFS), clock=lambda: now
    )
    container = node.container("--zombies", "2", "--parents", "1")
    mine = {z.identity: z for z in watch.look().zombies if z.container == container.ref}
    assert {z.age for z in mine.values()} == {0.0}
    now = 130.0
    again = {z.identity: z for z in watch.look().zombies if z.container == container.ref}
    assert again.keys() == mine.keys()
    assert {z.age for z in again.values()} == {30.0}


def test_a_container_of_v1_keeps_its_zombies_when_their_parent_dies(node: Node) -> None:
    """They go to the first process, and still belong to the container they died in."""
    container = node.container("--zombies", "4", "--parents", "1", "--first", "never")
    made = collector(node)
    assert values(made, "upkeep_zombie_processes")[APP] == 4
    for parent in container.parents():
        os.kill(parent, 15)
    until(lambda: container.parents() == {container.first})
    assert values(made, "upkeep_zombie_processes")[APP] == 5, "the parent joined them"


UID, ID, OTHER = "0a1b2c3d-1111-2222-3333-444455556666", "c0ffee" * 10 + "beef", "a" * 64


def test_names_come_from_the_log_folders(tmp_path: Path) -> None:
    links, pods = tmp_path / "var/log/containers", tmp_path / "var/log/pods"
    links.mkdir(parents=True)
    folders = LogFolders(tmp_path)
    ref = ContainerRef(UID, ID)
    assert folders.names({ref}) == {ref: ContainerNames("", UID, ID)}
    (pods / f"shop_web-0_{UID}/app").mkdir(parents=True)
    assert folders.names({ref}) == {ref: ContainerNames("shop", "web-0", "app")}
    (pods / f"shop_web-0_{UID}/sidecar").mkdir()
    assert folders.names({ref}) == {ref: ContainerNames("shop", "web-0", ID)}
    (links / f"web-0_shop_my-app-{ID}.log").symlink_to("/nonexistent")
    (links / f"web-0_shop_sidecar-{OTHER}.log").symlink_to("/nonexistent")
    (links / "garbage").touch()
    assert folders.names({ref}) == {ref: ContainerNames("shop", "web-0", "my-app")}
    pause = ContainerRef(UID, "b" * 64)
    (pods / f"shop_web-0_{UID}/sidecar").rmdir()
    assert folders.names({pause})[pause].container == "b" * 64, "the pod's only container isn't it"


def test_the_report_names_parents_and_all_above_them(node: Node) -> None:
    made = collector(node)
    container = node.container("--zombies", "7", "--parents", "1", "--name", b"\x1b[31m".hex())
    (parent,) = container.parents()
    rows = [row for row in made.report().rows if row.cells["container"] == "app"]
    assert [row.cells["zombies"] for row in rows] == ["7"]
    assert rows[0].cells["parent"] == f"{parent} zombies"
    assert rows[0].data["ancestors"][1:3] == [
        f"{container.first} zombies",
        f"{container.shim.pid} containerd-shim",
    ]
