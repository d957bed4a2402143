"""Several nodes in one network: they, and the machine, reach each other; nothing else changes."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster import lifetime, netns
from tests.cluster.netns import Network
from tests.cluster.node import Node, NodeError, start_node
from tests.cluster.node_init import Service
from tests.cluster.test_containerd import eventually, traces

_SERVE = """
import socket, sys
with socket.create_server(("", 7000)) as server:
    while True:
        connection, _ = server.accept()
        with connection:
            connection.sendall(socket.gethostname().encode())
"""
_ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000), 5) as connection:
    print(connection.recv(100).decode(), end="")
"""


def test_networks_do_not_overlap() -> None:
    networks = [Network(number) for number in range(lifetime.NETWORKS)]
    assert len({network.cidr for network in networks}) == lifetime.NETWORKS
    for network in networks:
        pods = [network.pods(index) for index in range(1, netns.MAX_NODES + 1)]
        own = ipaddress.IPv4Network(f"{network.machine}/24", strict=False)
        assert all(part.subnet_of(network.cidr) for part in [own, *pods])
        assert len({own, *pods}) == netns.MAX_NODES + 1


@pytest.mark.root
@pytest.mark.debian
def test_nodes_of_a_cluster_reach_each_other_and_leave_nothing(tmp_path: Path) -> None:
    before = subprocess.check_output(["ip", "route"], text=True)
    forwarding = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    nodes: list[Node] = []
    with ExitStack() as stack:
        for index in (1, 2, 3):
            cluster = nodes[0].state.cluster if nodes else ""
            state = lifetime.reserve(
                tmp_path, cluster=cluster, index=index, detached=False, keep_logs=True
            )
            serve = Service("answer", [sys.executable, "-c", _SERVE])
            node = start_node(state, services=[serve], programs={})
            stack.callback(node.remove)
            netns.connect(node, nodes)
            nodes.append(node)
        network = Network(nodes[0].state.network)
        addresses = {node: network.node(node.state.index) for node in nodes}
        for asked, address in addresses.items():
            ask = [sys.executable, "-c", _ASK, address]
            assert eventually(lambda argv=ask: _ran(argv))  # type: ignore[misc]
            assert subprocess.check_output(ask, text=True) == asked.name
            for asking in nodes:
                assert asking.run(ask).stdout == asked.name
        with pytest.raises(NodeError, match="No route to host"):
            nodes[0].run([sys.executable, "-c", _ASK, "169.254.169.254"])
    assert [traces(node.name, []) for node in nodes] == [[], [], []]
    assert network.machine not in subprocess.check_output(["ip", "address"], text=True)
    ours = {line for line in before.splitlines() if "dev upkeep-" not in line}
    after = subprocess.check_output(["ip", "route"], text=True).splitlines()
    assert {line for line in after if "dev upkeep-" not in line} == ours
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == forwarding


def _ran(argv: list[str]) -> bool:
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0
