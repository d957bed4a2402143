"""Rotation and recovery on three joined control planes with stacked etcd.

The order of the tests is that of the file: each leaves a healthy cluster with a year to live.
"""

import os
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from exporter.checks.certificates import Root
from exporter.kubernetes.client import ApiError
from remediator.fixes.certificates.apiserver import ApiServer
from remediator.fixes.certificates.lease import NAME, RotationLease
from remediator.fixes.certificates.members import stored_members
from remediator.fixes.certificates.plan import RefusedError
from tests.certificates.three_nodes import (
    Client,
    Run,
    address,
    assert_healthy,
    eventually,
    run,
    serials,
)
from tests.cluster.certificates import component_pid, served_certificate
from tests.cluster.kubeadm import COMPONENTS, KubeadmCluster
from tests.cluster.node import Node
from tests.cluster.pki import set_remaining

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.cluster]


def give(cluster: KubeadmCluster, remaining: timedelta) -> None:
    """Certificates with so much left on every node, and etcd and API servers that serve them."""
    for node in cluster.nodes:
        signed = set_remaining(node.root / "etc/kubernetes", remaining)
        assert len(signed) == 10
        eventually(
            lambda node=node, signed=signed: (  # type: ignore[misc]
                served_certificate(address(node), 2380) == signed["etcd-peer"]
            )
        )


def lease(node: Node, holder: Node, later: float = 0.0) -> RotationLease:
    """The Lease as `holder` sees it, by way of `node`; later: seconds."""
    moment = datetime.now(UTC).timestamp() + later
    return RotationLease(ApiServer(Root(node.root)), holder.name, 600, lambda: moment)


@contextmanager
def frozen_etcd(node: Node) -> Iterator[None]:
    """A member that does not answer, and comes back as it was."""
    pid = component_pid(node, "etcd")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_c6_one_node_after_another_and_no_client_notices(joined_cluster: KubeadmCluster) -> None:
    a, b, c = joined_cluster.nodes
    assert len(stored_members(Root(c.root))) == 3
    give(joined_cluster, timedelta(days=3))
    with Client(joined_cluster.kubeconfig) as client:
        both = [Run(a), Run(b)]
        ended = {each.node: each.end() for each in both}
        won, lost = sorted(ended, key=lambda node: ended[node]["phase"] != "Succeeded")
        assert ended[won]["phase"] == "Succeeded"
        assert (ended[lost]["phase"], ended[lost]["reason"]) == ("Skipped", "AnotherRotating")
        for node in (lost, c):
            assert run(node)["phase"] == "Succeeded"
    print(
        f"{client.asked} requests, {len(client.failed)} failed; the longest took "
        f"{client.longest:.1f} s: {client.failed}"
    )
    assert client.asked > 100
    # None on an idle machine. A busy one may keep etcd's members from a leader for a moment.
    assert len(client.failed) <= client.asked / 100, client.failed
    assert_healthy(joined_cluster)
    held = joined_cluster.get("lease", NAME, "--namespace=kube-system")
    assert not held["spec"].get("holderIdentity")


async def test_c19_a_joined_node_that_holds_the_lease_is_alive_or_gone(
    joined_cluster: KubeadmCluster,
) -> None:
    a, _, c = joined_cluster.nodes
    await lease(c, c).acquire()
    with pytest.raises(RefusedError, match=f"node {c.name} is rotating"):
        await lease(a, a).acquire()
    with pytest.raises(RefusedError, match=f"node {c.name} began to rotate and never ended"):
        await lease(a, a, later=3600).acquire()
    assert run(a, "--force")["reason"] == "AnotherRotating"
    c.stop("kubelet")
    try:
        joined_cluster.kubectl("delete", "node", c.name)
        with pytest.raises(RefusedError, match=f"node {c.name} is rotating"):
            await lease(a, a).acquire()
        await lease(a, a, later=3600).acquire()
        await lease(a, a).release()
    finally:
        c.start("kubelet")
    eventually(lambda: c.name in joined_cluster.kubectl("get", "nodes"))
    for role in ("master", "control-plane"):  # kubeadm's, which a kubelet may not give itself
        label = f"node-role.kubernetes.io/{role}="
        joined_cluster.kubectl("label", "--overwrite", "node", c.name, label)
    assert run(a, "--force", "--dry-run")["reason"] in {"PeerNotReady", "DryRun"}
    assert_healthy(joined_cluster)


class Away(ApiServer):
    """An API server that is away for the first requests."""

    def __init__(self, node: Node, requests: int) -> None:
        super().__init__(Root(node.root))
        self.left = requests

    async def get(self, path: str) -> Any:
        if self.left > 0:
            self.left -= 1
            raise ApiError(0, "it is away")
        return await super().get(path)


async def test_c27_a_lease_is_given_back_once_the_api_answers_again(
    joined_cluster: KubeadmCluster,
) -> None:
    a, b, _ = joined_cluster.nodes
    await lease(a, a).acquire()
    api = Away(a, 2)
    assert await RotationLease(api, a.name, 600, lambda: datetime.now(UTC).timestamp()).release()
    assert api.left == 0
    await lease(b, b).acquire()
    await lease(b, b).release()


def test_c5_nothing_is_restarted_while_a_peer_is_down(joined_cluster: KubeadmCluster) -> None:
    a, _, c = joined_cluster.nodes
    before = {name: component_pid(a, name) for name in COMPONENTS}
    with frozen_etcd(c):
        refused = run(a, "--force")
    assert (refused["phase"], refused["reason"]) == ("Skipped", "EtcdUnhealthy")
    assert c.name in refused["message"]
    assert {name: component_pid(a, name) for name in COMPONENTS} == before


def test_c5_c7_a_peer_lost_on_the_way_is_a_failure_that_stops_the_others(
    joined_cluster: KubeadmCluster,
) -> None:
    a, b, c = joined_cluster.nodes
    old, etcd = serials(a), component_pid(a, "etcd")
    admin = a.root / "etc/kubernetes/admin.conf"
    written = admin.stat().st_mtime
    rotation = Run(a, "--force", component_timeout=45)
    eventually(lambda: admin.stat().st_mtime != written, pause=0.05)
    with frozen_etcd(c):  # kubeadm is at work on a; etcd's turn comes after it
        failed = rotation.end()
    assert (failed["phase"], failed["reason"]) == ("Failed", "RolledBack")
    assert "etcd" in failed["message"]
    assert serials(a) == old
    assert component_pid(a, "etcd") == etcd
    eventually(lambda: run(b, "--force")["reason"] == "AnotherFailed")  # first, c is to be well
    refused = run(b, "--force")
    assert a.name in refused["message"]
    command = refused["message"].partition("once it is mended: ")[2]
    joined_cluster.kubectl(*shlex.split(command)[1:])
    assert run(b, "--force", "--dry-run")["reason"] == "DryRun"
    assert_healthy(joined_cluster, restarted=("kube-controller-manager", "kube-scheduler"))


def test_c13_c25_three_nodes_with_expired_certificates_are_recovered(
    joined_cluster: KubeadmCluster, *, soak: bool
) -> None:
    a, b, c = joined_cluster.nodes
    expire(joined_cluster)
    left_to_people = run(a)
    assert left_to_people["reason"] == "RecoveryByPerson", left_to_people
    assert all(node.name in left_to_people["message"] for node in joined_cluster.nodes)
    alone = run(a, "--force", component_timeout=15)
    assert (alone["phase"], alone["reason"]) == ("Failed", "AwaitingPeers")
    assert f"{b.name} has expired; {c.name} has expired" in alone["message"]
    together = [Run(node, "--force") for node in (b, c)]
    assert [each.end()["phase"] for each in together] == ["Succeeded", "Succeeded"]
    assert_healthy(joined_cluster)  # a too, to which nobody came again
    if soak:
        expire(joined_cluster, everything=True)
        together = [Run(node, "--force") for node in joined_cluster.nodes]
        assert [each.end()["phase"] for each in together] == ["Succeeded"] * 3
        assert_healthy(joined_cluster)


def expire(cluster: KubeadmCluster, *, everything: bool = False) -> None:
    """Certificates that ended yesterday, and members of etcd that lost each other by it.

    everything: no component runs, and no kubelet has reached the API, as after a power failure.
    """
    give(cluster, timedelta(days=-1))
    names = COMPONENTS if everything else ("etcd",)
    for node in cluster.nodes:
        if everything:
            node.stop("kubelet")
        for name in names:
            if (pid := component_pid(node, name)) is not None:
                os.kill(pid, signal.SIGKILL)
    for node in cluster.nodes:
        node.start("kubelet")
    time.sleep(3)
    assert cluster.kubectl("get", "--raw=/readyz", check=False, timeout=30) != "ok"
