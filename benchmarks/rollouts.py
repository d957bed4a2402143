"""How soon and how cheaply a large cluster is seen, measured against kubectl on the same cluster.

    python -m benchmarks.rollouts [--deployments 10000] [--nodes 500]

A real API server is filled with Deployments, a ReplicaSet each, three pods each, and nodes
(`benchmarks._rollouts_cluster`); then the exporter is timed, and before and after it
`kubectl get deployments,replicasets,pods,nodes -A -o json`. It prints the ratio of the two times,
and fails (exit code 1) where a limit is missed:

* ready in at most half the time that kubectl takes;
* peak resident memory under 250 MB;
* one scrape under 50 ms of CPU;
* a pod's change visible in the metric within 1 s.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks._rollouts_cluster import PODS_EACH, STUCK, Filler, app, namespace, pod_status
from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.ports import reserved_ports

MERGE = "application/merge-patch+json"


def time_kubectl(plane: ControlPlane) -> float:
    """Seconds kubectl takes to read the same objects."""
    began = time.monotonic()
    subprocess.run(
        [
            str(plane.binaries.kubectl),
            *("--kubeconfig", str(plane.kubeconfig)),
            *("get", "deployments,replicasets,pods,nodes", "-A", "-o", "json"),
        ],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.monotonic() - began


class Exporter:
    """The exporter as a process of its own, with the rollouts collector alone."""

    def __init__(self, plane: ControlPlane, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/metrics"
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "exporter", "--rollouts.selector="),
                *("--no-collector.certificates", "--no-collector.zombies"),
                *("--kubeconfig", str(plane.kubeconfig)),
                *("--web.listen-address", f"127.0.0.1:{port}"),
            ],
        )

    def scrape(self) -> str:
        with urllib.request.urlopen(self.url, timeout=30) as answer:  # noqa: S310 - our own
            text: str = answer.read().decode()
            return text

    def wait_for(self, text: str, seconds: float = 300) -> float:
        """Seconds since the call until a scrape has `text`."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if self.process.poll() is not None:
                raise RuntimeError("the exporter ended")
            try:
                if text in self.scrape():
                    return time.monotonic() - began
            except OSError:
                pass
            time.sleep(0.02)
        raise RuntimeError(f"no {text!r} within {seconds} s")

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_megabytes(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024


@contextmanager
def exporter(plane: ControlPlane) -> Iterator[Exporter]:
    """An exporter, ended with the block."""
    with reserved_ports(1) as (port,):
        running = Exporter(plane, port)
        try:
            yield running
        finally:
            running.process.terminate()
            running.process.wait(30)


def measure(plane: ControlPlane) -> bool:
    """Print every figure beside its limit; whether all are kept."""
    kubectl = [time_kubectl(plane)]
    print(f"kubectl get … -A -o json: {kubectl[0]:.1f} s", flush=True)
    with exporter(plane) as running:
        running.wait_for("upkeep_rollout_view_age_seconds")
        ready = time.monotonic() - running.began
        running.wait_for("upkeep_rollout_unstickable{", 30)
        stuck = running.scrape().count("upkeep_rollout_stuck_seconds{")
        if stuck != STUCK:
            raise RuntimeError(f"{STUCK} rollouts are stuck, and {stuck} are seen")
        scrapes = 40
        before = running.cpu_seconds()
        for _ in range(scrapes):
            running.scrape()
        scrape = (running.cpu_seconds() - before) / scrapes
        path = f"/api/v1/namespaces/{namespace(0)}/pods/{app(0)}-2-0/status"
        placed: dict[str, Any] = {"status": {"conditions": []}}
        series = f'deployment="{app(0)}",namespace="{namespace(0)}",reason='
        plane.api.request("PATCH", path, placed, content_type=MERGE)
        while series in running.scrape():
            time.sleep(0.02)
        plane.api.request("PATCH", path, {"status": pod_status("")}, content_type=MERGE)
        visible = running.wait_for(series, 30)
        peak = running.peak_megabytes()
    kubectl.append(time_kubectl(plane))
    reference = sum(kubectl) / len(kubectl)
    rows = [
        ("ready, of kubectl's time", ready / reference, 0.5, f"{ready:.1f} of {reference:.1f} s"),
        ("peak resident memory", peak, 250, "MB"),
        ("CPU of one scrape", scrape * 1000, 50, f"ms, with {stuck} stuck rollouts"),
        ("a pod's change is visible after", visible, 1, "s"),
    ]
    for what, value, limit, unit in rows:
        verdict = "ok" if value <= limit else "MISSED"
        print(f"{verdict:7} {what}: {value:.2f} (limit {limit}) {unit}")
    return all(value <= limit for _, value, limit, _ in rows)


def main() -> int:
    """Fill, measure, say; 0 where every limit is kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollouts")
    parser.add_argument("--deployments", type=int, default=10_000)
    parser.add_argument("--nodes", type=int, default=500)
    chosen = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    memory = Path("/dev/shm")  # noqa: S108 - etcd's fsyncs are not what is measured
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
        control_plane(Path(folder)) as plane,
    ):
        plane.stop("kube-controller-manager")  # they would tidy up what is written here
        plane.stop("kube-scheduler")
        print(f"writing {chosen.deployments} Deployments with {PODS_EACH} pods each …", flush=True)
        began = time.monotonic()
        Filler(plane, chosen.nodes).fill(chosen.deployments)
        print(f"… done after {time.monotonic() - began:.0f} s", flush=True)
        return 0 if measure(plane) else 1


if __name__ == "__main__":
    sys.exit(main())
