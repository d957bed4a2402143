"""Plans on made-up clusters: what the ReplicaSet controller may pick, and what limits forbid.

Kubernetes 1.22 and newer can't be had here; what they honour is tested on values.
"""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.checks.freeing import Freeing, Limits, Refusal, plan_freeing
from exporter.checks.labels import LabelSelector
from exporter.checks.objects import (
    Deployment,
    DisruptionBudget,
    Node,
    Pod,
    PodShape,
    ReplicaSet,
    Unschedulable,
)
from exporter.checks.rollouts import Stuck, examine
from exporter.checks.scheduling import why_not
from exporter.checks.view import ClusterView
from exporter.kubernetes.decode import SCALE_UPS, ScaleUp
from exporter.kubernetes.watched import watched

NOW = 1_000_000.0


def node(name: str, cpu: int, *, pods: int = 110) -> Node:
    return Node(name, {"kubernetes.io/hostname": name}, {"cpu": cpu, "pods": pods})


def pod(name: str, owner: str, cpu: int, place: str = "", *, ready: bool = True) -> Pod:
    return Pod(
        namespace="a",
        name=name,
        uid=name,
        resource_version="1",
        labels={"app": "web"},
        shape=PodShape(requests={"cpu": cpu}),
        owner=owner,
        owner_kind="ReplicaSet",
        owner_name=owner,
        node=place,
        phase="Running" if place else "Pending",
        ready_since=NOW - 600 if place and ready else None,
        unschedulable=None if place else Unschedulable(NOW - 300, "1 Insufficient cpu."),
    )


def cluster(
    nodes: list[Node], old: list[Pod], new: Pod, *, honours_cost: bool = False, replicas: int = 0
) -> tuple[ClusterView, Stuck]:
    """A Deployment with the ReplicaSet `old` on the nodes and the pod `new` waiting."""
    view = ClusterView()
    view.honours_deletion_cost = honours_cost
    deployment = Deployment(
        namespace="a",
        name="web",
        uid="d",
        resource_version="1",
        labels={},
        generation=1,
        observed_generation=1,
        replicas=replicas or len(old),
        revision="2",
        max_unavailable=0,
        max_surge=1,
    )
    view.put_deployment(deployment)
    for name, revision, count in (("old", "1", len(old)), ("new", "2", 1)):
        view.put_replica_set(ReplicaSet("a", name, name, "1", "d", revision, count))
    for one in nodes:
        view.put_node(one)
    for one_pod in [*old, new]:
        view.put_pod(one_pod)
    found = examine(view, deployment, NOW)
    assert isinstance(found, Stuck), found
    return view, found


def test_before_1_22_it_acts_only_if_any_pick_would_do() -> None:
    nodes = [node("big", 1500), node("small", 1200)]
    old = [pod("p1", "old", 1000, "big"), pod("p2", "old", 1000, "small")]
    view, stuck = cluster(nodes, old, pod("n1", "new", 1400))
    plan = plan_freeing(view, stuck, Limits(extra_unavailable=2), NOW)
    assert isinstance(plan, Freeing)
    assert len(plan.takes[0].pods) == 2  # one alone might be the wrong one
    refused = plan_freeing(view, stuck, Limits(), NOW)
    assert isinstance(refused, Refusal)
    assert refused.code == "TooFewAvailable"


def test_from_1_22_on_the_right_pod_is_chosen() -> None:
    nodes = [node("big", 1500), node("small", 1200)]
    old = [pod("p1", "old", 1000, "big"), pod("p2", "old", 1000, "small")]
    view, stuck = cluster(nodes, old, pod("n1", "new", 1400), honours_cost=True)
    plan = plan_freeing(view, stuck, Limits(), NOW)
    assert isinstance(plan, Freeing)
    assert [p.name for p in plan.takes[0].pods] == ["p1"]
    assert plan.takes[0].steered
    assert plan.node == "big"
    assert plan.available_after == 1


def test_what_serves_nobody_goes_first() -> None:
    """A pod that isn't ready is deleted before one that is, by the controller's own order."""
    nodes = [node("one", 2200)]
    old = [pod("dead", "old", 1000, "one", ready=False), pod("live", "old", 1000, "one")]
    view, stuck = cluster(nodes, old, pod("n1", "new", 1000))
    plan = plan_freeing(view, stuck, Limits(), NOW)
    assert isinstance(plan, Freeing)
    assert [p.name for p in plan.takes[0].pods] == ["dead"]
    assert plan.available_after == plan.available_before == 1


def test_the_last_pod_goes_only_where_that_is_allowed() -> None:
    view, stuck = cluster(
        [node("one", 1500)], [pod("p", "old", 1000, "one")], pod("n", "new", 1000)
    )
    assert isinstance(plan_freeing(view, stuck, Limits(), NOW), Freeing)
    refused = plan_freeing(view, stuck, Limits(allow_none_available=False), NOW)
    assert isinstance(refused, Refusal)
    assert refused.code == "WouldStopService"


def scaled_beyond(room: int, replicas: int) -> tuple[ClusterView, Stuck]:
    """Nodes with room for `room` old pods; the others of `replicas` wait as the new one does."""
    nodes = [node(f"node-{n}", 1000) for n in range(room)]
    old = [pod(f"p{n:02}", "old", 1000, f"node-{n}" if n < room else "") for n in range(replicas)]
    return cluster(nodes, old, pod("new-0", "new", 1000))


def test_pods_that_found_no_place_are_no_outage() -> None:
    view, stuck = scaled_beyond(3, 20)
    plan = plan_freeing(view, stuck, Limits(), NOW)
    assert isinstance(plan, Freeing)
    # Scaled down, a ReplicaSet loses those that wait before any that makes room.
    assert (plan.takes[0].before, plan.takes[0].after) == (20, 2)
    assert (plan.available_before, plan.available_after) == (3, 2)
    refused = plan_freeing(view, stuck, Limits(extra_unavailable=0), NOW)
    assert isinstance(refused, Refusal)
    assert refused.code == "TooFewAvailable"


def test_the_last_of_a_deployment_scaled_beyond_its_room_goes_only_where_that_is_allowed() -> None:
    view, stuck = scaled_beyond(1, 5)
    assert isinstance(plan_freeing(view, stuck, Limits(), NOW), Freeing)
    refused = plan_freeing(view, stuck, Limits(allow_none_available=False), NOW)
    assert isinstance(refused, Refusal)
    assert refused.code == "WouldStopService"


def test_pods_that_broke_down_on_their_node_are_an_outage() -> None:
    """Their room is of no use to the new pod, so two that serve would be left with one."""
    nodes = [node("one", 2500), node("two", 1200)]
    old = [pod(f"live-{n}", "old", 1000, "one") for n in range(2)]
    old += [pod(f"dead-{n}", "old", 500, "two", ready=False) for n in range(2)]
    view, stuck = cluster(nodes, old, pod("new-0", "new", 1400), honours_cost=True)
    refused = plan_freeing(view, stuck, Limits(), NOW)
    assert isinstance(refused, Refusal)
    assert refused.code == "TooFewAvailable"
    assert isinstance(plan_freeing(view, stuck, Limits(extra_unavailable=3), NOW), Freeing)


def test_no_pod_goes_from_a_node_that_is_opted_out() -> None:
    off = msgspec.structs.replace(node("a-off", 1500), opted_out=True)
    old = [pod("p1", "old", 1000, "a-off"), pod("p2", "old", 1000, "on")]
    view, stuck = cluster([off, node("on", 1500)], old, pod("n", "new", 1000), honours_cost=True)
    plan = plan_freeing(view, stuck, Limits(), NOW)
    assert isinstance(plan, Freeing)
    assert [p.name for p in plan.takes[0].pods] == ["p2"]
    view.honours_deletion_cost = False  # the controller might pick the other one
    refused = plan_freeing(view, stuck, Limits(), NOW)
    assert isinstance(refused, Refusal)
    assert refused.code == "NodeOptedOut"


def test_the_freshest_word_of_the_autoscaler_counts_in_whatever_order_it_comes() -> None:
    view = ClusterView()
    (scale_ups,) = (one for one in watched(view, "") if one.kind is SCALE_UPS)
    for key, at in (("a/fresh", 200.0), ("a/old", 100.0)):
        scale_ups.put(ScaleUp(key, "pod", at))
    assert view.scale_ups == {"pod": 200.0}
    scale_ups.drop("a/fresh")
    assert view.scale_ups == {"pod": 100.0}
    scale_ups.drop("a/old")
    assert view.scale_ups == {}


def test_a_budget_with_an_outdated_status_allows_nothing() -> None:
    view, stuck = cluster(
        [node("one", 1500)], [pod("p", "old", 1000, "one")], pod("n", "new", 1000)
    )
    selector = LabelSelector(match_labels={"app": "web"})
    view.put_budget(DisruptionBudget("a", "pdb", selector, allowed=1))
    assert isinstance(plan_freeing(view, stuck, Limits(), NOW), Freeing)
    view.put_budget(DisruptionBudget("a", "pdb", selector, allowed=1, current=False))
    refused = plan_freeing(view, stuck, Limits(), NOW)
    assert isinstance(refused, Refusal)
    assert refused.code == "DisruptionBudget"


def test_where_it_fits_already_nothing_is_known() -> None:
    """The scheduler says no where the fit test says yes: something else must be in the way."""
    view, stuck = cluster(
        [node("one", 9000)], [pod("p", "old", 1000, "one")], pod("n", "new", 1000)
    )
    refused = plan_freeing(view, stuck, Limits(), NOW)
    assert isinstance(refused, Refusal)
    assert (refused.code, refused.known) == ("FitsNow", False)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_plan_always_makes_room_and_never_breaks_its_limits(data: st.DataObject) -> None:
    cpus = data.draw(st.lists(st.integers(500, 4000), min_size=1, max_size=3))
    nodes = [node(f"node-{n}", cpu) for n, cpu in enumerate(cpus)]
    names = [one.name for one in nodes]
    old = [
        pod(f"old-{n}", "old", data.draw(st.integers(100, 1500)), place, ready=ready)
        for n, (place, ready) in enumerate(
            data.draw(
                st.lists(st.tuples(st.sampled_from(names), st.booleans()), min_size=1, max_size=5)
            )
        )
    ]
    new = pod("new-0", "new", data.draw(st.integers(100, 4000)))
    cost = data.draw(st.booleans())
    view, stuck = cluster(nodes, old, new, honours_cost=cost)
    limits = Limits(
        extra_unavailable=data.draw(st.integers(0, 3)),
        allow_none_available=data.draw(st.booleans()),
    )
    plan = plan_freeing(view, stuck, limits, NOW)
    if isinstance(plan, Refusal):
        if plan.code == "DoesNotFit":
            everyone = frozenset(p.uid for p in old)
            assert all(why_not(view, new, one, everyone) for one in nodes)
        return
    gone = frozenset(p.uid for take in plan.takes for p in take.pods)
    assert any(why_not(view, new, one, gone) is None for one in nodes)
    if plan.available_after < plan.available_before:
        assert plan.available_after >= len(old) - limits.extra_unavailable
        assert plan.available_after > 0 or limits.allow_none_available
    assert plan.takes[0].after == len(old) - len(gone)


def test_a_view_indexes_what_is_put_and_forgets_what_is_dropped() -> None:
    view, stuck = cluster(
        [node("one", 1500)], [pod("p", "old", 1000, "one")], pod("n", "new", 1000)
    )
    assert [one.name for one in view.suspects()] == ["web"]
    assert view.room(view.nodes["one"]).free["cpu"] == 500
    view.drop_pod("a/p")
    assert view.room(view.nodes["one"]).free["cpu"] == 1500
    view.put_pod(msgspec.structs.replace(stuck.waiting[0], node="one", unschedulable=None))
    assert view.suspects() == []
    assert view.room(view.nodes["one"]).free["cpu"] == 500
    for drop, key in ((view.drop_deployment, "a/web"), (view.drop_replica_set, "a/old")):
        drop(key)
        drop(key)
    assert view.sets_of(stuck.deployment) == [stuck.newest]
