"""Certificates about to end, the whole way: exporter to remediator, every component on new ones.

It stands last in this folder, since a rotation restarts the whole control plane.
"""

from datetime import UTC, datetime, timedelta

import pytest

from deploy.local.observe import query
from deploy.local.stack import Stack
from tests.cluster.certificates import served_certificate
from tests.cluster.conditions import expire_certificates, restart_control_plane
from tests.cluster.kubeadm import KubeadmCluster
from tests.cluster.netns import Network
from tests.cluster.pki import LEAVES, read_certificates
from tests.end_to_end.conftest import People, firing, records_of, until

pytestmark = [pytest.mark.root, pytest.mark.cluster]


def test_certificates_about_to_end_come_back_a_year_away(
    stack: Stack, kubeadm_cluster: KubeadmCluster, people: People
) -> None:
    node = kubeadm_cluster.nodes[0]
    stack.stop("remediator")  # bringing it on restarts the API server, which it would remark on
    before = expire_certificates(kubeadm_cluster, node, timedelta(days=3))
    try:
        stack.start("remediator")
        until(
            "the alert",
            lambda: firing(stack, "UpkeepCertificateExpiring", name="apiserver"),
            stack,
        )
        until(
            "a remediation that succeeded",
            lambda: (
                [r.phase for r in records_of(stack, "rotate-certificates")][:1] == ["Succeeded"]
            ),
            stack,
            within=900,
        )
        until("its end", lambda: not firing(stack, "UpkeepCertificateExpiring"), stack)
        until(
            "people told", lambda: "UpkeepCertificateExpiring" in people.alerts("resolved"), stack
        )
        after = read_certificates(node.root / "etc/kubernetes")
        late = datetime.now(UTC) + timedelta(days=360)
        for name in set(before) & set(LEAVES) - {"kubelet.conf"}:
            assert after[name].serial_number != before[name].serial_number, name
            assert after[name].not_valid_after_utc > late, name
        address = Network(node.state.network).node(1)
        for name, port in (("apiserver", 6443), ("etcd-server", 2379), ("etcd-peer", 2380)):
            served = served_certificate(address, port)
            assert served is not None
            assert served.serial_number == after[name].serial_number, name
        # Ten certificates fired; a node is one target.
        assert len(records_of(stack, "rotate-certificates")) == 1
        stale = "upkeep_certificate_stale == 1"
        until("nothing stale", lambda: not query(stack.url("prometheus"), stale), stack)
    except BaseException:
        expire_certificates(kubeadm_cluster, node, timedelta(days=365), restart=False)
        restart_control_plane(kubeadm_cluster, node)
        raise
