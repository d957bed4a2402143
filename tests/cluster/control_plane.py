"""A real Kubernetes control plane on loopback: etcd, apiserver, controller-manager, scheduler.

What Deployments, quotas and the scheduler really do is what Upkeep has to get right, so none of it
is imitated; only nodes are missing (hollow.py stands in for those, and kubeadm.py has a real one).
It needs neither root nor namespaces and is up in some fifteen seconds. The PKI is kubeadm's, the
flags are those of kubeadm's static pods, as far as they make sense without a node.

By hand: `python -m tests.cluster.control_plane [--nodes N]`; Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from deploy.local.cache import Progress, print_progress
from deploy.local.debian import DebianError, binary
from tests.cluster.api import Api, ApiError
from tests.cluster.hollow import HollowNodes
from tests.cluster.kubernetes_build import Binaries, BuildError, kubernetes_binaries
from tests.cluster.pki import Pki, kubeadm_pki
from tests.cluster.ports import reserved_ports
from tests.cluster.processes import ClusterError, Component
from tests.cluster.static_flags import Ports, commands, health_checks

HEALTHY_SECONDS = 120
"""How long a component may take on a busy machine; on an idle one it's a few seconds."""


class ControlPlane:
    """A running control plane; made by control_plane()."""

    def __init__(
        self, directory: Path, pki: Pki, ports: Ports, components: Sequence[Component]
    ) -> None:
        self.directory = directory
        """Everything of it: rootfs/etc/kubernetes, etcd's data, logs."""
        self.pki = pki
        self.ports = ports
        self.binaries = pki.binaries
        self.server = f"https://127.0.0.1:{ports.apiserver}"
        self.components = {component.name: component for component in components}
        """In the order in which they start."""

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.pki.directory / "admin.conf"

    @property
    def pki_dir(self) -> Path:
        """What a node has as /etc/kubernetes/pki."""
        return self.pki.directory / "pki"

    @property
    def api(self) -> Api:
        """A client with the administrator's rights."""
        return Api(self.kubeconfig)

    def log(self, component: str) -> Path:
        """The log of "etcd", "kube-apiserver", "kube-controller-manager" or "kube-scheduler"."""
        return self.components[component].log

    def kubectl(self, *arguments: str, stdin: str = "", kubeconfig: Path | None = None) -> str:
        """Run kubectl (as administrator, or with another kubeconfig); its output.

        Raises ClusterError with what kubectl said if it fails.
        """
        cache = self.directory / "kubectl-cache"
        done = subprocess.run(
            [str(self.binaries.kubectl), "--cache-dir", str(cache), *arguments],
            env={**os.environ, "KUBECONFIG": str(kubeconfig or self.kubeconfig)},
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise ClusterError(f"kubectl {' '.join(arguments)} failed: {done.stderr.strip()}")
        return done.stdout

    def apply(self, *objects: dict[str, Any]) -> None:
        """`kubectl apply` of objects given as Python values."""
        self.kubectl("apply", "--filename=-", stdin=yaml.safe_dump_all(objects))

    def start(self, component: str) -> None:
        """Start a component that was stopped; returns when it is healthy."""
        self.components[component].launch()
        self.components[component].wait_healthy(HEALTHY_SECONDS)

    def stop(self, component: str, *, kill: bool = False) -> None:
        """End a component with SIGTERM, or SIGKILL with `kill`; returns when it has ended.

        By SIGTERM the apiserver takes a minute, as it waits for open watches to end.
        """
        self.components[component].stop(kill=kill)

    def restart(self, component: str, *, kill: bool = False) -> None:
        """stop() and start(): the same ports, data and certificates' files."""
        self.stop(component, kill=kill)
        self.start(component)

    def service_account(
        self,
        name: str,
        rules: Sequence[dict[str, Any]],
        *,
        namespace: str = "default",
        cluster_wide: bool = True,
    ) -> Path:
        """Make a service account with exactly these RBAC rules; a kubeconfig with its token.

        `rules` are those of a Role: mappings with apiGroups, resources and verbs. They hold
        everywhere, or in its own namespace only. The token ends after a day.
        """
        kind = "ClusterRole" if cluster_wide else "Role"
        group = "rbac.authorization.k8s.io"
        metadata = {"name": name, "namespace": namespace}
        subject = {"kind": "ServiceAccount", **metadata}
        reference = {"apiGroup": group, "kind": kind, "name": name}
        version = f"{group}/v1"
        self.apply(
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
            {"apiVersion": version, "kind": kind, "metadata": metadata, "rules": list(rules)},
            {
                "apiVersion": version,
                "kind": f"{kind}Binding",
                "metadata": metadata,
                "roleRef": reference,
                "subjects": [subject],
            },
        )
        answer = self.api.request(
            "POST",
            f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token",
            {"apiVersion": "authentication.k8s.io/v1", "spec": {"expirationSeconds": 86400}},
        )
        config = yaml.safe_load(self.kubeconfig.read_text())
        config["users"] = [{"name": name, "user": {"token": answer["status"]["token"]}}]
        config["contexts"][0]["context"] |= {"user": name, "namespace": namespace}
        path = self.directory / f"{namespace}-{name}.conf"
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(config))
        return path

    def wait_ready(self) -> None:
        """Wait until a Deployment would be acted on: all healthy, and the first pod may be made."""
        for component in self.components.values():
            component.wait_healthy(HEALTHY_SECONDS)
        deadline = time.monotonic() + HEALTHY_SECONDS
        while not self._has_default_account():
            if time.monotonic() > deadline:
                controller = self.components["kube-controller-manager"]
                raise controller.error("the service account default/default wasn't made")
            time.sleep(0.1)

    def _has_default_account(self) -> bool:
        try:
            self.api.request("GET", "/api/v1/namespaces/default/serviceaccounts/default")
        except ApiError as error:
            if error.code != 404:
                raise
            return False
        return True


@contextmanager
def control_plane(
    workdir: Path,
    *,
    name: str = "control-plane",
    apiserver_flags: Sequence[str] = (),
    controller_manager_flags: Sequence[str] = (),
    scheduler_flags: Sequence[str] = (),
    binaries: Binaries | None = None,
    progress: Progress = print_progress,
) -> Iterator[ControlPlane]:
    """A control plane in the new folder `workdir`/`name`, ready for use, until the context ends.

    Extra flags are appended to a component's own, so they win. At the end every process is killed
    and the folder stays, logs included. If this process dies, so do they, at once; they belong to
    the calling *thread*, which has to live as long (see die_with_parent.py).

    Raises ClusterError with the failing component's last lines.
    """
    directory = workdir.absolute() / name
    directory.mkdir(parents=True)
    began = time.monotonic()
    with ExitStack() as stack:
        ports = Ports(*stack.enter_context(reserved_ports(Ports.count())))
        endpoint = f"127.0.0.1:{ports.apiserver}"
        programs = binaries or kubernetes_binaries(progress=progress)
        etcd = binary("etcd", progress=progress)
        progress(f"control plane {programs.version}: making its certificates with kubeadm")
        pki = kubeadm_pki(directory / "rootfs", endpoint=endpoint, binaries=programs)
        for user in ("controller-manager", "scheduler"):  # kubeadm lets them use the node's address
            kubeconfig = pki.directory / f"{user}.conf"
            set_cluster = ["config", "set-cluster", "kubernetes", f"--server=https://{endpoint}"]
            subprocess.run(
                [str(pki.binaries.kubectl), "--kubeconfig", str(kubeconfig), *set_cluster],
                check=True,
                capture_output=True,
            )
        lines = commands(pki, ports, etcd=etcd, data=directory / "etcd")
        lines["kube-apiserver"] += apiserver_flags
        lines["kube-controller-manager"] += controller_manager_flags
        lines["kube-scheduler"] += scheduler_flags
        health = health_checks(pki, ports)
        components = [
            Component(
                component,
                command,
                log=directory / "logs" / f"{component}.log",
                healthy=health[component],
            )
            for component, command in lines.items()
        ]
        plane = ControlPlane(directory, pki, ports, components)
        for component in components:  # ends in the reverse order
            stack.callback(component.stop, kill=True)
            progress(f"control plane {programs.version}: starting {component.name}")
            component.launch()
            if component.name in {"etcd", "kube-apiserver"}:  # the others exit without them
                component.wait_healthy(HEALTHY_SECONDS)
        plane.wait_ready()
        progress(
            f"control plane {pki.binaries.version} ready after {time.monotonic() - began:.0f} s: "
            f"{plane.server}"
        )
        yield plane


def main(arguments: Sequence[str]) -> int:
    """Run a control plane until Ctrl-C or SIGTERM; `KUBECONFIG=…` is the last line at the start."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.control_plane")
    parser.add_argument("--nodes", type=int, default=1, help="hollow nodes (default: 1)")
    parser.add_argument("--workdir", type=Path, help="an empty or new folder to keep afterwards")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    workdir = options.workdir or Path(tempfile.mkdtemp(prefix="upkeep-control-plane-"))
    try:
        with control_plane(workdir) as plane, HollowNodes(plane.kubeconfig) as nodes:
            for number in range(1, options.nodes + 1):
                nodes.add(f"hollow-{number}")
            print(f"KUBECONFIG={plane.kubeconfig}", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        print_progress("ended")
    except (BuildError, ClusterError, DebianError) as error:
        print_progress(str(error))
        return 1
    finally:
        if options.workdir is None:
            shutil.rmtree(workdir, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
