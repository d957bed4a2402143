"""The control plane and its hollow nodes do what a cluster does, and leave nothing behind."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.api import Api, ApiError
from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.hollow import BEHAVIOUR, TERMINATION, HollowNodes
from tests.cluster.kubernetes_build import kubernetes_binaries
from tests.cluster.processes import ClusterError

pytestmark = [pytest.mark.cluster, pytest.mark.debian]

PATIENCE_SECONDS = 60


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with control_plane(tmp_path_factory.mktemp("plane")) as running:
        yield running


@pytest.fixture(scope="module")
def nodes(plane: ControlPlane) -> Iterator[HollowNodes]:
    with HollowNodes(plane.kubeconfig) as hollow:
        hollow.add("small", allocatable={"cpu": "2", "example.com/gpu": "1"})
        hollow.add("large", allocatable={"cpu": "8"}, labels={"size": "large"})
        yield hollow


_NUMBERS = itertools.count(1)


@pytest.fixture
def namespace(plane: ControlPlane) -> Iterator[str]:
    name = f"test-{next(_NUMBERS)}"
    plane.kubectl("create", "namespace", name)
    yield name
    plane.kubectl("delete", "namespace", name, "--wait=false")


def deployment(
    namespace: str,
    *,
    replicas: int = 1,
    cpu: str = "100m",
    annotations: dict[str, str] | None = None,
) -> dict[str, Any]:
    container = {
        "name": "web",
        "image": "nowhere.example/web:1",
        "resources": {"requests": {"cpu": cpu}},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web", "namespace": namespace},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}, "annotations": annotations or {}},
                "spec": {"containers": [container]},
            },
        },
    }


def pods(plane: ControlPlane, namespace: str) -> list[dict[str, Any]]:
    listed = json.loads(plane.kubectl("get", "pods", "-n", namespace, "-o", "json"))
    items: list[dict[str, Any]] = listed["items"]
    return items


def condition(pod: dict[str, Any], kind: str) -> dict[str, Any]:
    found = [c for c in pod["status"].get("conditions", []) if c["type"] == kind]
    return found[0] if found else {}


def eventually(question: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        if answer := question():
            return answer
        assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS} s: {what}"
        time.sleep(0.2)


def processes_of(directory: Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if str(directory) in line and process.pid != os.getpid():
            found.append(f"{process.pid} {line[:120]}")
    return found


def test_deployment_runs_on_hollow_nodes(
    plane: ControlPlane, nodes: HollowNodes, namespace: str
) -> None:
    plane.apply(deployment(namespace, replicas=3))
    plane.kubectl("rollout", "status", "deployment/web", "-n", namespace, "--timeout=60s")
    found = pods(plane, namespace)
    assert len({pod["status"]["podIP"] for pod in found}) == 3
    for pod in found:
        assert pod["status"]["phase"] == "Running"
        assert condition(pod, "Ready")["status"] == "True"
        assert pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"]
        assert pod["spec"]["nodeName"] in {"small", "large"}


def test_request_that_fits_nowhere_is_refused_by_the_real_scheduler(
    plane: ControlPlane, nodes: HollowNodes, namespace: str
) -> None:
    plane.apply(deployment(namespace, cpu="64"))

    def message() -> str:
        for pod in pods(plane, namespace):
            assert "nodeName" not in pod["spec"]
            scheduled = condition(pod, "PodScheduled")
            if scheduled.get("reason") == "Unschedulable":
                return str(scheduled["message"])
        return ""

    said = eventually(message, "a pod is Unschedulable")
    assert said.startswith("0/2 nodes are available: 2 Insufficient cpu."), said


def test_extended_resource_and_labels_of_a_node_count(
    plane: ControlPlane, nodes: HollowNodes, namespace: str
) -> None:
    wanted = deployment(namespace, replicas=2)
    pod = wanted["spec"]["template"]["spec"]
    pod["containers"][0]["resources"] = {"limits": {"example.com/gpu": "1"}}
    plane.apply(wanted)

    def placed_and_refused() -> bool:
        found = pods(plane, namespace)
        refused = [p for p in found if condition(p, "PodScheduled").get("status") == "False"]
        return (
            [p["spec"].get("nodeName") for p in found if p not in refused] == ["small"]
            and len(refused) == 1
            and "2 Insufficient example.com/gpu" in condition(refused[0], "PodScheduled")["message"]
        )

    eventually(placed_and_refused, "one pod has the gpu and the other waits for it")


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize(
    ("behaviour", "ready", "waiting"),
    [
        ("ready", "True", None),
        ("never-ready", "False", None),
        ("crash", "False", "CrashLoopBackOff"),
        ("ready-then-crash=1", "False", "CrashLoopBackOff"),
        ("mistyped", "False", "CreateContainerConfigError"),
    ],
)
def test_behaviour(
    plane: ControlPlane, namespace: str, behaviour: str, ready: str, waiting: str | None
) -> None:
    plane.apply(deployment(namespace, annotations={BEHAVIOUR: behaviour}))

    def reached() -> bool:
        for pod in pods(plane, namespace):
            for container in pod["status"].get("containerStatuses", []):
                state = container["state"].get("waiting", {}).get("reason")
                if state == waiting and condition(pod, "Ready")["status"] == ready:
                    return True
        return False

    eventually(reached, f"a pod that is {behaviour} has Ready={ready} and waits for {waiting}")


def test_slow_pod_runs_before_it_is_ready(
    plane: ControlPlane, nodes: HollowNodes, namespace: str
) -> None:
    plane.apply(deployment(namespace, annotations={BEHAVIOUR: "slow-ready=3"}))
    plane.kubectl("rollout", "status", "deployment/web", "-n", namespace, "--timeout=60s")
    [pod] = pods(plane, namespace)
    started = pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"]
    ready = condition(pod, "Ready")["lastTransitionTime"]
    assert datetime.fromisoformat(ready) - datetime.fromisoformat(started) >= timedelta(seconds=2)


def test_crashing_pod_is_started_again_after_its_back_off(
    plane: ControlPlane, nodes: HollowNodes, namespace: str
) -> None:
    plane.apply(deployment(namespace, annotations={BEHAVIOUR: "crash"}))
    eventually(
        lambda: [
            container
            for pod in pods(plane, namespace)
            for container in pod["status"].get("containerStatuses", [])
            if container["restartCount"] == 1 and container["lastState"]["terminated"]["exitCode"]
        ],
        "a second start",
    )


def test_deleted_pod_takes_as_long_as_it_says(
    plane: ControlPlane, nodes: HollowNodes, namespace: str
) -> None:
    plane.apply(deployment(namespace, annotations={TERMINATION: "3"}))
    plane.kubectl("rollout", "status", "deployment/web", "-n", namespace, "--timeout=60s")
    [first] = pods(plane, namespace)
    name = first["metadata"]["name"]
    began = time.monotonic()
    plane.kubectl("delete", "pod", name, "-n", namespace, "--wait=false")
    [deleted] = [p for p in pods(plane, namespace) if p["metadata"]["name"] == name]
    assert deleted["metadata"]["deletionTimestamp"]
    eventually(lambda: name not in {p["metadata"]["name"] for p in pods(plane, namespace)}, "gone")
    assert time.monotonic() - began >= 3


def test_nodes_stay_ready_and_a_removed_one_goes(plane: ControlPlane, nodes: HollowNodes) -> None:
    nodes.add("passing", taints=[{"key": "for", "value": "nobody", "effect": "NoSchedule"}])
    lease = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/passing"
    first = plane.api.request("GET", lease)["spec"]["renewTime"]
    eventually(
        lambda: plane.api.request("GET", lease)["spec"]["renewTime"] != first, "lease renewed"
    )
    listed = plane.kubectl("get", "nodes", "--no-headers")
    assert [line.split()[1] for line in listed.splitlines()] == ["Ready"] * 3, listed
    nodes.remove("passing")
    assert "passing" not in plane.kubectl("get", "nodes")


def test_work_goes_on_after_the_apiserver_was_killed(
    plane: ControlPlane, nodes: HollowNodes, namespace: str
) -> None:
    plane.apply(deployment(namespace, replicas=2))
    plane.kubectl("rollout", "status", "deployment/web", "-n", namespace, "--timeout=60s")
    before = plane.components["kube-apiserver"].pid
    plane.stop("kube-apiserver", kill=True)
    with pytest.raises(ClusterError, match="refused"):
        plane.kubectl("get", "nodes")
    plane.start("kube-apiserver")
    assert plane.components["kube-apiserver"].pid not in {None, before}
    plane.kubectl("scale", "deployment/web", "-n", namespace, "--replicas=4")
    plane.kubectl("rollout", "status", "deployment/web", "-n", namespace, "--timeout=60s")
    assert len(pods(plane, namespace)) == 4


@pytest.mark.parametrize("component", ["etcd", "kube-controller-manager", "kube-scheduler"])
def test_component_ends_and_starts_again(plane: ControlPlane, component: str) -> None:
    plane.restart(component)
    plane.kubectl("get", "nodes")
    before = plane.components[component].pid
    plane.restart(component, kill=True)
    assert plane.components[component].pid not in {None, before}


def test_service_account_may_do_what_its_rules_say_and_no_more(
    plane: ControlPlane, namespace: str
) -> None:
    rules = [{"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["get", "list"]}]
    everywhere = plane.service_account("reader", rules)
    plane.kubectl("get", "deployments", "--all-namespaces", kubeconfig=everywhere)
    here = plane.service_account("reader", rules, namespace=namespace, cluster_wide=False)
    plane.kubectl("get", "deployments", kubeconfig=here)
    for kubeconfig, arguments in (
        (everywhere, ["get", "pods"]),
        (everywhere, ["delete", "deployment", "web"]),
        (here, ["get", "deployments", "--namespace=default"]),
    ):
        with pytest.raises(ClusterError, match="Forbidden"):
            plane.kubectl(*arguments, kubeconfig=kubeconfig)
    assert here.stat().st_mode & 0o077 == 0


def test_anonymous_user_is_refused(plane: ControlPlane) -> None:
    stranger = plane.directory / "stranger.conf"
    config = plane.kubeconfig.read_text()
    stranger.write_text("\n".join(line for line in config.splitlines() if "client-" not in line))
    with pytest.raises(ApiError) as refused:
        Api(stranger).request("GET", "/api/v1/nodes")
    assert refused.value.code in {401, 403}


def test_two_at_once_and_nothing_left_after(tmp_path: Path) -> None:
    with control_plane(tmp_path, name="first") as first:
        with control_plane(tmp_path, name="second") as second:
            assert not set(vars(first.ports).values()) & set(vars(second.ports).values())
            second.kubectl("create", "namespace", "only-in-the-second")
            assert "only-in-the-second" not in first.kubectl("get", "namespaces")
            assert len(processes_of(tmp_path)) == 8
        assert len(processes_of(tmp_path)) == 4
        assert "only-in-the-second" not in first.kubectl("get", "namespaces")
    assert processes_of(tmp_path) == []
    assert "serving" in (first.directory / "logs/etcd.log").read_text()


def test_extra_flag_that_is_wrong_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ClusterError, match=r"(?s)kube-apiserver ended.*no-such-flag"),
        control_plane(tmp_path, apiserver_flags=["--no-such-flag"]),
    ):
        pass
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_command_for_a_person_leaves_no_process(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-m", "tests.cluster.control_plane", "--nodes=2"]
    with subprocess.Popen(
        [*command, f"--workdir={tmp_path}"], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            kubeconfig = line.strip().removeprefix("KUBECONFIG=")
            kubectl = str(kubernetes_binaries().kubectl)
            listed = subprocess.run(
                [kubectl, "--kubeconfig", kubeconfig, "get", "nodes", "--no-headers"],
                capture_output=True,
                text=True,
                check=True,
            )
            assert [row.split()[0] for row in listed.stdout.splitlines()] == [
                "hollow-1",
                "hollow-2",
            ]
            assert len(processes_of(tmp_path)) == 5  # with the command itself
        finally:
            process.send_signal(how)
        process.wait(30)
    eventually(lambda: not processes_of(tmp_path), "every process is gone")
    assert process.returncode == (-signal.SIGKILL if how is signal.SIGKILL else 0)


def test_folder_that_is_there_already_is_refused(tmp_path: Path) -> None:
    (tmp_path / "control-plane").mkdir()
    with pytest.raises(FileExistsError), control_plane(tmp_path):
        pass
    shutil.rmtree(tmp_path / "control-plane")
