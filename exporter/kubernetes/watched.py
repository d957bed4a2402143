"""What the exporter watches, and how each kind gets into the view."""

from typing import Any

from exporter.checks.view import ClusterView
from exporter.kubernetes import decode
from exporter.kubernetes.cache import Resource
from exporter.kubernetes.decode import ScaleUp


def watched(view: ClusterView, selector: str) -> list[Resource[Any]]:
    """The resources behind the rollout check; `selector` limits the Deployments alone.

    Every pod and ReplicaSet is needed whatever the selector is: room on a node is what all pods
    leave of it.
    """
    scale_ups: dict[str, ScaleUp] = {}

    def put_scale_up(event: ScaleUp) -> None:
        scale_ups[event.key] = event
        view.note_scale_up(event.pod_uid, event.at)

    def drop_scale_up(key: str) -> None:
        if (event := scale_ups.pop(key, None)) is not None:
            view.scale_ups.pop(event.pod_uid, None)
            for other in scale_ups.values():  # few: one for a pod that waits, for an hour
                if other.pod_uid == event.pod_uid:
                    view.note_scale_up(other.pod_uid, other.at)

    return [
        Resource(decode.NODES, view.put_node, view.drop_node, keys=lambda: set(view.nodes)),
        Resource(
            decode.DEPLOYMENTS,
            view.put_deployment,
            view.drop_deployment,
            keys=lambda: set(view.deployments),
            labels=selector,
        ),
        Resource(
            decode.REPLICA_SETS,
            view.put_replica_set,
            view.drop_replica_set,
            keys=lambda: set(view.replica_sets),
        ),
        Resource(decode.PODS, view.put_pod, view.drop_pod, keys=lambda: set(view.pods)),
        Resource(
            decode.BUDGETS,
            view.put_budget,
            view.drop_budget,
            keys=lambda: set(view.budgets),
            before=decode.BUDGETS_BEFORE_1_21,
        ),
        Resource(decode.QUOTAS, view.put_quota, view.drop_quota, keys=lambda: set(view.quotas)),
        Resource(
            decode.SCALE_UPS,
            put_scale_up,
            drop_scale_up,
            keys=lambda: set(scale_ups),
            optional=True,
        ),
    ]
