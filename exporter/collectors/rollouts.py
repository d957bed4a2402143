"""Stuck rollouts as metrics: the check's findings on a view that watches keep up to date."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric

from exporter.checks.freeing import Freeing, Limits, Refusal, plan_freeing
from exporter.checks.rollouts import Stuck, examine
from exporter.checks.view import ClusterView
from exporter.collectors import PartlyKnownError
from exporter.config import Config
from exporter.kubernetes import client, has_access
from exporter.kubernetes.cache import TOO_OLD, WATCH_SECONDS, Cache
from exporter.kubernetes.watched import watched
from exporter.logs import get_logger
from exporter.report import Report, Row

log = get_logger("exporter.rollouts")

_PATIENCE = 120.0  # seconds that --check waits for a large cluster
_ENOUGH = 3.0  # seconds of one and the same failure after which it stops waiting


class ViewError(PartlyKnownError):
    """The view of the cluster can't be trusted now; the sentence says why.

    The view's age is known all the same, from the first complete view on.
    """


class RolloutsCollector:
    """`upkeep_rollout_stuck_seconds`, `upkeep_rollout_unstickable` and the age of the view.

    Without a way to reach an API it has nothing to say, which is no failure: most nodes have none.
    """

    def __init__(
        self,
        config: Config,
        *,
        environ: Mapping[str, str] = os.environ,
        now: Callable[[], float] = time.time,
        too_old: float = TOO_OLD,
        watch_seconds: float = WATCH_SECONDS,
    ) -> None:
        self._now = now
        self._too_old = too_old
        self._said: dict[str, str] = {}
        self._cache: Cache | None = None
        if not has_access(config.kubeconfig, environ):
            log.info("no kubeconfig: rollouts are not looked at on this node")
            return
        view = ClusterView()
        api = client(config.kubeconfig, environ)
        resources = watched(view, config.rollouts_selector)
        self._cache = Cache(api, view, resources, watch_seconds=watch_seconds)

    async def start(self) -> None:
        if self._cache is not None:
            await self._cache.start()

    async def aclose(self) -> None:
        if self._cache is not None:
            await self._cache.aclose()

    def collect(self) -> Iterable[Metric]:
        """`ViewError` while the view is incomplete or too old: no series beats a stale one."""
        if self._cache is None:
            return []
        age, now = self._current(self._cache), self._now()
        with self._cache.lock:
            found = _find(self._cache.view, now)
            others = _other_workloads(self._cache.view, now)
        self._say({one.deployment.key: _why(plan) for one, plan in found})
        return [_age(age), *_families(found, now), others]

    def report(self) -> Report:
        """The findings for people; waits until the view is complete. `ViewError` if it can't be."""
        columns = ("namespace", "deployment", "reason", "stuck for", "what could be done")
        if self._cache is None:
            return Report(columns=columns, rows=(), nothing="no kubeconfig: give --kubeconfig FILE")
        ends = time.monotonic() + _PATIENCE
        while True:
            try:
                self._current(self._cache)
                break
            except ViewError:
                # A reason that is still there after a few tries is worth more than waiting.
                if time.monotonic() > ends or self._cache.failed_for() > _ENOUGH:
                    raise
            time.sleep(0.1)
        now = self._now()
        with self._cache.lock:
            found = _find(self._cache.view, now)
        return Report(
            columns=columns,
            rows=tuple(_row(columns, stuck, plan, now) for stuck, plan in found),
            nothing="no rollout is stuck",
        )

    def _current(self, cache: Cache) -> float:
        """The view's age in seconds; `ViewError` where it is of no use."""
        age, problem = cache.age(), cache.problem()
        if age is None:
            raise ViewError(problem)
        if age > self._too_old:
            # The age itself is a series; in the sentence it would be news at every scrape.
            raise ViewError(
                f"the view of the cluster is more than {self._too_old:g} s old: "
                f"{problem or 'no news'}",
                [_age(age)],
            )
        return age

    def _say(self, said: dict[str, str]) -> None:
        """Log a finding when it appears or changes, not at every scrape."""
        for key, why in said.items():
            if self._said.get(key) != why:
                log.info("a rollout is stuck", deployment=key, why=why)
        for key in self._said.keys() - said.keys():
            log.info("the rollout is no longer stuck", deployment=key)
        self._said = said


def _find(view: ClusterView, now: float) -> list[tuple[Stuck, Freeing | Refusal]]:
    """Every stuck Deployment of the view, with what could be done."""
    judged = (examine(view, deployment, now) for deployment in view.suspects())
    return [
        (stuck, plan_freeing(view, stuck, Limits(), now))
        for stuck in judged
        if isinstance(stuck, Stuck)
    ]


def _families(found: list[tuple[Stuck, Freeing | Refusal]], now: float) -> list[Metric]:
    stuck_seconds = GaugeMetricFamily(
        "upkeep_rollout_stuck_seconds",
        "Seconds since the newest ReplicaSet of a Deployment that is stuck stopped moving.",
        labels=["namespace", "deployment", "reason"],
    )
    unstickable = GaugeMetricFamily(
        "upkeep_rollout_unstickable",
        "1 where freeing old pods would let the new one run, 0 where not; "
        "absent where it can't be known.",
        labels=["namespace", "deployment"],
    )
    for stuck, plan in found:
        name = [stuck.deployment.namespace, stuck.deployment.name]
        stuck_seconds.add_metric([*name, stuck.cause.value], max(0.0, now - stuck.since))
        if isinstance(plan, Freeing):
            unstickable.add_metric(name, 1)
        elif plan.known:
            unstickable.add_metric(name, 0)
    return [stuck_seconds, unstickable]


def _why(plan: Freeing | Refusal) -> str:
    return plan.message if isinstance(plan, Refusal) else "freeing old pods makes room"


def _row(columns: Sequence[str], stuck: Stuck, plan: Freeing | Refusal, now: float) -> Row:
    seconds = max(0.0, now - stuck.since)
    namespace, name = stuck.deployment.namespace, stuck.deployment.name
    cells = (namespace, name, stuck.cause.value, f"{seconds:.0f} s", _why(plan))
    freeable = isinstance(plan, Freeing)
    known = isinstance(plan, Freeing) or plan.known
    return Row(
        cells=dict(zip(columns, cells, strict=True)),
        data={
            "namespace": namespace,
            "deployment": name,
            "reason": stuck.cause.value,
            "stuck_seconds": seconds,
            "unstickable": freeable if known else None,
            "why": _why(plan),
            "message": stuck.message,
        },
        level="warning" if freeable else "bad",
    )


def _other_workloads(view: ClusterView, now: float) -> Metric:
    """StatefulSets and DaemonSets whose pods find no node: reported, never acted on."""
    family = GaugeMetricFamily(
        "upkeep_workload_unschedulable_seconds",
        "Seconds since the first pod of a StatefulSet or DaemonSet found no node.",
        labels=["namespace", "kind", "workload"],
    )
    since: dict[tuple[str, str, str], float] = {}
    for pod in view.waiting():
        if pod.owner_kind in {"StatefulSet", "DaemonSet"} and pod.unschedulable is not None:
            key = (pod.namespace, pod.owner_kind, pod.owner_name)
            since[key] = min(since.get(key, now), pod.unschedulable.since)
    for labels, began in sorted(since.items()):
        family.add_metric(labels, max(0.0, now - began))
    return family


def _age(age: float) -> Metric:
    family = GaugeMetricFamily(
        "upkeep_rollout_view_age_seconds",
        "How long ago the view of the cluster was last known to be current.",
    )
    family.add_metric([], max(0.0, age))
    return family
