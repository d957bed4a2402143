"""An API server for a PKI that has none: it serves the PKI's own certificate, keeps one Lease, and
fails when a test wants it to."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from remediator.fixes.certificates.lease import NAME
from tests.cluster.pki import Pki
from tests.cluster.ports import reserved_ports

LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases"
Meddle = Callable[[str, str], Awaitable[int]]
"""Given method and path, before the answer is: a status to answer instead, 0: none, -1: break the
connection off after the request was obeyed."""


async def nothing(method: str, path: str) -> int:
    """As an API server does without a test."""
    return 0


class FakeApi:
    """What it holds, and what it was asked."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.objects: dict[str, Any] = {
            "/api/v1/nodes": {"items": []},
            "/api/v1/nodes/node-1": {"metadata": {"name": "node-1"}},
            "/api/v1/namespaces/kube-system": {"metadata": {"name": "kube-system"}},
        }
        self.asked: list[tuple[str, str]] = []
        self.meddle: Meddle = nothing

    @property
    def holder(self) -> str:
        """Of the Lease; empty where nobody holds it."""
        return str(((self.lease or {}).get("spec") or {}).get("holderIdentity") or "")

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append((request.method, request.path))
        status = await self.meddle(request.method, request.path)
        if status > 0:
            return web.json_response({"kind": "Status", "message": "told so"}, status=status)
        if request.method in {"POST", "PUT"}:
            self.lease = found = await request.json()
        elif request.path == f"{LEASES}/{NAME}":
            found = self.lease
        else:
            found = self.objects.get(request.path)
        if status < 0 and request.transport is not None:
            request.transport.close()
        if found is None:
            return web.json_response({"kind": "Status", "message": "none"}, status=404)
        return web.json_response(found)


@asynccontextmanager
async def fake_api(pki: Pki) -> AsyncIterator[FakeApi]:
    """For as long as the context; the PKI's admin.conf names it, and its host has a manifest."""
    manifest = pki.directory / "manifests/kube-apiserver.yaml"
    manifest.parent.mkdir(exist_ok=True)
    manifest.write_text("kind: Pod\nspec: {containers: [{command: [kube-apiserver]}]}\n")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(pki.directory / "pki/apiserver.crt", pki.directory / "pki/apiserver.key")
    api = FakeApi()
    runner = web.ServerRunner(web.Server(api.answer))
    await runner.setup()
    with reserved_ports(1) as (port,):
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
        admin = pki.directory / "admin.conf"
        lines = admin.read_text().splitlines()
        at = next(n for n, line in enumerate(lines) if line.strip().startswith("server:"))
        indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        lines[at] = f"{indent}server: https://127.0.0.1:{port}\n{indent}tls-server-name: kubernetes"
        admin.write_text("\n".join(lines) + "\n")
        try:
            yield api
        finally:
            await runner.cleanup()
            await asyncio.sleep(0)
