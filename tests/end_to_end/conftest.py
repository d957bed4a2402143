"""The whole chain on the real cluster: one stack for the tests of this folder, and who is told."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deploy.local.node_stack import node_settings
from deploy.local.observe import Remediation, alerts, remediations
from deploy.local.stack import Stack
from tests.cluster.kubeadm import KubeadmCluster
from tests.cluster.netns import Network

PATIENCE = 240.0
"""Seconds for what takes twenty on an idle machine."""


@dataclass
class People:
    """A webhook that stands for those who are told; what they got."""

    url: str
    messages: list[dict[str, Any]] = field(default_factory=list)

    def alerts(self, status: str) -> set[str]:
        """Names of the alerts they were told of with that status."""
        return {
            alert["labels"]["alertname"]
            for message in list(self.messages)
            for alert in message["alerts"]
            if alert["status"] == status
        }


@pytest.fixture(scope="package")
def people(kubeadm_cluster: KubeadmCluster) -> Iterator[People]:
    """Listens on the machine, at the address that the node reaches."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            told.messages.append(json.loads(self.rfile.read(length)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - theirs
            pass

    address = Network(kubeadm_cluster.nodes[0].state.network).machine
    server = ThreadingHTTPServer((address, 0), Handler)
    told = People(f"http://{address}:{server.server_address[1]}/")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield told
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="package")
def stack(
    kubeadm_cluster: KubeadmCluster, people: People, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """Exporter, remediator, Prometheus and Alertmanager on the cluster's node, and it enforces."""
    settings = replace(node_settings(kubeadm_cluster), people=people.url)
    with Stack(tmp_path_factory.mktemp("end-to-end") / "stack", settings) as running:
        yield running


def until(
    what: str, condition: Callable[[], bool], stack: Stack, *, within: float = PATIENCE
) -> None:
    """Wait; on failure the remediator's and the exporter's last lines are in the report."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            words = [stack.program(name).last_words("runs") for name in ("exporter", "remediator")]
            records = [str(record) for record in records_of(stack)]
            pytest.fail("\n".join([f"not seen within {within:.0f} s: {what}", *records, *words]))
        time.sleep(0.5)


def records_of(stack: Stack, fix: str = "", target: str = "") -> list[Remediation]:
    """The remediator's records of a fix whose target's words contain `target`, newest first."""
    filters = {"fix": fix} if fix else {}
    found = remediations(stack.url("remediator"), stack.token, **filters)
    return [record for record in found if target in record.target]


def log_of(stack: Stack, name: str) -> str:
    """All that a program has logged."""
    return Path(stack.directory / f"{name}.log").read_text(errors="replace")


def firing(stack: Stack, alert_name: str, /, **labels: str) -> bool:
    """Whether that alert fires with these labels."""
    return any(
        alert.name == alert_name
        and alert.state == "firing"
        and all(alert[label] == value for label, value in labels.items())
        for alert in alerts(stack.url("prometheus"))
    )
