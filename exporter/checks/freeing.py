"""Which old pods would have to go so that one new pod of a stuck Deployment can run.

One plan serves the metric (is there one?) and the fix (do this). It frees the least: first what
serves nobody anyway, then as few pods as it can, never below what the limits allow. The
ReplicaSet controller, not Upkeep, picks the pods that go; a plan holds for every pick it may make.

Pods that found no place are no outage: a Deployment scaled beyond its room is judged by the pods
that have a node. Those that broke down on their node are one, and count against the limits.
"""

from collections.abc import Iterator
from itertools import combinations, islice, product

import msgspec

from exporter.checks.objects import OPT_OUT, Node, Pod, ReplicaSet
from exporter.checks.rollouts import Cause, Stuck
from exporter.checks.scheduling import has_room, over_quota, unjudgeable, why_not
from exporter.checks.view import ClusterView

_MOST_AT_ONCE = 8  # more placed pods than this for one new one are looked at only all together
_MOST_PICKS = 500  # picks of the ReplicaSet controller looked at for one plan


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How far availability may fall for the time of one step."""

    extra_unavailable: int = 1
    """Pods fewer than the Deployment's own maxUnavailable leaves of those that have a node."""
    allow_none_available: bool = True
    """Whether the last available pod may go (a service of one replica)."""
    respect_budgets: bool = True
    """Whether a PodDisruptionBudget without a disruption left forbids it."""


class Take(msgspec.Struct, frozen=True):
    """So many pods less of one old ReplicaSet."""

    replica_set: ReplicaSet
    before: int
    after: int
    """spec.replicas to set."""
    pods: tuple[Pod, ...]
    """The pods that go (those preferred, where any of several would do)."""
    steered: bool = False
    """Whether the pick must be steered by the pod deletion cost."""


class Freeing(msgspec.Struct, frozen=True):
    """The least that lets one new pod run."""

    takes: tuple[Take, ...]
    node: str
    """Where the new pod then fits; empty where that depends on which pods are picked."""
    available_before: int
    available_after: int


class Refusal(msgspec.Struct, frozen=True):
    """No plan, and why."""

    code: str
    message: str
    known: bool = True
    """False where the answer can't be known: then there is no metric and no action."""


def plan_freeing(view: ClusterView, stuck: Stuck, limits: Limits, now: float) -> Freeing | Refusal:
    """The least freeing that lets one waiting pod of `stuck` be placed, or why there is none."""
    deployment = stuck.deployment
    if deployment.strategy != "RollingUpdate":
        return Refusal("Recreate", "its strategy is Recreate: there are no old pods left to free")
    pod = _new_pod(stuck)
    if pod is None:
        return Refusal("NotForLackOfRoom", "its new pods have a node: room is not what they lack")
    if reason := _unjudgeable(view, stuck, pod):
        return Refusal("CannotBeKnown", f"pod {pod.name}: {reason}", known=False)
    if stuck.waiting or over_quota(view, pod) is None:
        node = has_room(view, pod)
        if node is not None:
            return Refusal(
                "FitsNow",
                f"pod {pod.name} would fit on {node.name} as it is: "
                "either it is about to be placed or something else keeps it off",
                known=False,
            )
    return _Search(view, stuck, pod, limits, now).run()


def _new_pod(stuck: Stuck) -> Pod | None:
    """The pod to make room for: one that waits, or the one that a quota kept from being made."""
    if stuck.waiting:
        return stuck.waiting[0]
    if stuck.cause is not Cause.QUOTA_EXCEEDED or stuck.newest.template is None:
        return None
    return Pod(
        namespace=stuck.newest.namespace,
        name=f"of {stuck.newest.name}",
        uid="",
        resource_version="",
        labels=stuck.newest.template_labels,
        shape=stuck.newest.template,
    )


def _unjudgeable(view: ClusterView, stuck: Stuck, pod: Pod) -> str:
    if not stuck.waiting and any(
        quota.scoped for quota in view.quotas.values() if quota.namespace == pod.namespace
    ):
        return "its namespace has a ResourceQuota with scopes"
    return unjudgeable(view, pod)


class _Search:
    """The search for one plan; holds what its questions share."""

    def __init__(
        self, view: ClusterView, stuck: Stuck, pod: Pod, limits: Limits, now: float
    ) -> None:
        self.view, self.stuck, self.pod, self.limits = view, stuck, pod, limits
        self.min_ready = stuck.deployment.min_ready
        self.now = now
        self.old = {
            one.uid: [p for p in view.pods_of(one) if p.deletion is None] for one in stuck.old
        }
        self.sets = [one for one in stuck.old if self.old[one.uid]]
        everyone = [p for one in (*stuck.old, stuck.newest) for p in view.pods_of(one)]
        self.available = sum(self._available(p) for p in everyone)
        self.placed = sum(bool(p.node) and p.deletion is None for p in everyone)
        self.refusal: Refusal | None = None
        self._fits: dict[frozenset[str], str | None] = {}

    def _available(self, pod: Pod) -> bool:
        return pod.available(self.now, self.min_ready)

    def run(self) -> Freeing | Refusal:
        everything = frozenset(p.uid for pods in self.old.values() for p in pods)
        if not everything:
            return Refusal("NothingToFree", "it has no old pods that could make room")
        if self._place(everything) is None:
            return Refusal("DoesNotFit", self._nowhere(everything))
        first = [self._go_first(one) for one in self.sets]
        most = [len(self.old[one.uid]) - n for one, n in zip(self.sets, first, strict=True)]
        total = sum(most)
        for harmless in (True, False):
            for count in sorted({*range(1, min(total, _MOST_AT_ONCE) + 1), total} - {0}):
                for split in _splits(count, most):
                    sizes = [n and n + before for n, before in zip(split, first, strict=True)]
                    plan = self._try(sizes, harmless=harmless)
                    if plan is not None:
                        return plan
        return self.refusal or Refusal(
            "CannotChoosePod",
            "it would fit only if certain old pods went, and which ones go can't be chosen "
            "on this version of Kubernetes",
        )

    def _go_first(self, one: ReplicaSet) -> int:
        """How many pods go before any whose room is of use: those without a node hold none.

        What a quota counts they do hold.
        """
        if not self.stuck.waiting:
            return 0
        return sum(not p.node for p in self.old[one.uid])

    def _try(self, sizes: list[int], *, harmless: bool) -> Freeing | None:
        """A plan that takes `sizes[i]` pods of the i-th old ReplicaSet, if it holds."""
        wanted = [(one, count) for one, count in zip(self.sets, sizes, strict=True) if count]
        places = (
            sorted({p.node for one, _ in wanted for p in self.old[one.uid] if p.node})
            if self.view.honours_deletion_cost
            else [""]
        )
        for place in places:
            picks = [list(islice(self._picks(one, n, place), _MOST_PICKS)) for one, n in wanted]
            outcomes = list(islice(product(*picks), _MOST_PICKS))
            if len(outcomes) == _MOST_PICKS:
                continue  # too many to be sure of each
            nodes = [self._place(frozenset(p.uid for pick in o for p in pick)) for o in outcomes]
            first = outcomes[0]
            lost = max(sum(map(self._available, (p for s in o for p in s))) for o in outcomes)
            if None in nodes or (harmless and lost) or not self._allowed(outcomes, lost):
                continue
            takes = tuple(
                Take(
                    one,
                    one.replicas,
                    len(self.old[one.uid]) - n,
                    pick,
                    steered=bool(place) and len(pick) < len(self.old[one.uid]),
                )
                for (one, n), pick in zip(wanted, first, strict=True)
            )
            places_left = {node for node in nodes if node}
            node = places_left.pop() if len(places_left) == 1 else ""
            return Freeing(takes, node, self.available, self.available - lost)
        return None

    def _picks(self, one: ReplicaSet, count: int, place: str) -> Iterator[tuple[Pod, ...]]:
        """Every set of pods the ReplicaSet controller may delete when scaled down by `count`.

        It takes the unassigned first, then the not running, then the not ready (that much has
        never changed); among equals the lower deletion cost decides, which is how pods on `place`
        are preferred. Without that, any of the equals may go.
        """
        ranked: dict[tuple[bool, int, bool], list[Pod]] = {}
        for pod in self.old[one.uid]:
            running = {"Pending": 0, "Unknown": 1}.get(pod.phase, 2)
            rank = (bool(pod.node), running, pod.ready_since is not None)
            ranked.setdefault(rank, []).append(pod)
        certain: list[Pod] = []
        for rank in sorted(ranked):
            equals = ranked[rank]
            left = count - len(certain)
            if len(equals) <= left:
                certain += equals
            elif place:
                equals = sorted(equals, key=lambda p: (p.node != place, p.name))
                yield (*certain, *equals[:left])
                return
            else:
                yield from ((*certain, *some) for some in combinations(equals, left))
                return
            if len(certain) == count:
                yield tuple(certain)
                return

    def _place(self, gone: frozenset[str]) -> str | None:
        """The node where the new pod fits once `gone` have left; None if there is none."""
        if gone not in self._fits:
            self._fits[gone] = None
            if not self._over_quota(gone):
                fitting = (n.name for n in self._candidates(gone) if not self._why_not(n, gone))
                self._fits[gone] = next(fitting, None)
        return self._fits[gone]

    def _why_not(self, node: Node, gone: frozenset[str]) -> str | None:
        return why_not(self.view, self.pod, node, gone)

    def _over_quota(self, gone: frozenset[str]) -> str | None:
        if self.stuck.waiting:
            return None  # it was let in already
        leaving = (p for pods in self.old.values() for p in pods if p.uid in gone)
        return over_quota(self.view, self.pod, leaving)

    def _candidates(self, gone: frozenset[str]) -> list[Node]:
        """Nodes for which `gone` may change the answer: anti-affinity can reach beyond a node."""
        anywhere = not self.stuck.waiting or self.pod.shape.repels or list(self.view.repelling())
        if anywhere:
            return list(self.view.nodes.values())
        names = {p.node for pods in self.old.values() for p in pods if p.uid in gone}
        return [self.view.nodes[name] for name in sorted(names) if name in self.view.nodes]

    def _allowed(self, outcomes: list[tuple[tuple[Pod, ...], ...]], lost: int) -> bool:
        """Whether the limits permit it; the first refusal is kept for the explanation."""
        if node := self._opted_out(outcomes):
            self._refuse("NodeOptedOut", f"the node {node} is annotated {OPT_OUT}=disabled")
            return False
        if not lost:
            return True
        deployment, after = self.stuck.deployment, self.available - lost
        wanted = min(deployment.replicas, self.placed)
        floor = wanted - deployment.unavailable_allowed(wanted) - self.limits.extra_unavailable
        if after <= 0 and not self.limits.allow_none_available:
            self._refuse(
                "WouldStopService",
                "freeing room would leave no available pod for a while; "
                "allow_none_available says for which Deployments that may be",
            )
        elif after < floor:
            self._refuse(
                "TooFewAvailable",
                f"freeing room would leave {after} available of the {wanted} pods that have a "
                f"node, and fewer than {floor} is not allowed",
            )
        elif self.limits.respect_budgets and (name := self._over_budget(outcomes)):
            self._refuse(
                "DisruptionBudget", f"the PodDisruptionBudget {name} allows no disruption now"
            )
        else:
            return True
        return False

    def _opted_out(self, outcomes: list[tuple[tuple[Pod, ...], ...]]) -> str:
        """A node that its owner keeps Upkeep's hands off, and that a pod would go from."""
        names = {p.node for outcome in outcomes for pick in outcome for p in pick if p.node}
        nodes = (self.view.nodes.get(name) for name in sorted(names))
        return next((node.name for node in nodes if node and node.opted_out), "")

    def _over_budget(self, outcomes: list[tuple[tuple[Pod, ...], ...]]) -> str:
        for outcome in outcomes:
            left: dict[str, int] = {}
            for pod in (p for pick in outcome for p in pick if p.ready_since is not None):
                for budget in self.view.budgets_of(pod):
                    allowed = budget.allowed if budget.current else 0
                    left[budget.name] = left.get(budget.name, allowed) - 1
                    if left[budget.name] < 0:
                        return budget.name
        return ""

    def _refuse(self, code: str, message: str) -> None:
        if self.refusal is None:
            self.refusal = Refusal(code, message)

    def _nowhere(self, gone: frozenset[str]) -> str:
        if quota := self._over_quota(gone):
            return f"even with all {len(gone)} old pods gone the {quota} would be exceeded"
        reasons = [
            f"{node.name}: {why_not(self.view, self.pod, node, gone)}"
            for node in self._candidates(gone)[:3]
        ]
        return (
            f"pod {self.pod.name} fits nowhere even with all {len(gone)} old pods gone "
            f"({'; '.join(reasons) or 'they are on no known node'})"
        )


def _splits(count: int, most: list[int]) -> Iterator[tuple[int, ...]]:
    """Every way to take `count` pods from ReplicaSets that have `most[i]` each."""
    if not most:
        if count == 0:
            yield ()
        return
    for first in range(min(count, most[0]), -1, -1):
        for rest in _splits(count - first, most[1:]):
            yield (first, *rest)
