"""The collectors, in one visible table: findings of a check become metric families.

A collector only translates. What "broken" means stands in `exporter.checks`, so that the
remediator's re-check can't disagree with the metric that called for it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from prometheus_client.core import Metric

from exporter.config import Config


class PartlyKnownError(OSError):
    """A collector failed, yet knows something worth a series, such as how old its data is.

    `known` is given in the scrape as it is; `upkeep_scrape_collector_success` is 0 all the same.
    """

    def __init__(self, message: str, known: Sequence[Metric] = ()) -> None:
        super().__init__(message)
        self.known = known


class Collector(Protocol):
    """One condition's metrics."""

    async def start(self) -> None:
        """Begin what must run between scrapes (a watch); returns at once."""

    def collect(self) -> Iterable[Metric]:
        """The families of one scrape.

        Called in a worker thread of its own, never twice at a time. An exception fails this
        collector alone: its families (but `PartlyKnownError.known`) are left out and
        `upkeep_scrape_collector_success` is 0.
        """

    async def aclose(self) -> None:
        """End what `start` began."""


# Imports stay inside: an unused collector costs nothing, and the Kubernetes client costs 50 MB.
def _certificates(config: Config) -> Collector:
    from exporter.collectors.certificates import CertificatesCollector

    return CertificatesCollector(config)


def _zombies(config: Config) -> Collector:
    from exporter.collectors.zombies import ZombiesCollector

    return ZombiesCollector(config)


def _rollouts(config: Config) -> Collector:
    from exporter.collectors.rollouts import RolloutsCollector

    return RolloutsCollector(config)


COLLECTORS: Mapping[str, Callable[[Config], Collector]] = {
    "certificates": _certificates,
    "zombies": _zombies,
    "rollouts": _rollouts,
}
