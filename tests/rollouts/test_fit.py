"""R12: the fit test agrees with the real scheduler, constraint by constraint and at random.

Each case is a Deployment that holds a node and a new release of it. Whether the real scheduler
places the new pod once the old one is really gone is the truth; the plan must have said so before.
"""

import random
import time
from typing import Any

import pytest

from exporter.checks.freeing import Freeing, Limits, Refusal, plan_freeing
from exporter.checks.rollouts import Stuck
from remediator.fixes.rollouts.look import look
from tests.rollouts.scene import MERGE, Scene, conditions, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.debian]


async def predict(scene: Scene, name: str) -> Freeing | Refusal:
    """What the plan says of a stuck Deployment now."""
    async with scene.connect() as api:
        found = await look(api, scene.target(name), time.time(), whole=True)
    assert found is not None
    assert isinstance(found.stuck, Stuck), found.stuck
    return plan_freeing(found.view, found.stuck, Limits(), time.time())


def truth(scene: Scene, name: str) -> bool:
    """Free all old pods for real; whether the new pod is then placed."""
    for revision, one in scene.sets(name).items():
        if revision == "1":
            path = f"{scene.space('apps/v1')}/replicasets/{one['metadata']['name']}"
            scene.api.request("PATCH", path, {"spec": {"replicas": 0}}, content_type=MERGE)
    old_gone = time.monotonic()

    def decided() -> str:
        nonlocal old_gone
        pods = scene.pods(name)
        if any(p["metadata"]["labels"].get("release") == "1" for p in pods):
            old_gone = time.monotonic()
            return ""
        if any(p["spec"].get("nodeName") for p in pods):
            return "placed"
        # The scheduler has had time for its back-off, and the word on the pod is still "no".
        words = [c for p in pods for c in conditions(p) if c.get("reason") == "Unschedulable"]
        return "refused" if words and time.monotonic() - old_gone > 12 else ""

    return wait_for("the scheduler's verdict", decided) == "placed"


async def agree(scene: Scene, old: dict[str, Any], new: dict[str, Any]) -> Freeing | Refusal:
    """Roll from one pod spec to another; fail where prediction and truth differ."""
    manifest = scene.deployment("web", pod=old)
    manifest["spec"]["template"]["metadata"]["labels"]["release"] = "1"
    name = scene.run(manifest)
    template = scene.deployment("web", pod=new)["spec"]["template"]
    template["metadata"]["labels"]["release"] = "2"
    path = "/spec/template"
    operations = [{"op": "replace", "path": path, "value": template}]
    scene.api.request(
        "PATCH",
        f"{scene.space('apps/v1')}/deployments/{name}",
        operations,  # type: ignore[arg-type]
        content_type="application/json-patch+json",
    )
    scene.wait_stuck(name)
    plan = await predict(scene, name)
    assert not (isinstance(plan, Refusal) and not plan.known), plan
    assert isinstance(plan, Freeing) == truth(scene, name), (plan, scene.state(name))
    return plan


def container(**requests: str) -> dict[str, Any]:
    return {
        "name": "main",
        "image": "example.com/app:1",
        "resources": {
            "requests": requests,
            "limits": {k: v for k, v in requests.items() if "/" in k},
        },
    }


def pod(scene: Scene, *containers: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {"nodeSelector": {"scene": scene.name}, "containers": list(containers), **spec}


def affinity(*expressions: dict[str, Any]) -> dict[str, Any]:
    terms = [{"matchExpressions": list(expressions)}]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    return {"nodeAffinity": required}


@pytest.mark.parametrize("wanted", ["1", "2"])
async def test_r12_gpus(scene: Scene, wanted: str) -> None:
    scene.node(sizes={"example.com/gpu": "1"})
    gpu = {"example.com/gpu": "1"}
    new = {"example.com/gpu": wanted}
    plan = await agree(scene, pod(scene, container(**gpu)), pod(scene, container(**new)))
    assert isinstance(plan, Freeing) == (wanted == "1")


async def test_r12_pods_per_node(scene: Scene) -> None:
    scene.node(sizes={"pods": "1"})
    plan = await agree(
        scene, pod(scene, container(cpu="1")), pod(scene, container(cpu="1", memory="1Mi"))
    )
    assert isinstance(plan, Freeing)


async def test_r12_host_ports(scene: Scene) -> None:
    scene.node()
    with_port = {**container(cpu="1"), "ports": [{"containerPort": 80, "hostPort": 8080}]}
    more = {**with_port, "image": "example.com/app:2"}
    plan = await agree(scene, pod(scene, with_port), pod(scene, more))
    assert isinstance(plan, Freeing)


async def test_r12_anti_affinity_with_its_own_old_pod(scene: Scene) -> None:
    scene.node(labels={"kubernetes.io/hostname": scene.name})
    term = {
        "topologyKey": "kubernetes.io/hostname",
        "labelSelector": {"matchLabels": {"app": "web"}},
    }
    apart = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    old = pod(scene, container(cpu="1"), affinity=apart)
    plan = await agree(scene, old, pod(scene, container(cpu="2"), affinity=apart))
    assert isinstance(plan, Freeing)


async def test_r12_anti_affinity_of_a_neighbour(scene: Scene) -> None:
    scene.node(cpu="4", labels={"kubernetes.io/hostname": scene.name})
    term = {
        "topologyKey": "kubernetes.io/hostname",
        "labelSelector": {"matchLabels": {"release": "2"}},
    }
    apart = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    scene.run(scene.deployment("neighbour", pod=pod(scene, container(cpu="1"), affinity=apart)))
    plan = await agree(scene, pod(scene, container(cpu="2")), pod(scene, container(cpu="2")))
    assert isinstance(plan, Refusal)
    assert "anti-affinity" in plan.message


@pytest.mark.parametrize(("least", "fits"), [("3", True), ("4", False)])
async def test_r12_node_affinity_greater_than(scene: Scene, least: str, fits: bool) -> None:
    scene.node(cpu="1500m", labels={"cores": "4"})
    greater = affinity({"key": "cores", "operator": "Gt", "values": [least]})
    plan = await agree(
        scene,
        pod(scene, container(cpu="1")),
        pod(scene, container(cpu="1200m"), affinity=greater),
    )
    assert isinstance(plan, Freeing) == fits


@pytest.mark.parametrize("tolerated", [True, False])
async def test_r12_taints(scene: Scene, tolerated: bool) -> None:
    taint = {"key": "gpu", "value": "yes", "effect": "NoSchedule"}
    scene.node(cpu="1500m", taints=[taint])
    toleration = {"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}
    new = [toleration] if tolerated else [{**toleration, "value": "no"}]
    plan = await agree(
        scene,
        pod(scene, container(cpu="1"), tolerations=[toleration]),
        pod(scene, container(cpu="1200m"), tolerations=new),
    )
    assert isinstance(plan, Freeing) == tolerated


@pytest.mark.parametrize(("first", "fits"), [("1400m", True), ("1600m", False)])
async def test_r12_init_containers_count_at_their_highest(
    scene: Scene, first: str, fits: bool
) -> None:
    scene.node(cpu="1500m")
    init = {**container(cpu=first), "name": "init"}
    plan = await agree(
        scene,
        pod(scene, container(cpu="1")),
        pod(scene, container(cpu="600m"), initContainers=[init]),
    )
    assert isinstance(plan, Freeing) == fits


async def test_r12_at_random(scene: Scene, seed: int, soak: bool) -> None:
    """Nodes, neighbours and releases of every size; in full many more of them."""
    chance = random.Random(seed)
    outcomes = []
    for number in range(40 if soak else 4):
        memory = {"memory": f"{chance.randint(2, 6)}Gi"}
        scene.node(cpu=f"{chance.randint(20, 40)}00m", sizes=memory)
        old = container(cpu=f"{chance.randint(10, 14)}00m", memory="1Gi")
        new = container(cpu=f"{chance.randint(12, 45)}00m", memory=f"{chance.randint(1, 7)}Gi")
        filler = container(cpu="600m", memory="512Mi")
        if chance.random() < 0.5:
            scene.run(scene.deployment(f"filler-{number}", pod=pod(scene, filler)))
        try:
            plan = await agree(scene, pod(scene, old), pod(scene, new))
            outcomes.append(type(plan).__name__)
        except AssertionError as error:
            if "stuck" not in str(error):  # it found room at once: nothing to predict
                raise
        path = f"{scene.space('apps/v1')}/deployments"
        scene.api.request("DELETE", path, {"propagationPolicy": "Background"})
        wait_for("an empty scene", lambda: not scene.everything())
        scene.hollow.remove(scene.nodes.pop())
    print(f"seed {seed}: {outcomes}")
