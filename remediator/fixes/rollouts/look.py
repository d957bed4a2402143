"""A fresh look at one Deployment: every object read from the API server's store, nothing cached.

The same check as the exporter's runs on it, so that the decision can't rest on an older world than
the one it changes.
"""

import msgspec

from exporter.checks.objects import Deployment, DisruptionBudget
from exporter.checks.rollouts import Moving, Stuck, examine
from exporter.checks.view import ClusterView
from exporter.kubernetes import ApiError, Client, decode
from remediator.model import Target


class Look(msgspec.Struct, frozen=True):
    """What was seen. `stuck` is the check's verdict."""

    view: ClusterView
    deployment: Deployment
    stuck: Stuck | Moving
    namespace_opted_out: bool = False


async def look(api: Client, target: Target, now: float, *, whole: bool) -> Look | None:
    """Read the Deployment and its pods; with `whole` also all that the fit test needs.

    None where there is no such Deployment. Raises `ApiError` where something can't be read.
    """
    space = target.namespace
    try:
        deployment = await api.get(decode.DEPLOYMENTS, space, target.deployment)
    except ApiError as error:
        if error.status == 404:
            return None
        raise
    view = ClusterView()
    view.put_deployment(deployment)
    for replica_set in await api.list(decode.REPLICA_SETS, space):
        view.put_replica_set(replica_set)
    opted_out = False
    if whole:
        opted_out = (await api.get(decode.NAMESPACES, "", space)).opted_out
        view.honours_deletion_cost = await api.version() >= (1, 22)
        for node in await api.list(decode.NODES):
            view.put_node(node)
        for budget in await _budgets(api, space):
            view.put_budget(budget)
        for quota in await api.list(decode.QUOTAS, space):
            view.put_quota(quota)
        for pod in await api.list(decode.PODS):
            view.put_pod(pod)
        await _scale_ups(api, view, space)
    else:
        for pod in await api.list(decode.PODS, space):
            view.put_pod(pod)
    return Look(view, deployment, examine(view, deployment, now), opted_out)


async def _budgets(api: Client, namespace: str) -> list[DisruptionBudget]:
    try:
        return await api.list(decode.BUDGETS, namespace)
    except ApiError as error:
        if error.status != 404:
            raise
        return await api.list(decode.BUDGETS_BEFORE_1_21, namespace)


async def _scale_ups(api: Client, view: ClusterView, namespace: str) -> None:
    """Events are a courtesy: without leave to read them the autoscaler's plans stay unknown."""
    try:
        events = await api.list(decode.SCALE_UPS, namespace)
    except ApiError as error:
        if error.status != 403:
            raise
        return
    for event in events:
        view.note_scale_up(event.pod_uid, event.at)
