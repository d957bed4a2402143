"""What is read of the API's JSON, the scheduler's arithmetic of requests above all."""

from typing import Any

import msgspec
import pytest

from exporter.checks.rollouts import insufficient
from exporter.kubernetes import decode


def pod(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "a", "name": "b", "uid": "u"}, "spec": spec, "status": {}}


def requests(**spec: Any) -> dict[str, int]:
    return decode.PODS.read(msgspec.json.encode(pod(**spec))).shape.requests


def container(restart: str = "", **resources: str) -> dict[str, Any]:
    more = {"restartPolicy": restart} if restart else {}
    return {"name": "c", "resources": {"requests": resources}, **more}


@pytest.mark.parametrize(
    ("spec", "cpu"),
    [
        ({"containers": [container(cpu="1"), container(cpu="500m")]}, 1500),
        ({"containers": [container(cpu="1")], "initContainers": [container(cpu="3")]}, 3000),
        ({"containers": [container(cpu="1")], "overhead": {"cpu": "250m"}}, 1250),
        (
            {"containers": [container(cpu="1")], "initContainers": [container("Always", cpu="1")]},
            2000,
        ),
        (  # a sidecar that was started before an init container counts beside it
            {
                "containers": [container(cpu="1")],
                "initContainers": [container("Always", cpu="1"), container(cpu="2")],
            },
            3000,
        ),
        (  # one that is started after it doesn't
            {
                "containers": [container(cpu="1")],
                "initContainers": [container(cpu="2"), container("Always", cpu="1")],
            },
            2000,
        ),
        (  # pod-level requests stand in for the sum
            {"containers": [container(cpu="1")], "resources": {"requests": {"cpu": "2"}}},
            2000,
        ),
        ({"containers": [{"name": "c"}]}, 0),
    ],
)
def test_effective_requests(spec: dict[str, Any], cpu: int) -> None:
    assert requests(**spec).get("cpu", 0) == cpu


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"schedulerName": "other"}, "scheduler 'other'"),
        ({"schedulingGates": [{"name": "x"}]}, "scheduling gates"),
        ({"volumes": [{"name": "d", "persistentVolumeClaim": {"claimName": "x"}}]}, "volumes d"),
        ({"resourceClaims": [{"name": "gpu"}]}, "resource claims"),
        ({"topologySpreadConstraints": [{"whenUnsatisfiable": "DoNotSchedule"}]}, "spread"),
        ({"topologySpreadConstraints": [{"whenUnsatisfiable": "ScheduleAnyway"}]}, ""),
        ({"volumes": [{"name": "d", "emptyDir": {}}]}, ""),
    ],
)
def test_what_decides_on_placement_beyond_the_fit_test_is_named(
    spec: dict[str, Any], reason: str
) -> None:
    unknown = decode.PODS.read(msgspec.json.encode(pod(**spec))).shape.unknown
    assert reason in unknown
    assert bool(reason) == bool(unknown)


def test_pods_of_a_template_share_their_shape() -> None:
    spec = {"containers": [container(cpu="1")]}
    first, second = (decode.PODS.read(msgspec.json.encode(pod(**spec))) for _ in range(2))
    assert first.shape is second.shape


def test_an_object_of_another_shape_is_refused() -> None:
    with pytest.raises(msgspec.DecodeError):
        decode.PODS.read(b'{"metadata": {}, "spec": {"containers": 3}, "status": {}}')


@pytest.mark.parametrize(
    ("message", "resources"),
    [
        ("0/1 nodes are available: 1 Insufficient cpu.", ("cpu",)),
        (
            (
                "0/6 nodes are available: 1 node(s) had untolerated taint {a: b}, "
                "5 Insufficient cpu. preemption: 0/6 nodes are available: 5 Insufficient memory."
            ),
            ("cpu",),
        ),
        (
            (
                "0/1 nodes are available: 1 Insufficient nvidia.com/gpu. no new claims to "
                "deallocate, preemption: 0/1 nodes are available: 1 No preemption victims found."
            ),
            ("nvidia.com/gpu",),
        ),
        ("0/2 nodes are available: 1 Too many pods, 2 Insufficient memory.", ("memory", "pods")),
        ("0/1 nodes are available: 1 node(s) didn't match Pod's node affinity.", ()),
        ("", ()),
    ],
)
def test_the_schedulers_message(message: str, resources: tuple[str, ...]) -> None:
    assert insufficient(message) == resources
