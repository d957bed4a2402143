"""A real etcd with TLS below a root of its own, laid out as kubeadm does it or as Kubespray does.

No cluster is needed for what a snapshot can meet: a gateway that is off, a stream that is cut, a
disk that fills up. A proxy stands before its client port, which passes everything on until told to
cut a long answer short.
"""

import asyncio
import os
import shutil
import ssl
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from deploy.local.debian import binary
from exporter.checks.certificates import Root
from exporter.checks.certificates.components import etcd_environment
from remediator.fixes.certificates.etcd import Etcd, find_access
from tests.cluster.kubespray import ENVIRONMENT, write_host_etcd
from tests.cluster.pki import Pki
from tests.cluster.ports import reserved_ports
from tests.cluster.processes import Component

Layout = Literal["stacked", "kubespray"]


@dataclass(frozen=True)
class RealEtcd:
    """A running one."""

    rootfs: Path
    listens: int
    """Its own client port."""
    named: int
    """The client port that the host's files name: the proxy's, where there is one."""

    @property
    def client(self) -> Etcd:
        """As Upkeep reaches it."""
        access = find_access(Root(self.rootfs), "/etc/kubernetes/pki")
        assert access is not None
        return Etcd(Root(self.rootfs), access)

    @property
    def backups(self) -> Path:
        """Where Upkeep puts them by default."""
        return self.rootfs / "var/lib/upkeep/backups"

    def etcdctl(self, *words: str, stdin: str = "") -> str:
        """Debian's own, past the proxy; what it printed."""
        access = find_access(Root(self.rootfs), "/etc/kubernetes/pki")
        assert access is not None
        here = [f"{self.rootfs}{path}" for path in (access.ca, access.certificate, access.key)]
        flags = [f"--{n}={p}" for n, p in zip(("cacert", "cert", "key"), here, strict=True)]
        return subprocess.run(
            [binary("etcdctl"), f"--endpoints=https://127.0.0.1:{self.listens}", *flags, *words],
            env={"ETCDCTL_API": "3"},
            input=stdin,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    def fill(self, count: int) -> None:
        """Put `count` values of 100 KiB each into it."""
        for number in range(count):
            self.etcdctl("put", f"filler/{number}", stdin=os.urandom(50 * 1024).hex())

    def install_etcdctl(self) -> None:
        """Give the host one."""
        target = self.rootfs / "usr/local/bin/etcdctl"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(binary("etcdctl"), target)


@contextmanager
def real_etcd(pki: Pki, layout: Layout, *, gateway: bool = True) -> Iterator[RealEtcd]:
    """For as long as the context. The files of `layout` are added to those of the PKI."""
    with reserved_ports(3) as (listens, peer, named):
        root = pki.rootfs
        if layout == "kubespray":
            shutil.rmtree(pki.directory / "pki/etcd")
            write_host_etcd(root, "node-1", "127.0.0.1", client_port=named, peer_port=peer)
            named_flags = etcd_environment(Root(root))
            assert (root / ENVIRONMENT.lstrip("/")).exists()
        else:
            named_flags = _write_manifest(pki, named, peer)
        flags = {
            name: f"{root}{value}" if value.startswith("/") else value
            for name, value in named_flags.items()
        }
        flags["listen-client-urls"] = f"https://127.0.0.1:{listens}"
        flags["enable-grpc-gateway"] = str(gateway).lower()
        etcd = Component(
            "etcd",
            [str(binary("etcd")), *(f"--{name}={value}" for name, value in flags.items())],
            log=root / "etcd.log",
            healthy=lambda: _is_healthy(root, listens),
        )
        etcd.launch()
        try:
            etcd.wait_healthy(60)
            yield RealEtcd(root, listens, named)
        finally:
            etcd.stop(kill=True)


def _write_manifest(pki: Pki, client: int, peer: int) -> dict[str, str]:
    """The static pod's manifest as kubeadm writes it; its flags."""
    folder = "/etc/kubernetes/pki/etcd"
    flags = {
        "advertise-client-urls": f"https://127.0.0.1:{client}",
        "cert-file": f"{folder}/server.crt",
        "client-cert-auth": "true",
        "data-dir": "/var/lib/etcd",
        "initial-advertise-peer-urls": f"https://127.0.0.1:{peer}",
        "initial-cluster": f"node-1=https://127.0.0.1:{peer}",
        "key-file": f"{folder}/server.key",
        "listen-client-urls": f"https://127.0.0.1:{client}",
        "listen-peer-urls": f"https://127.0.0.1:{peer}",
        "name": "node-1",
        "peer-cert-file": f"{folder}/peer.crt",
        "peer-client-cert-auth": "true",
        "peer-key-file": f"{folder}/peer.key",
        "peer-trusted-ca-file": f"{folder}/ca.crt",
        "trusted-ca-file": f"{folder}/ca.crt",
    }
    manifest = pki.directory / "manifests/etcd.yaml"
    manifest.parent.mkdir(exist_ok=True)
    command = ["etcd", *(f"--{name}={value}" for name, value in flags.items())]
    pod = {"kind": "Pod", "spec": {"containers": [{"name": "etcd", "command": command}]}}
    manifest.write_text(yaml.safe_dump(pod))
    return flags


def _is_healthy(root: Path, port: int) -> bool:
    access = find_access(Root(root), "/etc/kubernetes/pki")
    assert access is not None
    tls = ssl.create_default_context(cafile=f"{root}{access.ca}")
    tls.load_cert_chain(f"{root}{access.certificate}", f"{root}{access.key}")
    with urllib.request.urlopen(
        f"https://127.0.0.1:{port}/health", context=tls, timeout=5
    ) as answer:
        return b"true" in answer.read()


@asynccontextmanager
async def proxy(etcd: RealEtcd, *, cut_after: int = 1 << 60) -> AsyncIterator[None]:
    """The port that the host's files name. An answer longer than `cut_after` bytes is cut there:
    the connection then just ends, as a broken network or a dying etcd ends it."""
    tasks: set[asyncio.Task[None]] = set()

    async def pass_on(
        source: asyncio.StreamReader, target: asyncio.StreamWriter, most: int
    ) -> None:
        with suppress(ConnectionError):
            while most > 0 and (data := await source.read(min(most, 16384))):
                most -= len(data)
                target.write(data)
                await target.drain()
        target.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", etcd.listens)
        async with asyncio.TaskGroup() as group:
            group.create_task(pass_on(reader, back, 1 << 60))
            group.create_task(pass_on(there, writer, cut_after))

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(connected(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", etcd.named)
    try:
        yield
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
