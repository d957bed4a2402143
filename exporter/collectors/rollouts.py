"""Stuck rollouts as metrics: the check's findings on a view that watches keep up to date."""

import os
import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric

from exporter.checks.freeing import Limits, Refusal, plan_freeing
from exporter.checks.rollouts import Stuck, examine
from exporter.checks.view import ClusterView
from exporter.config import Config
from exporter.kubernetes import client, find_kubeconfig, in_cluster
from exporter.kubernetes.cache import TOO_OLD, Cache
from exporter.kubernetes.watched import watched
from exporter.logs import get_logger

log = get_logger("exporter.rollouts")


class ViewError(OSError):
    """The view of the cluster can't be trusted now; the sentence says why."""


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
    ) -> None:
        self._now = now
        self._said: dict[str, str] = {}
        self._cache: Cache | None = None
        if find_kubeconfig(config.kubeconfig, environ) is None and not in_cluster(environ):
            log.info("no kubeconfig: rollouts are not looked at on this node")
            return
        view = ClusterView()
        api = client(config.kubeconfig, environ)
        self._cache = Cache(api, view, watched(view, config.rollouts_selector))

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
        age, problem = self._cache.age(), self._cache.problem()
        if age is None:
            raise ViewError(f"the view of the cluster is not complete: {problem}")
        if age > TOO_OLD:
            raise ViewError(f"the view of the cluster is {age:.0f} s old: {problem or 'no news'}")
        with self._cache.lock:
            return [_age(age), *self._findings(self._cache.view)]

    def _findings(self, view: ClusterView) -> list[Metric]:
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
        now, said = self._now(), {}
        for deployment in view.suspects():
            found = examine(view, deployment, now)
            if not isinstance(found, Stuck):
                continue
            name = [deployment.namespace, deployment.name]
            stuck_seconds.add_metric([*name, found.cause.value], max(0.0, now - found.since))
            plan = plan_freeing(view, found, Limits(), now)
            if not isinstance(plan, Refusal):
                unstickable.add_metric(name, 1)
                said[deployment.key] = "freeing old pods makes room"
            else:
                said[deployment.key] = plan.message
                if plan.known:
                    unstickable.add_metric(name, 0)
        self._say(said)
        return [stuck_seconds, unstickable]

    def _say(self, said: dict[str, str]) -> None:
        """Log a finding when it appears or changes, not at every scrape."""
        for key, why in said.items():
            if self._said.get(key) != why:
                log.info("a rollout is stuck", deployment=key, why=why)
        for key in self._said.keys() - said.keys():
            log.info("the rollout is no longer stuck", deployment=key)
        self._said = said


def _age(age: float) -> Metric:
    family = GaugeMetricFamily(
        "upkeep_rollout_view_age_seconds",
        "How long ago the view of the cluster was last known to be current.",
    )
    family.add_metric([], max(0.0, age))
    return family
