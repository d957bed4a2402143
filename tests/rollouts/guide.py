"""The operator's guide has a script for stuck rollouts. What it breaks, beside what Upkeep does.

    python -m tests.rollouts.guide

runs both on the same cases, on a real control plane, and prints the table of
docs/rollouts-guide-script.md. The script is the guide's own, word for word.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.local.debian import unpack
from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.hollow import HollowNodes
from tests.rollouts.scene import Scene, uids

SCRIPT = r"""
kubectl get deployment -l akash.network/manifest-service -A -o=jsonpath='{range .items[*]}{.metadata.namespace} {.metadata.name}{"\n"}{end}' |
while read ns app; do
kubectl -n $ns rollout status --timeout=10s deployment/${app} >/dev/null 2>&1
rc=$?
if [[ $rc -ne 0 ]]; then
if kubectl -n $ns describe pods | grep -q "Insufficient"; then
OLD="$(kubectl -n $ns get replicaset -o json -l akash.network/manifest-service --sort-by='{.metadata.creationTimestamp}' | jq -r '(.items | reverse)[1:][] | .metadata.name')"
for i in $OLD; do kubectl -n $ns delete replicaset $i; done
fi
fi
done
"""  # noqa: E501 - not ours to fold


def run_script(scene: Scene, folder: Path) -> None:
    """The guide's script, as cron would run it."""
    unpacked = unpack("jq", "libjq1", "libonig5")
    libraries = sorted({str(path.parent) for path in unpacked.rglob("*.so*")})
    (folder / "kubectl").unlink(missing_ok=True)
    (folder / "kubectl").symlink_to(scene.plane.binaries.kubectl)
    environment = {
        "PATH": f"{folder}:{unpacked / 'usr/bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(libraries),
        "KUBECONFIG": str(scene.plane.kubeconfig),
        "HOME": str(folder),
    }
    subprocess.run(["bash", "-c", SCRIPT], env=environment, check=True, stdout=subprocess.DEVNULL)


def run_upkeep(scene: Scene, _folder: Path) -> None:
    """The fix, once for each Deployment that is stuck, as the alerts would ask for."""
    listed = scene.api.request("GET", f"{scene.space('apps/v1')}/deployments")

    async def all_of_them() -> None:
        for one in listed["items"]:
            fix = scene.fix(most_restarts=1, settle=3.0)
            await scene.unstick(one["metadata"]["name"], fix)

    asyncio.run(all_of_them())


def later(scene: Scene, **change: str) -> None:
    """Release: not within the second of creation, which the script's sort couldn't tell apart."""
    time.sleep(2)
    scene.release("web", **change)


def alone(scene: Scene) -> None:
    scene.node(cpu="1500m")
    scene.run(scene.deployment("web", cpu="1"))
    later(scene)


def three(scene: Scene) -> None:
    scene.node(cpu="3500m")
    scene.run(scene.deployment("web", cpu="1", replicas=3))
    later(scene)


def neighbour(scene: Scene) -> None:
    scene.node(cpu="2500m")
    scene.run(scene.deployment("other", cpu="1"))
    scene.run(scene.deployment("web", cpu="1"))
    later(scene)


def nowhere(scene: Scene) -> None:
    scene.node(cpu="1500m")
    scene.run(scene.deployment("web", cpu="1"))
    later(scene, cpu="9")


def crash(scene: Scene) -> None:
    scene.node(cpu="1500m")
    scene.run(scene.deployment("web", cpu="1"))
    later(scene, behaviour="crash")


def undone(scene: Scene) -> None:
    """Rolled back to the first release while there is room for one pod only."""
    scene.node(cpu="1500m")
    scene.run(scene.deployment("web", cpu="1", strategy={"type": "Recreate"}))
    later(scene)
    scene.wait_available("web")
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    scene.patch("web", {"spec": {"strategy": rolling}})
    scene.plane.kubectl("rollout", "undo", "deployment/web", "-n", scene.namespace)


CASES: dict[str, Callable[[Scene], None]] = {
    "one replica": alone,
    "three replicas": three,
    "a neighbour in the namespace": neighbour,
    "a request that fits nowhere": nowhere,
    "a new image that crashes": crash,
    "after `kubectl rollout undo`": undone,
}


class Watch:
    """The fewest available pods of `web`, sampled in a thread."""

    def __init__(self, scene: Scene) -> None:
        self.fewest = scene.available("web")
        self._stop = threading.Event()
        self._scene = scene
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            self.fewest = min(self.fewest, self._scene.available("web"))

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def observe(scene: Scene, act: Callable[[Scene, Path], None], folder: Path) -> str:
    """Act, wait until things have settled, and say in a few words what became of the service."""
    scene.wait_stuck("web")
    others = uids(scene.pods("other"))
    revisions = len(scene.sets("web"))
    with Watch(scene) as watch:
        act(scene, folder)
        ends = time.monotonic() + 15
        while time.monotonic() < ends and not scene.complete("web"):
            time.sleep(0.2)
    words = ["rolled out" if scene.complete("web") else "not rolled out"]
    serving = scene.available("web")
    words.append(
        f"{serving} {'pod serves' if serving == 1 else 'pods serve'} (fewest {watch.fewest})"
    )
    lost = revisions - len(scene.sets("web"))
    words.append(f"{lost} revision of its history lost" if lost else "history whole")
    if others:
        words.append(
            "neighbour " + ("kept" if uids(scene.pods("other")) == others else "restarted")
        )
    return ", ".join(words)


@contextmanager
def scene_on(plane: ControlPlane, nodes: HollowNodes) -> Iterator[Scene]:
    scene = Scene(plane, nodes)
    try:
        yield scene
    finally:
        scene.close()


def main() -> int:
    """Run every case both ways; print the table."""
    rows = ["| case | the guide's script | Upkeep |", "|---|---|---|"]
    with (
        tempfile.TemporaryDirectory() as folder,
        control_plane(Path(folder)) as plane,
        HollowNodes(plane.kubeconfig) as nodes,
    ):
        for case, prepare in CASES.items():
            results = []
            for act in (run_script, run_upkeep):
                with scene_on(plane, nodes) as scene:
                    prepare(scene)
                    results.append(observe(scene, act, Path(folder)))
            rows.append(f"| {case} | {results[0]} | {results[1]} |")
            print(rows[-1], flush=True)
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
