"""The network of a cluster of nodes: veth pairs, nothing that outlives the nodes.

The machine has one device per node, each node one to the machine and one to every other node. All
are veth pairs with an end in a node's network namespace, so they vanish with it; nothing on the
machine is switched on (no forwarding, no bridge, no firewall rule). Addresses are of 198.18.0.0/15,
which is set aside for tests (RFC 2544).
"""

from __future__ import annotations

import ipaddress
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.local.debian import require_installed
from tests.cluster.node import Node, NodeError

_RANGE = ipaddress.IPv4Network("198.18.0.0/15")
MAX_NODES = 7


@dataclass(frozen=True)
class Network:
    """The addresses of cluster number `number` (0 to 63): a /21, of which node K has the K-th /24
    for its pods."""

    number: int

    @property
    def cidr(self) -> ipaddress.IPv4Network:
        """All of it."""
        return list(_RANGE.subnets(new_prefix=21))[self.number]

    @property
    def machine(self) -> str:
        """The machine's address in it."""
        return str(self.cidr[1])

    def node(self, index: int) -> str:
        """A node's address; `index` is 1 for the first."""
        return str(self.cidr[10 + index])

    def pods(self, index: int) -> ipaddress.IPv4Network:
        """The range of a node's pods."""
        return list(self.cidr.subnets(new_prefix=24))[index]


def connect(node: Node, others: Sequence[Node]) -> None:
    """Connect a node with the machine, and with the nodes that are connected already."""
    if shutil.which("ip") is None:
        require_installed("iproute2")
    network, index = Network(node.state.network), node.state.index
    if index > MAX_NODES:
        raise NodeError(f"a cluster has room for {MAX_NODES} nodes")
    address, machine = network.node(index), network.machine
    _ip(None, "link", "add", "name", node.name, "type", "veth", *_peer("eth0", node))
    _ip(None, "address", "add", f"{machine}/32", "peer", f"{address}/32", "dev", node.name)
    _ip(None, "link", "set", node.name, "up")
    _ip(None, "route", "add", str(network.pods(index)), "via", address, "dev", node.name)
    _ip(node, "address", "add", f"{address}/32", "peer", f"{machine}/32", "dev", "eth0")
    _ip(node, "link", "set", "eth0", "up")
    _ip(node, "route", "add", "default", "via", machine, "dev", "eth0")  # kubeadm wants to see it
    # Nothing is out there. Clouds' metadata services, which a kubelet asks, are to fail at once.
    _ip(node, "route", "add", "unreachable", "169.254.0.0/16")
    node.run(["sysctl", "--write", "net.ipv4.ip_forward=1"])
    for other in others:
        _connect_nodes(network, node, other)


def _connect_nodes(network: Network, one: Node, two: Node) -> None:
    ends = {one: (two, f"node{two.state.index}"), two: (one, f"node{one.state.index}")}
    _ip(one, "link", "add", "name", ends[one][1], "type", "veth", *_peer(ends[two][1], two))
    for node, (other, device) in ends.items():
        own, far = (network.node(each.state.index) for each in (node, other))
        _ip(node, "address", "add", f"{own}/32", "peer", f"{far}/32", "dev", device)
        _ip(node, "link", "set", device, "up")
        pods = str(network.pods(other.state.index))
        _ip(node, "route", "add", pods, "via", far, "dev", device)


def _peer(name: str, node: Node) -> tuple[str, ...]:
    return ("peer", "name", name, "netns", str(node.pid))


def _ip(node: Node | None, *arguments: str) -> None:
    """iproute2 in a node's network, but in the machine's pid namespace: it names other nodes'
    processes. None: on the machine."""
    enter = [] if node is None else ["nsenter", f"--net=/proc/{node.pid}/ns/net"]
    done = subprocess.run(
        [*enter, "ip", *arguments], capture_output=True, text=True, check=False, cwd=Path("/")
    )
    if done.returncode != 0:
        where = "the machine" if node is None else node.name
        raise NodeError(f"on {where}: ip {' '.join(arguments)}: {done.stderr.strip()}")
