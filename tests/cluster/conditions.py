"""The real conditions, brought on in a real cluster: one door to all three.

Certificates that end when a test wants it, pods that leave zombies, Deployments that are stuck.
"""

from tests.cluster.certificates import expire_certificates, restart_control_plane
from tests.cluster.stuck import StuckDeployment, namespace, stuck_deployment
from tests.cluster.zombie_makers import zombie_maker
from tests.cluster.zombie_pods import ZombiePod, zombie_pod

__all__ = [
    "StuckDeployment",
    "ZombiePod",
    "expire_certificates",
    "namespace",
    "restart_control_plane",
    "stuck_deployment",
    "zombie_maker",
    "zombie_pod",
]
