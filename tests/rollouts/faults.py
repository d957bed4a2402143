"""A proxy before the real API server that fails when it is told to.

A real server can be restarted (and is, in these tests), but it can't be made to answer 500 or to
lose exactly the answer to the third write. What passes here unharmed is the real server's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp import web

from tests.cluster.control_plane import ControlPlane

FAULTS = ("409", "410", "429", "500", "hang", "cut", "lost", "page")
"""An answer by its code; no answer; a cut connection; done, but the answer is lost; or the page of
a load balancer that has nothing behind it, and calls that a success."""

Plan = Callable[[int, str, str], str]
"""(number of the request from 0, method, path) -> a fault, or empty."""


class FaultyApi:
    """An asynchronous context manager; `kubeconfig` leads through it, with all rights."""

    def __init__(self, plane: ControlPlane, folder: Path, plan: Plan) -> None:
        self._api = plane.api
        self._plan = plan
        self.kubeconfig = folder / "faulty.conf"
        self.seen: list[tuple[str, str]] = []

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.kubeconfig.write_text(
            "current-context: a\n"
            "contexts: [{name: a, context: {cluster: a}}]\n"
            f"clusters: [{{name: a, cluster: {{server: 'http://{host}:{port}'}}}}]\n"
        )
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._api.tls), headers=self._api.headers
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        fault = self._plan(len(self.seen), request.method, request.path)
        self.seen.append((request.method, request.path))
        if fault.isdigit():
            return web.json_response(
                {"kind": "Status", "message": "a fault on purpose", "code": int(fault)},
                status=int(fault),
            )
        if fault == "page":
            return web.Response(text="<html>Starting</html>", content_type="text/html")
        if fault == "hang":
            await asyncio.sleep(60)
        if fault != "cut":
            async with self._session.request(
                request.method,
                self._api.server + request.path_qs,
                data=await request.read(),
                headers={"Content-Type": request.headers.get("Content-Type", "application/json")},
            ) as real:
                body = await real.read()
        if fault in {"hang", "cut", "lost"}:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        return web.Response(body=body, status=real.status, content_type="application/json")
