"""Zombies by container, and how many process slots are left, as metric families."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from exporter.checks.cgroups import CgroupError, CgroupTree, ContainerRef
from exporter.checks.containers import ContainerNames, LogFolders
from exporter.checks.procfs import Procfs
from exporter.checks.zombies import Look, ZombieWatch, ancestors
from exporter.checks.zombies_scan import CheapScan, ProvenScan
from exporter.config import Config
from exporter.logs import get_logger
from exporter.report import Report, Row

log = get_logger("exporter.collectors.zombies")

_HOST = ContainerNames("", "", "")
_MANY = 5  # from here on the alert calls for the fix


class _Count(NamedTuple):
    zombies: int = 0
    oldest: float = 0.0

    def plus(self, age: float) -> "_Count":
        return _Count(self.zombies + 1, max(self.oldest, age))


class ZombiesCollector:
    """Publishes what a `ZombieWatch` sees.

    A container's series stay from its first zombie of age until the container is gone.
    """

    def __init__(self, config: Config) -> None:
        self._node = config.node_name
        self._min_age = config.zombies_min_age
        self._procfs = Procfs(config.procfs)
        self._cgroups: CgroupTree | None = None
        try:
            self._cgroups = CgroupTree(config.cgroupfs)
        except CgroupError as error:
            log.warning("every process is read at each scrape", why=str(error))
        cheap = None if self._cgroups is None else CheapScan(self._procfs, self._cgroups)
        self._scan = ProvenScan(self._procfs, cheap)
        self._folders = LogFolders(config.rootfs)
        self._watch = ZombieWatch(self._procfs, self._folders, self._scan)
        self._shown: dict[ContainerRef, ContainerNames] = {}

    async def start(self) -> None:
        """Nothing runs between scrapes."""

    async def aclose(self) -> None:
        """Nothing to end."""

    def collect(self) -> Iterable[Metric]:
        """`ProcfsError` where the processes can't be seen, which fails this collector alone."""
        look = self._watch.look()
        counts: dict[ContainerRef | None, _Count] = {None: _Count()}
        for zombie in look.zombies:
            if zombie.age >= self._min_age:
                count = counts.get(zombie.container, _Count())
                counts[zombie.container] = count.plus(zombie.age)
        self._keep_track({ref for ref in counts if ref is not None}, look)
        yield from self._zombies(counts)
        yield from self._pids()
        yield from self._health(look)

    def _keep_track(self, counted: set[ContainerRef], look: Look) -> None:
        """Remember the containers to show: those with zombies, and earlier ones not gone yet."""
        there: set[str] = set()
        if self._shown.keys() - counted:
            if self._cgroups is None:
                there = self._folders.container_ids()
            else:
                if not self._scan.cheap:
                    self._cgroups.refresh()
                there = self._cgroups.container_ids()
        kept = {ref: names for ref, names in self._shown.items() if ref.container_id in there}
        self._shown = kept | {ref: look.names[ref] for ref in counted}

    def _zombies(self, counts: Mapping[ContainerRef | None, _Count]) -> Iterator[Metric]:
        merged: dict[ContainerNames, _Count] = {_HOST: counts[None]}
        for ref, names in self._shown.items():
            # A container and its successor may overlap for a moment: one name, one series.
            count, other = counts.get(ref, _Count()), merged.get(names, _Count())
            merged[names] = _Count(count.zombies + other.zombies, max(count.oldest, other.oldest))
        labels = ["node", "namespace", "pod", "container"]
        zombies = GaugeMetricFamily(
            "upkeep_zombie_processes",
            "Zombies older than the age threshold in a container (empty labels: the host itself).",
            labels=labels,
        )
        oldest = GaugeMetricFamily(
            "upkeep_zombie_oldest_age_seconds",
            "How long the oldest of these zombies has been seen as one.",
            labels=labels,
        )
        for names, count in merged.items():
            zombies.add_metric([self._node, *names], count.zombies)
            oldest.add_metric([self._node, *names], count.oldest)
        yield zombies
        yield oldest

    def _pids(self) -> Iterator[Metric]:
        labels = ["node", "namespace", "pod"]
        used = GaugeMetricFamily(
            "upkeep_pids_used",
            "Process slots taken: of the node, and of pods with a limit and zombies.",
            labels=labels,
        )
        limit = GaugeMetricFamily(
            "upkeep_pids_limit", "Process slots there are: the limit that binds.", labels=labels
        )
        used.add_metric([self._node, "", ""], self._procfs.load().tasks)
        limit.add_metric([self._node, "", ""], self._procfs.task_limit())
        if self._shown and self._cgroups is not None:
            cgroups = self._cgroups.pods()
            pods = {(n.namespace, n.pod): ref.pod_uid for ref, n in self._shown.items()}
            for (namespace, pod), uid in pods.items():
                pids = self._cgroups.pids(cgroups[uid]) if uid in cgroups else None
                if pids is not None:
                    used.add_metric([self._node, namespace, pod], pids[0])
                    limit.add_metric([self._node, namespace, pod], pids[1])
        yield used
        yield limit

    def _health(self, look: Look) -> Iterator[Metric]:
        unreadable = GaugeMetricFamily(
            "upkeep_zombie_unreadable_processes",
            "Processes of which it can't be known whether they are zombies.",
            labels=["node"],
        )
        unreadable.add_metric([self._node], look.unreadable)
        yield unreadable
        fallbacks = CounterMetricFamily(
            "upkeep_zombie_scan_fallbacks",
            "Times the reading of every process took the place of the cheap scan, by reason.",
            labels=["node", "reason"],
        )
        for reason, count in self._scan.fallbacks.items():
            fallbacks.add_metric([self._node, reason], count)
        yield fallbacks

    def report(self) -> Report:
        """Every zombie there is now, transient ones included, by container and parent."""
        look = self._watch.look()
        groups: dict[tuple[ContainerNames, int], int] = {}
        for zombie in look.zombies:
            names = _HOST if zombie.container is None else look.names[zombie.container]
            groups[names, zombie.parent] = groups.get((names, zombie.parent), 0) + 1
        used, limit = self._procfs.load().tasks, self._procfs.task_limit()
        notes = [f"{used} of {limit} process slots of the node are taken."]
        if look.unreadable:
            notes.append(f"{look.unreadable} processes can't be read; run as root.")
        return Report(
            columns=("zombies", "namespace", "pod", "container", "parent", "ancestors"),
            rows=tuple(
                self._row(names, parent, count)
                for (names, parent), count in sorted(groups.items(), key=lambda g: -g[1])
            ),
            notes=tuple(notes),
            nothing="no zombies",
        )

    def _row(self, names: ContainerNames, parent: int, count: int) -> Row:
        chain = ancestors(self._procfs, parent)
        comms = [stat.comm.decode("utf-8", "backslashreplace") for stat in chain]
        above = [f"{stat.pid} {comm}" for stat, comm in zip(chain, comms, strict=True)]
        place = names if names != _HOST else ContainerNames("", "", "(host)")
        return Row(
            cells={
                "zombies": str(count),
                **place._asdict(),
                "parent": above[0] if above else str(parent),
                "ancestors": " < ".join(above[1:]),
            },
            data={"zombies": count, **names._asdict(), "ancestors": above},
            level="bad" if count >= _MANY else "warning",
        )
