"""`make demo`: breaks three real things in a throwaway cluster and shows how they heal.

A real kubeadm cluster of one node comes up in namespaces of its own. A pod floods its container
with zombies, a Deployment gets stuck for lack of cpu, and the certificates are signed again, to end
in three days. What follows is Upkeep's own: exporter, Prometheus, Alertmanager, remediator. At the
end everything is taken away; status 0 only if all three healed, seen with other eyes than Upkeep's.
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import FrameType

from deploy.local.debian import DebianError
from deploy.local.events import Events
from deploy.local.node_stack import MIN_AGE, PATIENCE, node_settings
from deploy.local.observe import UnreachableError, remediation
from deploy.local.processes import StartError
from deploy.local.screen import Screen
from deploy.local.stack import Stack
from deploy.local.story import Course, table
from tests.cluster.conditions import (
    StuckDeployment,
    ZombiePod,
    expire_certificates,
    stuck_deployment,
    zombie_maker,
    zombie_pod,
)
from tests.cluster.kubeadm import KubeadmCluster, kubeadm_cluster
from tests.cluster.kubernetes_build import BuildError
from tests.cluster.node import NodeError
from tests.cluster.pki import read_certificates
from tests.cluster.zombie_makers import descendants

LEFT = timedelta(days=3)
ZOMBIES = 60
PATIENT_SECONDS = 900
"""How long healing may take before the demo gives up."""


def main() -> int:
    """Run it; the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    if os.geteuid() != 0:
        print("the demo makes a cluster in namespaces of its own: run it as root", file=sys.stderr)
        return 1
    began = time.monotonic()

    def progress(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)

    try:
        with tempfile.TemporaryDirectory(prefix="upkeep-demo-") as folder:
            status = _demo(Path(folder), progress)
            progress("taken away: cluster, containers, processes, files")
            return status
    except KeyboardInterrupt:
        progress("stopped; everything is taken away")
        return 130
    except (NodeError, StartError, DebianError, BuildError) as error:
        print(f"the demo can't go on: {error}", file=sys.stderr)
        return 1


def _demo(folder: Path, progress: Callable[[str], None]) -> int:
    with ExitStack() as scene:
        progress("making a real kubeadm cluster of one node, in namespaces of its own")
        cluster = scene.enter_context(kubeadm_cluster(folder, progress=progress))
        settings = node_settings(cluster)
        stack = scene.enter_context(Stack(folder / "stack", settings, progress=progress))
        progress("for the demo the waits are short: " + PATIENCE.sentence())
        progress(f"and a zombie or a stuck rollout counts after {MIN_AGE:g} s")
        certificates = Course(
            "certificates", "rotate-certificates", f"every leaf ends in {LEFT.days} days"
        )
        zombies = Course("zombies", "reap-zombies", f"{ZOMBIES} zombies in one container")
        rollout = Course("rollout", "unstick-rollout", "a new pod waits for its own old one's cpu")
        progress(f"breaking zombies: {zombies.what}")
        pod = scene.enter_context(zombie_pod(cluster, zombie_maker("parent", ZOMBIES, parents=3)))
        zombies.broken = time.monotonic()
        progress(f"breaking a rollout: {rollout.what}")
        stuck = scene.enter_context(stuck_deployment(cluster, "cpu"))
        rollout.broken = time.monotonic()
        progress(f"Kubernetes says: {stuck.message}")
        progress(f"breaking certificates: {certificates.what}")
        expire_certificates(cluster, cluster.nodes[0], LEFT, restart=False)
        certificates.broken = time.monotonic()
        courses = [certificates, zombies, rollout]
        healed = _watch(stack, courses)
        _tell(stack, courses)
        seen = [
            _certificates_healed(cluster),
            _zombies_healed(pod),
            _rollout_healed(cluster, stuck),
        ]
        print("\nSeen with other eyes than Upkeep's:")
        for good, sentence in seen:
            print(f"  {'yes' if good else 'NO '}  {sentence}")
        progress("taking everything away")
        return 0 if healed and all(good for good, _ in seen) else 1


def _watch(stack: Stack, courses: Sequence[Course]) -> bool:
    """Show the table until all are done; False where one isn't in time."""
    events = Events(stack.url("prometheus"), stack.url("remediator"), stack.token)
    screen = Screen()
    deadline = time.monotonic() + PATIENT_SECONDS
    while not all(course.done for course in courses):
        if dead := stack.dead():
            raise StartError(dead[0].last_words("ended by itself"))
        if time.monotonic() > deadline:
            screen.end()
            print(f"not all healed within {PATIENT_SECONDS} s")
            return False
        try:
            for event in events.new():
                now = time.monotonic()
                for course in courses:
                    course.see(event, now)
                screen.line(f"{event.kind:<9} {event.text}")
        except UnreachableError as error:
            screen.line(str(error))
        screen.show(_picture(courses))
        time.sleep(1)
    screen.end()
    return True


def _picture(courses: Sequence[Course]) -> list[str]:
    now = time.monotonic()
    said = [f"{c.condition}: {c.decision}" for c in courses if c.decision]
    return ["", *table([course.row(now) for course in courses]), "", *said]


def _tell(stack: Stack, courses: Sequence[Course]) -> None:
    print("\nWhat was done:")
    for course in courses:
        print(f"\n  {course.condition} ({course.fix}): {course.what}")
        if course.record:
            for step in remediation(stack.url("remediator"), course.record, stack.token).steps:
                print(f"    - {step}")
        print(f"    = {course.decision}")


def _certificates_healed(cluster: KubeadmCluster) -> tuple[bool, str]:
    found = read_certificates(cluster.nodes[0].root / "etc/kubernetes")
    leaves = {name: c for name, c in found.items() if not name.endswith("ca")}
    leaves.pop("kubelet.conf", None)  # the kubelet renews its own
    first = min(leaves, key=lambda name: leaves[name].not_valid_after_utc)
    ends = leaves[first].not_valid_after_utc
    ready = cluster.kubectl("get", "--raw=/readyz", check=False) == "ok"
    good = ready and ends.timestamp() - time.time() > timedelta(days=300).total_seconds()
    return good, (
        f"of {len(leaves)} certificates {first} ends first, on {ends:%Y-%m-%d}; "
        f"the API server is {'ready' if ready else 'NOT ready'}"
    )


def _zombies_healed(pod: ZombiePod) -> tuple[bool, str]:
    left = sum(process.is_zombie for process in descendants(pod.pid))
    return left == 0, f"{left} zombies below the container's PID 1, which is still the same"


def _rollout_healed(cluster: KubeadmCluster, stuck: StuckDeployment) -> tuple[bool, str]:
    found = cluster.get(f"deployment/{stuck.name}", f"--namespace={stuck.namespace}")
    status, wanted = found["status"], found["spec"]["replicas"]
    updated, available = status.get("updatedReplicas", 0), status.get("availableReplicas", 0)
    good = updated == available == wanted == status.get("replicas")
    return good, f"{available} of {wanted} pods available, {updated} of the new release"


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # one is enough: cleaning up has begun
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
