"""How long a tenant waits, from the release that gets stuck to the new pod: with what is shipped.

    python -m benchmarks.rollouts_budget

A real control plane, the exporter, Prometheus, Alertmanager and the remediator with the shipped
rules, route and intervals, and a service of one replica on a full node. Only the node is hollow:
its pods are Ready two tenths of a second after they are bound. It prints when what was seen, and
fails (exit code 1) where the whole took more than five minutes.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from deploy.local.observe import alerts, get_text, remediations
from deploy.local.stack import Settings, Stack
from tests.cluster.control_plane import control_plane
from tests.cluster.hollow import HollowNodes
from tests.rollouts.scene import Scene

LIMIT = 300.0
"""Seconds; Akash's provider closes a lease after eight minutes without its pods."""


def measure(scene: Scene, stack: Stack) -> float:
    """Print each moment as seconds since the release; the last one."""
    name = scene.run(scene.deployment(cpu="1"))
    (old,) = scene.pods(name)
    began = time.monotonic()
    scene.release(name)

    def alert(state: str) -> bool:
        listed = alerts(stack.url("prometheus"))
        return any(one.name == "UpkeepRolloutStuck" and one.state == state for one in listed)

    def records() -> list[str]:
        return [one.phase for one in remediations(stack.url("remediator"), stack.token)]

    def old_one_leaves() -> bool:
        uids = {p["metadata"]["uid"]: p["metadata"] for p in scene.pods(name)}
        return "deletionTimestamp" in uids.get(old["metadata"]["uid"], {"deletionTimestamp": ""})

    moments: list[tuple[str, Callable[[], bool]]] = [
        ("the new pod is unschedulable", lambda: bool(scene.wait_stuck(name))),
        (
            "the exporter has the series",
            lambda: "upkeep_rollout_unstickable{" in get_text(f"{stack.url('exporter')}/metrics"),
        ),
        ("the alert is pending", lambda: alert("pending") or alert("firing")),
        ("the alert fires", lambda: alert("firing")),
        ("the remediator has it", lambda: bool(records())),
        ("the old pod leaves", old_one_leaves),
        ("the new pod is available", lambda: scene.complete(name)),
        ("the remediation has succeeded", lambda: "Succeeded" in records()),
    ]
    for what, seen in moments:
        while not seen():
            if time.monotonic() - began > 2 * LIMIT:
                raise RuntimeError(f"not within {2 * LIMIT:g} s: {what}; {records()}")
            time.sleep(0.1)
        print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)
    return time.monotonic() - began


def main() -> int:
    """Measure once; 0 where it took no longer than `LIMIT`."""
    with (
        tempfile.TemporaryDirectory() as folder,
        control_plane(Path(folder)) as plane,
        HollowNodes(plane.kubeconfig) as nodes,
    ):
        kubeconfig = f"--kubeconfig={plane.kubeconfig}"
        collectors = ["--no-collector.certificates", "--no-collector.zombies"]
        settings = Settings(
            exporter=[*collectors, kubeconfig], remediator=[kubeconfig], enforce=True
        )
        scene = Scene(plane, nodes)
        scene.node(cpu="1500m")
        with Stack(Path(folder) / "stack", settings) as stack:
            took = measure(scene, stack)
    print(f"{'ok' if took <= LIMIT else 'MISSED'}: {took:.0f} s (limit {LIMIT:.0f} s)")
    return 0 if took <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
