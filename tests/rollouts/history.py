"""How many pods were available at the worst moment: every change is looked at, none is sampled."""

import json
import threading
import urllib.request
from typing import Any

from tests.rollouts.scene import Scene, conditions, wait_for


class Availability:
    """A Deployment's pods from now on, by a watch of their changes.

    Looking now and then would miss the short gaps, which are the ones that matter.
    """

    def __init__(self, scene: Scene, name: str) -> None:
        self._scene, self._name = scene, name
        pods = scene.api.request("GET", f"{scene.space()}/pods?labelSelector=app={name}")
        self._serving = _serving(pods["items"])
        self._fewest = len(self._serving)
        self._problem = ""
        version = pods["metadata"]["resourceVersion"]
        threading.Thread(target=self._follow, args=(version,), daemon=True).start()

    def fewest(self) -> int:
        """The fewest pods that were available at any moment until now."""
        wait_for("the watch has caught up", self._caught_up)
        assert not self._problem, self._problem
        return self._fewest

    def _caught_up(self) -> bool:
        return bool(self._problem) or self._serving == _serving(self._scene.pods(self._name))

    def _follow(self, version: str) -> None:
        api = self._scene.api
        watch = (
            f"{api.server}{self._scene.space()}/pods?labelSelector=app={self._name}"
            f"&watch=true&timeoutSeconds=900&resourceVersion={version}"
        )
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=api.tls)
        )
        try:
            with opener.open(urllib.request.Request(watch, headers=api.headers)) as lines:  # noqa: S310 - our own API server
                for line in lines:
                    self._see(json.loads(line))
            self._problem = "the watch ended"
        except OSError as error:
            self._problem = f"the watch broke: {error}"

    def _see(self, event: dict[str, Any]) -> None:
        pod = event["object"]
        if event["type"] == "ERROR":
            raise OSError(pod)
        gone = event["type"] == "DELETED" or not _serving([pod])
        changed = self._serving - {pod["metadata"]["uid"]}
        self._serving = changed if gone else changed | {pod["metadata"]["uid"]}
        self._fewest = min(self._fewest, len(self._serving))


def _serving(pods: list[dict[str, Any]]) -> set[str]:
    return {
        pod["metadata"]["uid"]
        for pod in pods
        if "deletionTimestamp" not in pod["metadata"]
        and any(c["type"] == "Ready" and c["status"] == "True" for c in conditions(pod))
    }
