"""`python -m tests.cluster up|down`: a real kubeadm cluster to try things on, and its end.

`up` leaves it running and prints `KUBECONFIG=…` as its last line; `down` removes every cluster
that `up` made, or the ones named, and what crashed ones left.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from deploy.local.cache import cache_directory, print_progress
from deploy.local.debian import DebianError
from tests.cluster import lifetime
from tests.cluster.kubeadm import create_cluster, find_clusters
from tests.cluster.kubernetes_build import BuildError
from tests.cluster.node import NodeError


def main(arguments: list[str]) -> int:
    """Run one of the two commands; 1 with a sentence on stderr if it fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("command", choices=["up", "down"])
    parser.add_argument("names", nargs="*", help="clusters to remove (default: all)")
    options = parser.parse_args(arguments)
    if os.geteuid() != 0:
        print("a cluster needs namespaces, cgroups and mounts: run it as root", file=sys.stderr)
        return 1
    try:
        return up() if options.command == "up" else down(options.names)
    except (NodeError, DebianError, BuildError) as error:
        print(error, file=sys.stderr)
        return 1


def up() -> int:
    """Make a cluster that outlives this process."""
    start = time.monotonic()

    def progress(message: str) -> None:
        print_progress(f"{time.monotonic() - start:5.0f} s  {message}")

    cluster = create_cluster(_home(), detached=True, progress=progress)
    node = cluster.nodes[0]
    print(cluster.kubectl("get", "nodes", "--output=wide"), end="")
    print(f"kubectl is {cluster.binaries.kubectl}; logs are in {node.logs}")
    print(f"a shell on the node: cd {Path.cwd()} && {' '.join(node.command(['bash'], cwd='/'))}")
    print(f"KUBECONFIG={cluster.kubeconfig}")
    return 0


def down(names: list[str]) -> int:
    """Remove what `up` made: the clusters of these names, or all."""
    clusters = {cluster.name: cluster for cluster in find_clusters()}
    if unknown := sorted(set(names) - set(clusters)):
        print(f"no cluster {', '.join(unknown)} runs; there are: {', '.join(clusters) or 'none'}")
        return 1
    for name in names or clusters:
        clusters[name].remove()
        print_progress(f"removed {name}")
    for name in lifetime.sweep():
        print_progress(f"removed {name}, which a crashed run left")
    with suppress(OSError):  # not there, or another one's
        _home().rmdir()
    return 0


def _home() -> Path:
    return cache_directory() / "clusters"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
