"""The fixes there are, by name. Adding one is a line here.

Each module is imported when its fix is wanted: what one of them needs costs the others nothing.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from remediator.model import Fix


class Edges(msgspec.Struct, frozen=True, kw_only=True):
    """What a fix touches of the world; tests give other roots."""

    node_name: str
    rootfs: Path = Path("/")
    procfs: Path = Path("/proc")
    cgroupfs: Path = Path("/sys/fs/cgroup")
    kubeconfig: Path | None = None
    """None: no API server is asked but with in-cluster credentials."""


class Entry(msgspec.Struct, frozen=True):
    """How to read a fix's settings, and how to make it of them."""

    settings: Callable[[], type[msgspec.Struct]]
    make: Callable[[Any, Edges], Fix]
    on_node: bool
    """Whether it acts on the host it runs on; otherwise it acts through the API server."""


def _certificate_settings() -> type[msgspec.Struct]:
    from remediator.fixes.certificates import Settings

    return Settings


def _certificates(settings: Any, edges: Edges) -> Fix:
    from remediator.fixes.certificates import RotateCertificates

    return RotateCertificates(
        settings, node_name=edges.node_name, rootfs=edges.rootfs, procfs=edges.procfs
    )


def _zombie_settings() -> type[msgspec.Struct]:
    from remediator.fixes.zombies import Settings

    return Settings


def _zombies(settings: Any, edges: Edges) -> Fix:
    from exporter.kubernetes import client
    from remediator.fixes.zombies import ReapZombies
    from remediator.fixes.zombies.cluster_facts import ClusterFacts

    return ReapZombies(
        settings,
        procfs=edges.procfs,
        rootfs=edges.rootfs,
        cgroupfs=edges.cgroupfs,
        facts=ClusterFacts(lambda: client(edges.kubeconfig)),
    )


def _rollout_settings() -> type[msgspec.Struct]:
    from remediator.fixes.rollouts import Settings

    return Settings


def _rollouts(settings: Any, edges: Edges) -> Fix:
    from exporter.kubernetes import client
    from remediator.fixes.rollouts import UnstickRollout

    return UnstickRollout(settings, lambda: client(edges.kubeconfig))


FIXES: Mapping[str, Entry] = {
    "rotate-certificates": Entry(_certificate_settings, _certificates, on_node=True),
    "reap-zombies": Entry(_zombie_settings, _zombies, on_node=True),
    "unstick-rollout": Entry(_rollout_settings, _rollouts, on_node=False),
}


def settings_types(fixes: Mapping[str, Entry] = FIXES) -> dict[str, type[msgspec.Struct]]:
    """The settings struct of each fix, for reading the configuration."""
    return {name: entry.settings() for name, entry in fixes.items()}
