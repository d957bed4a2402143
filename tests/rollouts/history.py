"""How many pods were available at the worst moment: every change is looked at, none is sampled."""

import json
from typing import Any

from tests.rollouts.scene import Scene, conditions


class Availability:
    """What became of a Deployment's pods from now on, as the API server tells its changes again.

    Looking now and then would miss the short gaps, which are the ones that matter.
    """

    def __init__(self, scene: Scene, name: str) -> None:
        self._scene, self._name = scene, name
        pods = scene.api.request("GET", f"{scene.space()}/pods?labelSelector=app={name}")
        self._version = pods["metadata"]["resourceVersion"]
        self._serving = {pod["metadata"]["uid"] for pod in pods["items"] if _serves(pod)}

    def fewest(self) -> int:
        """The fewest pods that were available at any moment until now."""
        watch = (
            f"{self._scene.space()}/pods?labelSelector=app={self._name}"
            f"&watch=true&timeoutSeconds=2&resourceVersion={self._version}"
        )
        serving = set(self._serving)
        fewest = len(serving)
        for line in self._scene.api.text(watch, timeout=30).splitlines():
            event = json.loads(line)
            assert event["type"] != "ERROR", event  # it doesn't remember that far back
            pod = event["object"]
            if event["type"] != "DELETED" and _serves(pod):
                serving.add(pod["metadata"]["uid"])
            else:
                serving.discard(pod["metadata"]["uid"])
            fewest = min(fewest, len(serving))
        return fewest


def _serves(pod: dict[str, Any]) -> bool:
    return "deletionTimestamp" not in pod["metadata"] and any(
        c["type"] == "Ready" and c["status"] == "True" for c in conditions(pod)
    )
